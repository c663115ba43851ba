"""One training step in a fresh process: what it saved and grew by, or took to compile. Run by `crbp.bench`."""

from __future__ import annotations

import json
import platform
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor

import crbp
from crbp.bench.measure import WEIGHT, Numbers, Size, timed, training_step
from crbp.bench.memory import gradient, saved
from crbp.errors import CrbpError
from crbp.losses import focal_loss
from crbp.ops.fused import compiler_works
from crbp.ops.memory import return_freed_memory


def peak() -> int:
    """The most bytes of memory that this process has held so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # Unlike ru_maxrss, which begins at the size of the process that started this one, it is this program's own.
        lines = status.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if platform.system() == "Darwin" else 1024 * found


def probe(size: Size, method: str) -> Numbers:
    """What one training step saves, and by how much the process grows in it, in bytes."""
    return_freed_memory()
    torch.manual_seed(0)
    net = size.net(gradient(method, size.terms))
    image, mask = size.data()

    def train(image: Tensor, mask: Tensor) -> None:
        prediction = net(image)
        assert prediction.run is not None
        loss = focal_loss(prediction.logits, mask)
        if method == "C-RBP":
            loss = loss + WEIGHT * crbp.lipschitz_penalty(prediction.run, reduction="mean_square")
        torch.autograd.backward(loss)

    # What is loaded at the first step, whatever its size, counts for nothing.
    train(image[:, :, :8, :8], mask[:, :8, :8])
    net.zero_grad()
    before = peak()
    train(image, mask)
    grown = peak() - before
    return {"saved_bytes": saved(size, method), "peak_bytes": grown}


def first_step(size: Size) -> float:
    """Seconds of the first training step of this process beyond those of the next.

    Raises:
        CrbpError: where fused stages cannot be compiled.
    """
    net, (image, mask) = size.net(), size.data()
    first, second = (timed(lambda: training_step(net, image, mask, weight=WEIGHT))[1] for _ in range(2))
    if not compiler_works():
        raise CrbpError("fused stages cannot be compiled here, which needs a C++ compiler")
    return first - second


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    given = Size(**job["size"])
    print(json.dumps(probe(given, job["method"]) if "method" in job else first_step(given)))
