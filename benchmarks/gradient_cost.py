"""What a training step costs by each gradient method, beside BPTT with as many steps.

    python benchmarks/gradient_cost.py      # five minutes of one core; sets the tables of docs/choose-gradient.md

The networks take turns. Seconds are of forward and backward pass of the hGRU on random images, without an optimiser;
what autograd keeps is in `results/speed/memory.json`, by `crbp bench --only memory`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _runs import ROOT
from _tables import markdown, with_tables

from crbp.bench.measure import Size, environment, in_turns, spread, training_step
from crbp.bench.memory import METHODS, gradient

PAGE, RESULTS = ROOT / "docs" / "choose-gradient.md", ROOT / "results" / "speed"
SIZE = Size(channels=16, kernel_size=7, image=48, fused=False)
COUNTS = (5, 20, 100)
KEPT_AT = (5, 20, 100, 500)
WEIGHT = 1.0  # of the Lipschitz penalty of C-RBP
CALLED = {
    "BPTT": "`BPTT()`", "CheckpointedBPTT": "`CheckpointedBPTT()`", "TruncatedBPTT": "`TruncatedBPTT(window=5)`",
    "Phantom": "`Phantom(window=5)`", "OneStep": "`OneStep()`", "RBP": "`RBP(Neumann(terms=15))`",
    "C-RBP": "the same with `lipschitz_penalty`",
}  # fmt: skip


def measure(repeats: int) -> dict[str, Any]:
    """Seconds of each method at each number of steps, and how many times those of BPTT in the same turn."""
    found: dict[str, Any] = {}
    for steps in COUNTS:
        size = replace(SIZE, steps=steps)
        image, mask = size.data()
        jobs: dict[str, Callable[[], Any]] = {}
        for method in METHODS:
            torch.manual_seed(0)
            net = size.net(gradient(method, size.terms))
            jobs[method] = partial(training_step, net, image, mask, weight=WEIGHT * (method == "C-RBP"))
            jobs[method]()
        seconds = in_turns(jobs, repeats)
        found[str(steps)] = {
            method: {
                "seconds": spread(values),
                "over_bptt": spread([a / b for a, b in zip(values, seconds["BPTT"], strict=True)]),
            }
            for method, values in seconds.items()
        }
    return found


def tables(folder: Path) -> dict[str, str]:
    """Seconds, as a multiple of BPTT's at the same number of steps, and MiB kept, of each method."""
    steps = json.loads((folder / "gradients.json").read_text())["steps"]
    kept = json.loads((folder / "memory.json").read_text())["parts"]["memory"]["methods"]
    times = [
        [title, *(f"{steps[str(count)][method]['over_bptt']['median']:.2f}" for count in COUNTS)]
        for method, title in CALLED.items()
    ]
    saved = [
        [title, *(mib(row["saved_bytes"]) for row in kept[method]["rows"] if row["steps"] in KEPT_AT)]
        for method, title in CALLED.items()
    ]
    return {"times": markdown(("N", *map(str, COUNTS)), times), "memory": markdown(("N", *map(str, KEPT_AT)), saved)}


def mib(size: int) -> str:
    """Three digits of a number of bytes, in MiB."""
    return f"{float(f'{size / 2**20:.3g}'):,g}".replace(",", " ")


def main() -> None:
    """Measure, write, and set the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "gradients.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {"size": asdict(SIZE), "steps": measure(options.repeats), "environment": {**environment(), "threads": 1}}
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    if options.out.parent == RESULTS:
        PAGE.write_text(with_tables(PAGE.read_text(), tables(RESULTS)))


if __name__ == "__main__":
    main()
