"""Memory of a training step against the number of steps, each measured in a process of its own."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import product

import torch

import crbp
from crbp.bench.measure import WEIGHT, Numbers, Size, in_process, rbp
from crbp.bench.speed import PAPER, TINY
from crbp.cells.hgru import Fusion
from crbp.gradients import GradientMethod
from crbp.losses import focal_loss

GIB = 2**30
LIMIT = 12 * GIB  # a method's curve ends before it would need more
DEVICE = 24 * GIB  # of the accelerator whose end is extrapolated to
NAMES: dict[Fusion, str] = {False: "not fused", "eager": "fused, eager", True: "fused"}  # by how stages run
METHODS = ("BPTT", "CheckpointedBPTT", "TruncatedBPTT", "RBP", "C-RBP", "OneStep", "Phantom")


def gradient(method: str, terms: int) -> GradientMethod:
    """The gradient that a name stands for."""
    made: dict[str, GradientMethod] = {
        "BPTT": crbp.BPTT(),
        "CheckpointedBPTT": crbp.CheckpointedBPTT(),
        "TruncatedBPTT": crbp.TruncatedBPTT(window=5),
        "RBP": rbp(terms),
        "C-RBP": rbp(terms),
        "OneStep": crbp.OneStep(),
        "Phantom": crbp.Phantom(window=5),
    }
    return made[method]


def memory(*, quick: bool) -> Numbers:
    """Bytes that autograd saves, and by how much the process grew, for each method and number of steps."""
    size = replace(TINY, batch=1) if quick else Size(image=64, batch=1, fused=False)
    counts = (5, 10, 20) if quick else (5, 10, 20, 50, 100, 200, 500)
    names = ("BPTT", "C-RBP") if quick else METHODS
    methods = {name: _curve(name, size, counts) for name in names}
    return {"size": asdict(size), "steps": list(counts), "methods": methods, "paper": _paper(quick=quick)}


def _paper(*, quick: bool) -> Numbers:
    """C-RBP beside one step of BPTT at the paper's size, and how many steps of BPTT a device holds.

    Growth is that of a process and only of cells that are not compiled, since compiling takes memory as well.
    """
    paper = TINY if quick else PAPER
    rows = []
    for fused, batch in ((False, 1), ("eager", 2)) if quick else product(NAMES, (1, 2, 8)):
        size = replace(paper, batch=batch, fused=fused)
        ours, one = (saved(replace(size, steps=steps), method) for steps, method in ((3, "C-RBP"), (1, "BPTT")))
        row: Numbers = {"what": f"{NAMES[fused]}, {batch} at a time", "fused": fused, "batch": batch}
        row |= {"crbp_bytes": ours, "bptt_one_step_bytes": one, "saved_ratio": ours / one}
        if fused is not True:
            grown = [_in_process(replace(size, steps=n), name)["peak_bytes"] for n, name in ((3, "C-RBP"), (1, "BPTT"))]
            row |= {"crbp_peak_bytes": grown[0], "bptt_one_step_peak_bytes": grown[1]}
        rows.append(row)
    few, many = (4, 8) if quick else (4, 12)
    alone = replace(paper, batch=1, fused=False)
    peaks = [_in_process(replace(alone, steps=steps), "BPTT")["peak_bytes"] for steps in (few, many)]
    per_step = (peaks[1] - peaks[0]) / (many - few)
    return {
        "size": asdict(paper),
        "rows": rows,
        "bptt_peak_bytes": dict(zip((str(few), str(many)), peaks, strict=True)),
        "bptt_peak_bytes_per_step": per_step,
        "bptt_steps_in_24_gib": {
            str(batch): int(DEVICE / batch // per_step) if per_step > 0 else None for batch in (1, 2, 8, 32, 128)
        },
    }


def saved(size: Size, method: str) -> int:
    """Bytes that autograd saves for one training step; its backward pass is not run."""
    torch.manual_seed(0)
    net = size.net(gradient(method, size.terms))
    image, mask = size.data()
    with crbp.activation_memory(exclude=[*net.parameters(), image, mask]) as found:
        prediction = net(image)
        assert prediction.run is not None
        loss = focal_loss(prediction.logits, mask)
        if method == "C-RBP":
            loss = loss + WEIGHT * crbp.lipschitz_penalty(prediction.run, reduction="mean_square")
    del prediction, loss
    return found.bytes


def _curve(method: str, size: Size, counts: tuple[int, ...]) -> Numbers:
    rows: list[Numbers] = []
    stopped: int | None = None
    for steps in counts:
        if rows and _foreseen(rows, steps) > LIMIT:
            stopped = steps
            break
        rows.append({"steps": steps, **_in_process(replace(size, steps=steps), method)})
    return {"rows": rows, "stopped_before": stopped}


def _foreseen(rows: list[Numbers], steps: int) -> float:
    """Peak bytes at so many steps, were it proportional to them."""
    last = rows[-1]
    return float(max(last["peak_bytes"], last["saved_bytes"])) * steps / float(last["steps"])


def _in_process(size: Size, method: str) -> Numbers:
    found: Numbers = in_process(
        "crbp.bench.probe", {"size": asdict(size), "method": method}, what=f"measuring {method} at {size.steps} steps"
    )
    return found
