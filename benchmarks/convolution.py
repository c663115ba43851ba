"""Which way to convolve is the fastest: the times behind `crbp.ops.preferred_method`, and how often it is right.

    python benchmarks/convolution.py [FILE.json]

One thread, float32, the least of several times; the kernel's spectrum is computed beforehand, as it is in a run. The
rule was fitted to cases of the first grid; those of the second it has not seen.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crbp import ops
from crbp.bench.measure import environment

Case = dict[str, Any]
FITTED = {
    "kernel": (3, 5, 7, 9, 11, 15), "inputs": (8, 16, 25, 64), "outputs": (None,), "side": (32, 64, 150),
    "batch": (1, 2, 16),
}  # fmt: skip
UNSEEN = {"kernel": (3, 5, 9, 13), "inputs": (12, 40), "outputs": (1, 20, 48), "side": (48, 100), "batch": (1, 4)}
LARGEST = 4e9  # multiply-adds of a case


def least(function: Callable[[], Any], repeats: int = 5) -> float:
    """Seconds of the fastest call."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def cases(grid: dict[str, Any]) -> Iterator[Case]:
    """Every case of a grid that is not too large; as many outputs as inputs where they are None."""
    for values in itertools.product(*grid.values()):
        case = dict(zip(grid, values, strict=True))
        case["outputs"] = case["outputs"] or case["inputs"]
        pairs, pixels = case["inputs"] * case["outputs"], case["batch"] * case["side"] ** 2
        if pairs * pixels * case["kernel"] ** 2 <= LARGEST:
            yield case


def measured(case: Case) -> Case:
    """Seconds of each method, the one that is chosen, and how many times as long as the fastest that takes."""
    kernel, inputs, outputs, side, batch = case.values()
    image, weight = torch.randn(batch, inputs, side, side), nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
    methods = ("direct", "fft", "winograd") if kernel == 3 else ("direct", "fft")
    with torch.no_grad(), ops.shared_spectra():
        seconds = {name: least(partial(ops.conv2d, image, weight, method=name)) for name in methods}
    chosen = ops.preferred_method(image, weight)
    return {**case, **seconds, "chosen": chosen, "loss": seconds[chosen] / min(seconds.values())}


def judged(found: list[Case]) -> dict[str, Any]:
    """How often the rule takes the fastest, and what it loses otherwise, on average and at most."""
    lost = [case["loss"] for case in found]
    right = sum(loss == 1 for loss in lost) / len(lost)
    return {"cases": len(lost), "fastest": right, "mean_loss": sum(lost) / len(lost) - 1, "largest_loss": max(lost)}


def main() -> None:
    """Measure, judge the rule and write the cases."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ops.keep_freed_memory()
    numbers: dict[str, Any] = {"environment": environment(), "seed": 0}
    for name, grid in (("fitted", FITTED), ("unseen", UNSEEN)):
        found = [measured(case) for case in cases(grid)]
        numbers[name] = {"judged": judged(found), "cases": found}
        print(name, json.dumps(numbers[name]["judged"]), flush=True)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
