"""Kill crbp with SIGKILL at random moments, again and again, and see that it goes on as if nothing had been.

    python benchmarks/soak.py --kills 40 --folder soak    # goes on where it was itself killed; writes soak/soak.json

Each job is run once undisturbed, then in legs that are killed at a moment drawn at random: some time after the start,
or while some file is being written. After every kill all files must be whole; once a job has ended, what it left must
equal what the undisturbed run left, bit for bit. The processes are forked from this one, which has imported everything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from soak_checks import broken_files, differences, fit_result, folder_result, step_of

from crbp._files import write_whole
from crbp.bench.measure import environment
from crbp.cli import main as crbp

# What a command imports only when it is carried out; here once for all processes.
WARM = (
    *("crbp.analysis.command", "crbp.data.panoptic.command", "crbp.data.panoptic.writer", "crbp.data.pathfinder"),
    *("crbp.models.panoptic", "crbp.tasks.command_line", "crbp.tasks.panoptic", "crbp.tasks.panoptic_data"),
    *("torch.utils.tensorboard", "torch._dynamo", "torch.utils.flop_counter", "rich.progress"),
)
ROOT = Path(__file__).parents[1]
LONGEST = 600.0  # seconds of one leg
LAST = Path("runs", "run", "version_0", "checkpoints", "last.ckpt")


@dataclass(frozen=True)
class Job:
    """Something that is killed and started again.

    Attributes:
        arguments: of the command, given whether there is a checkpoint to resume from.
        result: what must be equal, of the folder that it worked in.
    """

    arguments: Callable[[bool], list[str]]
    result: Callable[[Path], dict[str, Any]]


def fit(config: str, *settings: str) -> Job:
    """Train: validated, and so saved, in the middle of an epoch and at its end."""

    def arguments(resume: bool) -> list[str]:
        logger = ["save_dir", "runs", "name", "run", "version", "version_0"]
        named = zip((f"--trainer.logger.init_args.{key}" for key in logger[::2]), logger[1::2], strict=True)
        return [
            *("fit", "--config", str(ROOT / "configs" / config), "--trainer.enable_progress_bar", "false"),
            *("--trainer.enable_model_summary", "false", "--trainer.accelerator", "cpu"),
            *("--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1"),
            *(part for pair in named for part in pair),
            *settings,
            *(("--ckpt_path", str(LAST)) if resume else ()),
        ]

    return Job(arguments, lambda folder: fit_result(folder / LAST.parents[1]))


CONTOURS = (
    *("--model.net.cell.channels", "4", "--model.net.cell.kernel_size", "3", "--model.net.evolve.steps", "4"),
    *("--model.step_jitter", "3", "--data.batch_size", "4", "--data.train_size", "24", "--data.val_size", "8"),
    *("--data.test_size", "64", "--data.lead_in_size", "8", "--trainer.val_check_interval", "2"),
)
SHAPES = (
    *("--data.source.size", "128", "--data.source.train", "6", "--data.source.val", "2", "--data.batch_size", "2"),
    *("--data.shortest", "[64]", "--data.shortest_test", "64", "--data.workers", "0", "--model.warmup_steps", "2"),
    *("--model.net.evolve.steps", "2", "--trainer.val_check_interval", "2"),
)
TRAINED = Path("..", "..", "fit", "undisturbed", "runs", "run", "version_0")


def plain(*arguments: str) -> Job:
    """A command that is repeated as it was, whose files must be the same."""
    return Job(lambda resume: list(arguments), folder_result)


def logged(command: str) -> Job:
    """An evaluation, which leaves a table of its measures."""
    logger = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger"]
    settings = {"save_dir": ".", "name": "measured", "version": "once"}
    named = (part for key, value in settings.items() for part in (f"--trainer.logger.{key}", value))
    return trained(command, *logger, *named)


def trained(command: str, *arguments: str) -> Job:
    """A command that looks at what the first job has trained."""
    given = ("--config", str(TRAINED / "config.yaml"), "--ckpt_path", str(TRAINED / "checkpoints" / "best.ckpt"))
    return plain(command, *(given if command != "analyze" else ()), *arguments)


JOBS = {
    "fit": fit("pathfinder/mini_hgru_crbp.yaml", *CONTOURS),
    "fit panoptic": fit("panoptic/mini_rfpn_crbp10.yaml", *SHAPES),
    "generate": plain("generate", "--preset", "mini", "--size", "2500", "--workers", "1", "--out", "set"),
    "generate parquet": plain(
        *("generate", "--preset", "mini", "--size", "2500", "--workers", "1", "--out", "set", "--format", "parquet")
    ),
    "generate shapes": plain("generate", "shapes", "--images", "60,10", "--size", "128", "--jobs", "1", "--out", "set"),
    "predict": trained("predict", "--trainer.logger", "false", "--out", "seen"),
    "validate": logged("validate"),
    "test": logged("test"),
    "analyze": trained(
        *("analyze", str(TRAINED / "weights" / "last.safetensors"), "--images", "4", "--steps", "8", "--out", "page")
    ),
}


def start(arguments: list[str], folder: Path) -> int:
    """Fork a process that carries out a command of crbp in a folder; its number."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.chdir(folder)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = crbp(arguments)
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        os._exit(code)


