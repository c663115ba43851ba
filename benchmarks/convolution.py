"""Which way to convolve is the fastest: the times behind `crbp.ops.preferred_method`, and how often it is right.

    python benchmarks/convolution.py [FILE.json]

One thread, float32, the least of several times; the kernel's spectrum is computed beforehand, as it is in a run.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crbp import ops

KERNELS, CHANNELS, SIDES, BATCHES = (3, 5, 7, 9, 11, 15), (8, 16, 25, 64), (32, 64, 150), (1, 2, 16)
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


def measure() -> list[dict[str, Any]]:
    """Every case that is not too large."""
    cases = []
    for kernel, channels, side, batch in itertools.product(KERNELS, CHANNELS, SIDES, BATCHES):
        if batch * (side * kernel * channels) ** 2 > LARGEST:
            continue
        image = torch.randn(batch, channels, side, side)
        weight = nn.Parameter(torch.randn(channels, channels, kernel, kernel))
        with torch.no_grad(), ops.shared_spectra():
            case = {"kernel": kernel, "channels": channels, "side": side, "batch": batch}
            methods = ("direct", "fft", "winograd") if kernel == 3 else ("direct", "fft")
            seconds = {
                method: least(lambda: ops.conv2d(image, weight, method=method))  # noqa: B023
                for method in methods
            }
        chosen = ops.preferred_method(image, weight)
        cases.append({**case, **seconds, "chosen": chosen, "loss": seconds[chosen] / min(seconds.values())})
    return cases


def main() -> None:
    """Measure, judge the rule and write the cases."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ops.keep_freed_memory()
    cases = measure()
    lost = [case["loss"] for case in cases]
    print(f"{len(cases)} cases; the rule takes the faster one in {sum(loss == 1 for loss in lost) / len(cases):.0%}, ")
    print(f"and loses {sum(lost) / len(cases) - 1:.1%} on average, at most a factor of {max(lost):.2f}")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
