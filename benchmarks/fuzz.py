"""Feed spoilt files to every reader of crbp: each case must end in success or in an error that crbp names.

    PYTHONPATH=src python benchmarks/fuzz.py --cases 100000 --json results/reliability/fuzz.json

A case is good files, of which one or two are spoilt, and one call of a reader. It fails with any other exception, if it
takes longer than `SECONDS`, needs more than `MEMORY` bytes beyond what the process has, starts a process, opens a
connection, or writes anywhere at all, since none of the readers is to write. It is repeated by ``--only READER --first
NUMBER --cases 1 --show``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from fuzz_mutations import spoil_bytes
from fuzz_readers import READERS, Reader

import crbp
from crbp.bench.measure import environment
from crbp.data.panoptic import DataError

SECONDS = 10
MEMORY = 2 << 30
NAMED = (crbp.CrbpError, DataError)
_WATCHED = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "os.mkdir", "os.remove"}
_watch: list[str] | None = None


class Hang(BaseException):
    """A case took too long; no `Exception`, which a reader might catch."""


class TrespassError(Exception):
    """A reader wrote, started a process or opened a connection."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch is None:
        return
    if event in _WATCHED or (
        event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    ):
        where = str(arguments[0]) if arguments else ""
        if where != "/dev/null" and "__pycache__" not in where:
            _watch.append(f"{event} {where[:80]}")


def _ring(*_: Any) -> None:
    raise Hang


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    global _watch
    _watch = []
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        seen, _watch = _watch, None
    if seen:
        raise TrespassError(seen[0])


def spoil(reader: Reader, random: Random, good: dict[str, bytes], folder: Path) -> None:
    """Write the files, one or two of them spoilt."""
    for name, content in good.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for name, structure in random.sample(reader.spoil, k=min(len(reader.spoil), random.choice((1, 1, 2)))):
        change = spoil_bytes if random.random() < 0.3 else structure
        (folder / name).write_bytes(change(random, good[name]))


def run(reader: Reader, random: Random, good: dict[str, bytes], folder: Path) -> str:
    """The outcome of one case in an empty folder: ``"read"``, or the name of the error.

    Raises:
        Exception: any that is not one of `NAMED`.
        Hang: the case took too long.
        TrespassError: something was written or started.
    """
    spoil(reader, random, good, folder)
    try:
        with _guarded(), warnings.catch_warnings(), contextlib.chdir(folder):
            warnings.simplefilter("ignore")
            reader.read(folder)
    except NAMED as error:
        str(error).encode()  # it can be printed
        return type(error).__name__
    return "read"


def files(reader: Reader, folder: Path) -> dict[str, bytes]:
    """The good files of a reader, by their path."""
    with contextlib.chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader.make(folder)
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def fuzz(name: str, *, first: int, cases: int, seed: int, show: bool) -> dict[str, Any]:
    """Run the cases of one reader and count how they end."""
    outcomes: Counter[str] = Counter()
    failures: dict[str, dict[str, Any]] = {}
    slowest = 0.0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as parent:
        (Path(parent) / "good").mkdir()
        good = files(READERS[name], Path(parent) / "good")
        folder = Path(parent) / "case"
        start = time.monotonic()
        for number in range(first, first + cases):
            folder.mkdir()
            began = time.monotonic()
            try:
                outcomes[run(READERS[name], Random(f"{seed} {name} {number}"), good, folder)] += 1
            except (Exception, Hang) as error:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(frame.filename).name}:{frame.lineno}"
                what = f"{type(error).__name__}: {str(error)[:150]} ({place})"
                key = f"{type(error).__name__} {place}"
                failures.setdefault(key, {"what": what, "case": number, "times": 0})["times"] += 1
                if show:
                    traceback.print_exc()
            slowest = max(slowest, time.monotonic() - began)
            shutil.rmtree(folder)
        seconds = time.monotonic() - start
    return {
        "cases": cases,
        "outcomes": dict(outcomes.most_common()),
        "failures": list(failures.values()),
        "slowest_seconds": round(slowest, 2),
        "milliseconds_a_case": round(1000 * seconds / max(cases, 1), 2),
    }


def share_out(total: int, names: Iterable[str]) -> dict[str, int]:
    """Cases of each reader, so that all take about the same time."""
    weights = {name: 1 / READERS[name].cost for name in names}
    return {name: math.ceil(total * weight / sum(weights.values())) for name, weight in weights.items()}


def prepare() -> None:
    """Watch what this process does, and limit its memory."""
    sys.addaudithook(_audit)
    signal.signal(signal.SIGALRM, _ring)
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="over all these readers")
    parser.add_argument("--only", choices=sorted(READERS), nargs="+", default=sorted(READERS))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print each traceback")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    made_by = environment()
    prepare()
    found: dict[str, Any] = {}
    for name, cases in share_out(options.cases, options.only).items():
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        resource.setrlimit(
            resource.RLIMIT_AS, (int(status["VmSize"].split()[0]) * 1024 + MEMORY, resource.RLIM_INFINITY)
        )
        found[name] = fuzz(name, first=options.first, cases=cases, seed=options.seed, show=options.show)
        print(name, json.dumps(found[name], indent=1), flush=True)
        total = {
            "cases": sum(each["cases"] for each in found.values()),
            "failures": sum(each["times"] for result in found.values() for each in result["failures"]),
            **{"seed": options.seed, "environment": made_by},
        }
        if options.json:  # after each reader, since all of them take an hour
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps({"total": total, "readers": found}, indent=1) + "\n")
    print(total)
    sys.exit(1 if total["failures"] else 0)


if __name__ == "__main__":
    main()