def ended(pid: int) -> int | None:
    """The exit status of a process, None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def unfinished(folder: Path) -> str | None:
    """The name of a file that is being written, None where there is none."""
    for place, _, names in os.walk(folder):
        for name in names:
            if name.endswith((".part", ".tmp")):
                return str(Path(place, name).relative_to(folder))
    return None


def leg(arguments: list[str], folder: Path, moment: float, writes: int) -> tuple[int | None, str | None]:
    """Run a command; kill it after ``moment`` seconds or, if that is not 0, while the ``writes``-th file is written.

    Returns:
        Its exit status, None where it was killed, and the file that was being written at that moment.
    """
    for left in folder.rglob("*.tmp"):  # of an earlier kill, which would be taken for a file being written
        left.unlink()
    for left in folder.rglob(".*.part"):
        left.unlink()
    pid, began, seen, last = start(arguments, folder), time.perf_counter(), 0, None
    while (status := ended(pid)) is None:
        spent = time.perf_counter() - began
        if writes and (now := unfinished(folder)) != last:
            last, seen = now, seen + (now is not None)
        if spent > LONGEST or (seen >= writes if writes else spent > moment):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None, unfinished(folder)
        time.sleep(0 if writes else 0.005)
    return status, None


class Soak:
    """Kills that were made and runs that ended, as kept in a file."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.file, self.seed = folder, folder / "soak.json", seed
        empty: dict[str, Any] = {"seed": seed, "environment": environment(), "kills": [], "runs": []}
        self.found = json.loads(self.file.read_text()) if self.file.exists() else empty
        if self.found["seed"] != seed:
            raise SystemExit(f"{self.file} is of seed {self.found['seed']}; give that, or another --folder")

    def save(self) -> None:
        """Keep what has been found."""
        write_whole(self.file, (json.dumps(self.found, indent=1) + "\n").encode())

    def undisturbed(self, name: str) -> float:
        """Run a job to its end; how many seconds that took."""
        folder = self.folder / name.replace(" ", "_") / "undisturbed"
        if (folder / "seconds").exists():
            return float((folder / "seconds").read_text())
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        began = time.perf_counter()
        status, _ = leg(JOBS[name].arguments(False), folder, LONGEST, 0)
        if status != 0:
            raise SystemExit(f"{name} failed undisturbed; see {folder / 'log.txt'}")
        write_whole(folder / "seconds", str(time.perf_counter() - began).encode())
        return float((folder / "seconds").read_text())

    def kill(self, name: str, kills: int) -> None:
        """Kill a job so many times, running it anew when it has ended, and let the last run end."""
        undisturbed = self.undisturbed(name)
        place = self.folder / name.replace(" ", "_")
        while True:
            legs = [each for each in self.found["kills"] if each["job"] == name]
            runs = [each for each in self.found["runs"] if each["job"] == name]
            folder = place / str(len(runs))
            if len(legs) >= kills and not folder.exists():
                return
            folder.mkdir(exist_ok=True)
            # Of runs that were never killed the fastest: later than its end nothing can be killed.
            whole = min([undisturbed, *(each["seconds"] for each in runs if each["legs"] == 1)])
            draw = random.Random(f"{self.seed} {name} {len(legs)} {len(runs)}")
            moment, writes = draw.uniform(whole / 5, whole), draw.randint(1, 12) if draw.random() < 0.5 else 0
            if len(legs) >= kills:
                moment, writes = LONGEST, 0
            self.one(name, folder, moment, writes)

    def one(self, name: str, folder: Path, moment: float, writes: int) -> None:
        """One leg, and what it left."""
        resumed = step_of(folder / LAST) if (folder / LAST).exists() else None
        arguments = JOBS[name].arguments(resumed is not None)
        legs = 1 + sum((each["job"], each["run"]) == (name, folder.name) for each in self.found["kills"])
        began = time.perf_counter()
        status, writing = leg(arguments, folder, moment, writes)
        entry: dict[str, Any] = {"job": name, "run": folder.name, "resumed_at_step": resumed}
        if status is None:
            how = {"at_write": writes} if writes else {"at_second": round(moment, 3)}
            entry |= how | {"was_writing": writing, "broken_files": broken_files(folder)}
            self.found["kills"].append(entry)
        else:
            wanted = JOBS[name].result(folder.parent / "undisturbed")
            found = differences(JOBS[name].result(folder), wanted) if status == 0 else [f"exit status {status}"]
            seconds = round(time.perf_counter() - began, 2)
            self.found["runs"].append(entry | {"legs": legs, "seconds": seconds, "differences": found})
        self.save()
        if entry.get("broken_files") or entry.get("differences"):
            print(f"{name}: {entry}", flush=True)

    def summary(self) -> dict[str, Any]:
        """What came out."""
        kills, runs = self.found["kills"], self.found["runs"]
        return {
            "kills": len(kills),
            "kills_while_writing": sum(each["was_writing"] is not None for each in kills),
            "resumed_from_a_checkpoint": sum(each["resumed_at_step"] is not None for each in kills + runs),
            "runs_ended": len(runs),
            "runs_that_differ": sum(bool(each["differences"]) for each in runs),
            "kills_that_left_a_broken_file": sum(bool(each["broken_files"]) for each in kills),
        }


def main() -> int:
    """Make the kills asked for; 1 where anything was lost or differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("soak"), help="to work in (default: soak)")
    parser.add_argument("--kills", type=int, default=40, help="of each job (default: 40)")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS), help="(default: all)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in WARM:
        import_module(name)
    soak = Soak(options.folder.resolve(), options.seed)
    soak.folder.mkdir(parents=True, exist_ok=True)
    soak.undisturbed("fit")  # whose weights others look at
    for name in options.jobs:
        soak.kill(name, options.kills)
    soak.found["summary"] = soak.summary()
    soak.save()
    print(json.dumps(soak.found["summary"], indent=1))
    return int(bool(soak.summary()["runs_that_differ"] or soak.summary()["kills_that_left_a_broken_file"]))


if __name__ == "__main__":
    sys.exit(main())
