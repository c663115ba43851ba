"""The gradients of torchdeq beside those of crbp: how far they are apart, how long they take, what they keep.

    uv run python benchmarks/against_torchdeq.py     # two minutes of one core

One cell for both, that of a trained network (16 channels, 7×7, unfused), on two images of its validation split, with
as many steps forward and as many products backward. How far the gradients are apart is told for that cell, which moves
a little still after its steps, and for the step of docs/migrate.md, which has settled. Sets the table of that page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchdeq
from _runs import ROOT
from _tables import markdown, with_tables
from torch import Tensor

import crbp
from crbp.bench.measure import environment, in_turns, relative, spread
from crbp.hub import from_pretrained
from crbp.losses import focal_loss
from crbp.tasks import Generated
from crbp.tasks.sampling import stacked

PAGE, RESULT = ROOT / "docs" / "migrate.md", ROOT / "results" / "speed" / "torchdeq.json"
NETWORK, PRESET, STEPS, TERMS = "small9_hgru_crbp", "small9", 48, 15
Run = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]  # of a step and a start, the state at the end
EXACT = {"f_tol": 0.0, "b_tol": 0.0}  # all iterations
# torchdeq applies the step once more after its solver to have a graph, and takes one product with zero. The Jacobian of
# its implicit gradient is that of the state that then comes out, crbp's that of the last step.
METHODS: dict[str, tuple[crbp.GradientMethod, dict[str, Any]]] = {
    "implicit": (
        crbp.RBP(crbp.Neumann(terms=TERMS), max_residual=float("inf")),
        {"f_max_iter": STEPS - 1, "ift": True, "b_solver": "fixed_point_iter", "b_max_iter": TERMS + 1},
    ),
    "one step": (crbp.OneStep(), {"f_max_iter": STEPS - 1, "grad": 1}),
    "phantom": (crbp.Phantom(window=5, damping=0.5), {"f_max_iter": STEPS - 5, "grad": 5, "tau": 0.5}),
}


@dataclass(frozen=True)
class Task:
    """A loss of where a run of a step ends, and what its gradient is taken in."""

    net: Any
    loss: Callable[[Run], Tensor]

    def gradient(self, loss: Callable[[], Tensor]) -> Tensor:
        """Of all parameters, as one vector."""
        self.net.zero_grad()
        loss().backward()
        return torch.cat([p.grad.flatten() for p in self.net.parameters() if p.grad is not None])


def settled() -> Task:
    """The step of docs/migrate.md."""
    torch.manual_seed(0)
    net, x = torch.nn.Linear(8, 8).double(), torch.randn(4, 8).double()
    return Task(net, lambda run: run(lambda z: torch.tanh(net(z) / 2 + x), torch.zeros_like(x)).square().sum())


def traced(dtype: torch.dtype) -> Task:
    """Contours traced by the trained network on two images."""
    net: Any = from_pretrained(NETWORK).to(dtype)
    net.cell.fused = False
    image, mask = stacked(Generated(preset=PRESET).items("val", 2, 0), 2)

    def loss(run: Run) -> Tensor:
        drive = net.drive(image.to(dtype))
        return focal_loss(net.read(run(lambda h: net.cell(h, drive), net.cell.initial_state(drive))), mask)

    return Task(net, loss)


def ours(task: Task, method: str) -> Tensor:
    """The loss by crbp."""
    evolve = crbp.Evolve(steps=STEPS, gradient=METHODS[method][0])
    return task.loss(lambda step, start: evolve(step, start).state)


def theirs(task: Task, method: str) -> Tensor:
    """The loss by torchdeq."""
    deq = torchdeq.get_deq(f_solver="fixed_point_iter", **EXACT, **METHODS[method][1])
    return task.loss(lambda step, start: deq(step, start)[0][-1])


def measure(repeats: int) -> dict[str, Any]:
    """Of each method the difference of the gradients, the seconds of both and the bytes that both keep."""
    usual = traced(torch.float32)
    found: dict[str, Any] = {}
    for method in METHODS:
        apart = {
            name: relative(*(task.gradient(partial(loss, task, method)) for loss in (ours, theirs)))
            for name, task in {"settled": settled(), "traced": traced(torch.float64)}.items()
        }
        both = {"crbp": partial(ours, usual, method), "torchdeq": partial(theirs, usual, method)}
        kept = {}
        for name, loss in both.items():
            usual.gradient(loss)
            with crbp.activation_memory(exclude=list(usual.net.parameters())) as memory:
                loss()
            kept[name] = memory.bytes
        seconds = in_turns({name: partial(usual.gradient, loss) for name, loss in both.items()}, repeats)
        found[method] = {
            "gradient_difference": apart,
            "saved_bytes": kept,
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "crbp_over_torchdeq": spread([a / b for a, b in zip(seconds["crbp"], seconds["torchdeq"], strict=True)]),
        }
    return found


def tables(found: dict[str, Any]) -> dict[str, str]:
    """The table of the page."""
    rows = [
        [
            method,
            *(f"{apart:.0e}" if apart else "0" for apart in row["gradient_difference"].values()),
            "{median:.2f} ({min:.2f} to {max:.2f})".format(**row["crbp_over_torchdeq"]),
            *(f"{row['saved_bytes'][name] / 2**20:.3g}" for name in ("crbp", "torchdeq")),
        ]
        for method, row in found.items()
    ]
    head = ("gradient", "settled", "traced", "seconds, crbp over torchdeq", "MiB kept by crbp", "by torchdeq")
    return {"torchdeq": markdown(head, rows)}


def main() -> None:
    """Measure, write, and set the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = measure(options.repeats)
    what = {"network": NETWORK, "steps": STEPS, "terms": TERMS, "torchdeq": version("torchdeq")}
    options.out.write_text(json.dumps({**what, "methods": found, "environment": environment()}, indent=2) + "\n")
    if options.out == RESULT:
        PAGE.write_text(with_tables(PAGE.read_text(), tables(found)))


if __name__ == "__main__":
    main()
