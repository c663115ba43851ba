"""Rows of an experiment: configurations that are trained one after the other, each with several seeds, and resumed."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml

from crbp.bench.measure import environment

ROOT = Path(__file__).parents[1]
Analyse = Callable[[str, Path], bool]  # the name of a row and the folder of its run; whether it succeeded


def rows(configs: Path, pattern: str) -> list[str]:
    """Names of the configurations that a pattern fits."""
    names = sorted(file.stem for file in configs.glob(f"{pattern}.yaml"))
    if not names:
        raise SystemExit(f"no configuration is called {pattern}; see {configs}")
    return names


def crbp(*arguments: str | Path, log: Path) -> bool:
    """Run a command of crbp on one thread, its output added to a file; whether it succeeded."""
    with log.open("a") as out:
        done = subprocess.run(
            [sys.executable, "-m", "crbp.cli", *map(str, arguments)],
            cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    return done.returncode == 0


def train(
    config: Path, seed: int, out: Path, analyse: Analyse, *, name: str | None = None, settings: Sequence[str] = ()
) -> None:
    """Train one row, from where it was left, and analyse it; its run then has a ``made.json``.

    ``settings`` are options of ``crbp fit`` in place of the configuration's; such a run has a ``name`` of its own.
    """
    name = name or label(config.stem, seed)
    run = out / name / "version_0"
    if (run / "made.json").exists():
        return
    run.mkdir(parents=True, exist_ok=True)
    arguments = ["fit", "--config", config, "--trainer.enable_progress_bar", "false"]
    if started := started_from(config):
        weights = out / started.relative_to("runs")  # relative where it may be: the weights of the run will tell it
        arguments += ["--model.init_args.weights", weights.relative_to(ROOT) if out.is_relative_to(ROOT) else weights]
    arguments += ["--seed_everything", str(seed), "--data.init_args.seed", str(seed)]
    arguments += ["--trainer.logger.init_args.save_dir", out, "--trainer.logger.init_args.name", name]
    arguments += ["--trainer.logger.init_args.version", "version_0"]
    arguments += settings
    if (last := run / "checkpoints" / "last.ckpt").exists():
        arguments += ["--ckpt_path", last]
    made, start = {**environment(), "threads": 1}, time.perf_counter()
    done = crbp(*arguments, log=run / "log.txt")
    with (run / "legs.jsonl").open("a") as file:  # one line for every leg of an interrupted run
        file.write(json.dumps({"seconds": round(time.perf_counter() - start, 1), **made}) + "\n")
    if not (done and analyse(config.stem, run)):
        print(f"{name} failed; see {run / 'log.txt'}", flush=True)
        return
    legs = [json.loads(line) for line in (run / "legs.jsonl").read_text().splitlines()]
    seconds = sum(leg["seconds"] for leg in legs)
    commits = " ".join(dict.fromkeys(str(leg["commit"]) for leg in legs))
    (run / "made.json").write_text(json.dumps({**made, "seed": seed, "seconds": seconds, "commit": commits}, indent=2))
    print(f"{name} done in {seconds:.0f} s", flush=True)


def started_from(config: Path) -> Path | None:
    """The weights of another row, ``runs/NAME/version_0/…``, that a row starts from, if any."""
    weights = yaml.safe_load(config.read_text())["model"]["init_args"].get("weights")
    return Path(weights) if str(weights).startswith("runs/") else None


def label(name: str, seed: int) -> str:
    """The name of a row's run."""
    return name if seed == 0 else f"{name}_seed{seed}"


def train_all(description: str | None, configs: Path, analyse: Analyse) -> None:
    """Train the rows that the command line asks for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_rows(parser)
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, each on one core")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out, found = options.runs.resolve(), wanted(configs, options)
    for first in dict.fromkeys(
        start.parts[1] for name, _ in found if (start := started_from(configs / f"{name}.yaml"))
    ):
        train(configs / f"{first}.yaml", 0, out, analyse)
        if not (out / first / "version_0" / "made.json").exists():
            raise SystemExit(f"{first}, which other rows start from, is not finished")
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda row: train(configs / f"{row[0]}.yaml", row[1], out, analyse), found))


def add_rows(parser: argparse.ArgumentParser) -> None:
    """The options that say which rows are meant."""
    parser.add_argument("patterns", nargs="+", help="of the rows, such as 'small5_*'")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])


def wanted(configs: Path, options: argparse.Namespace) -> list[tuple[str, int]]:
    """Names and seeds of the rows that are meant."""
    names = dict.fromkeys(name for pattern in options.patterns for name in rows(configs, pattern))
    return [(name, seed) for seed in options.seeds for name in names]


def rounded(value: Any) -> Any:
    """The same with five digits of every number."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
