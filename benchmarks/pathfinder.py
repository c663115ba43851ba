"""Train rows of contour tracing one after the other, analyse what comes out, and set the table of results.

    python benchmarks/pathfinder.py train 'small*_hgru_*' --jobs 2      # resumes what was cut off
    python benchmarks/pathfinder.py collect 'small*' --out results/pathfinder

A row is a file in `configs/pathfinder`; its run lies in ``runs/NAME/version_0``, whose last weights are what is
analysed: nothing is picked by its score.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from crbp.bench.measure import environment

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "pathfinder"
IMAGES = 256  # of every analysis
TASKS = ("small5", "small9", "small14")
COLUMNS = (
    "row", "task", "cell", "method", "kernel", "steps", "parameters", "images", "seconds",
    "f1_at_n", "f1_at_4n", "f1_best", "f1_best_at", "residual_at_4n", "stable_share", "ks_statistic", "moved",
    *(f"best_on_{task}" for task in TASKS), "seed", "commit",
)  # fmt: skip


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
    start = time.perf_counter()
    done = crbp(*arguments, log=run / "log.txt")
    with (run / "times.txt").open("a") as file:  # one line for every leg of an interrupted run
        file.write(f"{time.perf_counter() - start:.1f}\n")
    if not (done and analyse(name, run)):
        print(f"{label(name, seed)} failed; see {run / 'log.txt'}", flush=True)
        return
    seconds = sum(map(float, (run / "times.txt").read_text().split()))
    (run / "made.json").write_text(json.dumps({"seed": seed, "seconds": round(seconds, 1), **environment()}, indent=2))
    print(f"{label(name, seed)} done in {seconds:.0f} s", flush=True)


def analyse(name: str, run: Path) -> bool:
    """Analyse one run, and on the other tasks of its family the same; whether that succeeded."""
    if "feedforward" in name:
        return True
    weights, settings = run / "weights" / "last.safetensors", ["--images", str(IMAGES)]
    done = [crbp("analyze", weights, "--out", run / "analysis", *settings, log=run / "log.txt")]
    for task in TASKS:
        if name.split("_")[0] in TASKS and task != name.split("_")[0]:
            out = run / f"analysis_{task}"
            done.append(crbp("analyze", weights, "--preset", task, "--out", out, *settings, log=run / "log.txt"))
    return all(done)


def label(name: str, seed: int) -> str:
    """The name of a row's run."""
    return name if seed == 0 else f"{name}_seed{seed}"


def collect(run: Path) -> dict[str, Any] | None:
    """One line of the table; None for a run that is not finished."""
    if not (run / "made.json").exists():
        return None
    made = json.loads((run / "made.json").read_text())
    config = yaml.safe_load((run / "config.yaml").read_text())
    net = config["model"]["init_args"]["net"]["init_args"]
    data = config["data"]["init_args"]
    task = data["source"]["init_args"]["preset"]
    name = run.parent.name
    line: dict[str, Any] = {
        "row": name,
        "task": task,
        "cell": name.split("_")[1],
        "method": name.split("_")[2] if "feedforward" not in name else "",
        "kernel": net.get("kernel_size") or net["cell"]["init_args"]["kernel_size"],
        "steps": net.get("evolve", {}).get("steps", ""),
        "parameters": _parameters(run),
        "images": data["train_size"] // data["batch_size"] * data["batch_size"] * config["trainer"]["max_epochs"],
        "seconds": made["seconds"],
        "seed": made["seed"],
        "commit": made["commit"],
    }
    if "feedforward" in name:
        return {**line, "f1_at_n": curve(run, "val/f1")[-1][1]}
    found = json.loads((run / "analysis" / "analysis.json").read_text())
    line |= {
        "f1_at_n": found["f1_at_n"],
        "f1_at_4n": found["f1_at_end"],
        "f1_best": found["f1_best"],
        "f1_best_at": found["f1_best_at"],
        "residual_at_4n": found["residual_at_end"],
        "stable_share": found["stable_share"],
        "ks_statistic": max(found["ks_statistic"]),
        "moved": statistics.median(found["moved"]),
    }
    if task in TASKS:
        line[f"best_on_{task}"] = found["f1_best"]
    for other in TASKS:
        if (file := run / f"analysis_{other}" / "analysis.json").exists():
            line[f"best_on_{other}"] = json.loads(file.read_text())["f1_best"]
    return line


def _parameters(run: Path) -> int:
    from crbp.tasks import load_net

    return sum(parameter.numel() for parameter in load_net(run / "weights" / "last.safetensors").parameters())


def curve(run: Path, tag: str) -> list[tuple[int, float]]:
    """Optimiser step and value of what a run logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        return []
    return [(event.step, event.value) for event in events.Scalars(tag)]


def write(runs: list[Path], out: Path) -> None:
    """The table and the curves as CSV files."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [line for run in runs if (line := collect(run)) is not None]
    with (out / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        for line in lines:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in line.items()})
    with (out / "curves.csv").open("w", newline="") as file:
        curves = csv.writer(file)
        curves.writerow(("row", "tag", "optimiser_step", "value"))
        for run in runs:
            for tag in ("val/f1", "val/residual", "val/spectral_radius", "val/penalty"):
                curves.writerows((run.parent.name, tag, step, f"{value:.5g}") for step, value in curve(run, tag))
    print(f"{len(lines)} rows of {len(runs)} in {out}")


def main() -> None:
    """Train or collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("train", "collect"))
    parser.add_argument("patterns", nargs="+", help="of the rows, such as 'small5_*'")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "pathfinder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, each on one core")
    options = parser.parse_args()
    runs = options.runs.resolve()
    names = dict.fromkeys(name for pattern in options.patterns for name in rows(pattern))
    wanted = [(name, seed) for seed in options.seeds for name in names]
    if options.action == "collect":
        folders = [runs / label(name, seed) / "version_0" for name, seed in wanted]
        write([folder for folder in folders if (folder / "config.yaml").exists()], options.out)
        return
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda row: train(*row, runs), wanted))


if __name__ == "__main__":
    main()
