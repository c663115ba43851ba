"""Train rows of contour tracing one after the other, and analyse what comes out.

    python benchmarks/pathfinder.py 'small*_hgru_*' --jobs 2      # resumes what was cut off
    python benchmarks/pathfinder_results.py 'small*'              # sets the table and draws the figures

A row is a file in `configs/pathfinder`; its run lies in ``runs/NAME/version_0``, whose last weights are what is
analysed: nothing is picked by its score.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from crbp.analysis.trajectory import BATCH, follow
from crbp.bench.measure import environment
from crbp.models import PathfinderNet
from crbp.tasks import Generated, load_net
from crbp.tasks.sampling import stacked

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "pathfinder"
IMAGES = 256  # of every analysis
TASKS = ("small5", "small9", "small14")


def rows(pattern: str) -> list[str]:
    """Names of the configurations that a pattern fits."""
    names = sorted(file.stem for file in CONFIGS.glob(f"{pattern}.yaml"))
    if not names:
        raise SystemExit(f"no configuration is called {pattern}; see {CONFIGS}")
    return names


def crbp(*arguments: str | Path, log: Path) -> bool:
    """Run a command of crbp on one thread, its output added to a file; whether it succeeded."""
    with log.open("a") as out:
        done = subprocess.run(
            [sys.executable, "-m", "crbp.cli", *map(str, arguments)],
            cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    return done.returncode == 0


def train(name: str, seed: int, out: Path) -> None:
    """Train one row, from where it was left."""
    run = out / label(name, seed) / "version_0"
    if (run / "made.json").exists():
        return
    run.mkdir(parents=True, exist_ok=True)
    arguments = ["fit", "--config", CONFIGS / f"{name}.yaml", "--trainer.enable_progress_bar", "false"]
    arguments += ["--seed_everything", str(seed), "--data.init_args.seed", str(seed)]
    arguments += ["--trainer.logger.init_args.save_dir", out, "--trainer.logger.init_args.name", label(name, seed)]
    arguments += ["--trainer.logger.init_args.version", "version_0"]
    if (last := run / "checkpoints" / "last.ckpt").exists():
        arguments += ["--ckpt_path", last]
    made, start = {**environment(), "threads": 1}, time.perf_counter()
    done = crbp(*arguments, log=run / "log.txt")
    with (run / "legs.jsonl").open("a") as file:  # one line for every leg of an interrupted run
        file.write(json.dumps({"seconds": round(time.perf_counter() - start, 1), **made}) + "\n")
    if not (done and analyse(name, run)):
        print(f"{label(name, seed)} failed; see {run / 'log.txt'}", flush=True)
        return
    legs = [json.loads(line) for line in (run / "legs.jsonl").read_text().splitlines()]
    seconds = sum(leg["seconds"] for leg in legs)
    commits = " ".join(dict.fromkeys(str(leg["commit"]) for leg in legs))
    (run / "made.json").write_text(json.dumps({**made, "seed": seed, "seconds": seconds, "commit": commits}, indent=2))
    print(f"{label(name, seed)} done in {seconds:.0f} s", flush=True)


def analyse(name: str, run: Path) -> bool:
    """Analyse one run, and trace the contours of the other tasks of its family with it; whether that succeeded."""
    weights, task = run / "weights" / "last.safetensors", name.split("_")[0]
    if "feedforward" not in name:
        settings = ["--out", run / "analysis", "--images", str(IMAGES)]
        if not crbp("analyze", weights, *settings, log=run / "log.txt"):
            return False
    found = {other: accuracy(weights, other) for other in TASKS if task in TASKS and other != task}
    (run / "others.json").write_text(json.dumps(found, indent=2))
    return True


def accuracy(weights: Path, preset: str) -> list[float]:
    """F1 on the images of a task after every step up to 4N; of a feed-forward net, its one."""
    net, (image, mask) = load_net(weights), images(preset)
    if isinstance(net, PathfinderNet):
        return [float(f1) for f1 in follow(net, image, mask, steps=4 * net.evolve.steps).f1]
    with torch.no_grad():
        traced = torch.cat([net(some).logits.argmax(dim=1).bool() for some in torch.split(image, BATCH)])
    return [float(2 * (traced & mask).sum() / (traced.sum() + mask.sum()))]


@cache
def images(preset: str) -> tuple[Tensor, Tensor]:
    """Images and masks of a task, the ones that `crbp analyze` takes."""
    return stacked(Generated(preset=preset).items("val", IMAGES, 0), IMAGES)


def label(name: str, seed: int) -> str:
    """The name of a row's run."""
    return name if seed == 0 else f"{name}_seed{seed}"


def main() -> None:
    """Train the rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_rows(parser)
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, each on one core")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda row: train(*row, options.runs.resolve()), wanted(options)))


def add_rows(parser: argparse.ArgumentParser) -> None:
    """The options that say which rows are meant."""
    parser.add_argument("patterns", nargs="+", help="of the rows, such as 'small5_*'")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])


def wanted(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Names and seeds of the rows that are meant."""
    names = dict.fromkeys(name for pattern in options.patterns for name in rows(pattern))
    return [(name, seed) for seed in options.seeds for name in names]


if __name__ == "__main__":
    main()
