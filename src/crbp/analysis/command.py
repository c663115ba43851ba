"""`crbp analyze`: what a trained model does step by step, far beyond the steps it was trained for, as one page."""

from __future__ import annotations

import argparse
import copy
import html
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from crbp._command import Parser, reserve
from crbp._files import write_whole
from crbp.analysis import figures
from crbp.analysis.page import RESIDUAL, write_page
from crbp.analysis.states import StateSpace, state_space
from crbp.analysis.trajectory import Trajectory, follow, late_radius
from crbp.cells import HGRU
from crbp.data.pathfinder import PRESETS, DataError, GenerationError
from crbp.errors import CrbpError
from crbp.models import PathfinderNet
from crbp.tasks import ContourData, Generated, Origin, load_trained
from crbp.tasks.sampling import stacked
from crbp.tasks.weights import build

SHOWN = 6  # images in the figures


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What was measured of a model.

    Attributes:
        trained: N, the steps it was trained for.
        trajectory: what it does step by step.
        states: where its states go; None where they do not stay finite.
        radius: spectral radius of the step's Jacobian after the last step, one an image; none where that is not finite.
        converged: whether each is to be trusted.
    """

    trained: int
    trajectory: Trajectory
    states: StateSpace | None
    radius: Tensor
    converged: Tensor

    def numbers(self) -> dict[str, Any]:
        """All of it that is a number."""
        n, f1, residual = self.trained, self.trajectory.f1, self.trajectory.residual
        states = self.states
        found: dict[str, Any] = {
            "trained_steps": n,
            "steps": len(f1),
            "f1": f1.tolist(),
            "f1_at_n": float(f1[n - 1]),
            "f1_at_end": float(f1[-1]),
            "f1_best": float(f1.max()),
            "f1_best_at": int(f1.argmax()) + 1,
            # JSON has no word for what is not finite.
            "residual": [value if math.isfinite(value) else None for value in residual.tolist()],
            "residual_at_n": float(residual[n - 1]),
            "residual_at_end": float(residual[-1]),
            "spectral_radius": self.radius.tolist(),
            "spectral_radius_converged": float(self.converged.double().mean()),
            "stable_share": float((self.radius < 1).double().mean()),
            "moved": states.moved.tolist() if states else None,
            "explained": states.explained.tolist() if states else None,
            "ks_statistic": states.statistic.tolist() if states else None,
            "ks_p_value": states.p_value.tolist() if states else None,
        }
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}


def analyse(net: PathfinderNet, image: Tensor, mask: Tensor, *, steps: int | None = None, radii: int = 64) -> Analysis:
    """Run a model beyond the steps it was trained for and measure what it does.

    Args:
        net: the model, in evaluation mode.
        image: ``(B, 1, H, W)``, at least two.
        mask: ``(B, H, W)`` of bool.
        steps: how far to run; None for four times the steps it was trained for.
        radii: of how many images the spectral radius is estimated.

    Raises:
        ValueError: if there are fewer than two images, or ``steps`` is not above the steps trained for.
    """
    trained = net.evolve.steps
    late = 4 * trained if steps is None else steps
    net = copy.deepcopy(net)
    net.evolve = replace(net.evolve, tolerance=None, on_divergence="warn")
    for module in net.modules():
        if isinstance(module, HGRU):
            module.fused = False  # it would be compiled for every size of batch here
    try:
        states = state_space(net, image, trained=trained, steps=late)
    except FloatingPointError:
        states = None
    radius, converged = late_radius(net, image[:radii], steps=late)
    return Analysis(
        trained=trained,
        trajectory=follow(net, image, mask, steps=late, shown=min(SHOWN, len(image))),
        states=states,
        radius=radius,
        converged=converged,
    )


def main(arguments: list[str]) -> None:
    """Run the command.

    Raises:
        CrbpError: if the options are wrong, the checkpoint or its images cannot be had, or it is of no recurrent model.
    """
    options = _options(arguments)
    folder, console = Path(options.out), Console()
    net, origin = load_trained(options.checkpoint, trust=("crbp", *options.trust))
    if not isinstance(net, PathfinderNet):
        raise CrbpError(f"{options.checkpoint} is of a {type(net).__name__}, which has no steps to follow")
    if options.steps is not None and options.steps <= net.evolve.steps:
        raise CrbpError(f"--steps must be above the {net.evolve.steps} trained for, not {options.steps}")
    reserve(folder, [folder / "report.html", folder / "analysis.json"])
    with console.status("Making the images …"):
        image, mask, task = _images(options, origin)
    with console.status("Following the model step by step …"), torch.inference_mode(False):
        found = analyse(net, image, mask, steps=options.steps)
    numbers = {"checkpoint": str(options.checkpoint), "images": len(image), "task": task, **found.numbers()}
    write_whole(folder / "analysis.json", (json.dumps(numbers, indent=2, allow_nan=False) + "\n").encode())
    _write(folder / "report.html", options.checkpoint, origin, found, image, mask, task)
    for name, value in _rows(found):
        console.print(f"{name:<58}{value}", highlight=False)
    console.print(f"Open [bold]{folder / 'report.html'}[/] to see it.", soft_wrap=True)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="crbp analyze",
        description="Follow a trained model far beyond the steps it was trained for; write a page of figures.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=Path, help="a .safetensors file, or a .ckpt file in the folder of its run")
    parser.add_argument("--out", default="analysis", metavar="DIR", help="folder of the report (default: analysis)")
    parser.add_argument("--steps", type=int, metavar="T", help="how far to run it (default: 4 times the steps trained)")
    parser.add_argument("--images", type=int, default=128, metavar="B", help="of the validation split (default: 128)")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="task (default: what it was trained on)")
    parser.add_argument("--seed", type=int, default=0, help="of the images of a preset (default: 0)")
    parser.add_argument("--trust", nargs="+", default=(), metavar="PACKAGE", help="of the classes the file may name")
    options = parser.parse_args(arguments)
    if options.images < 2:
        raise CrbpError(f"--images must be at least 2, not {options.images}")
    if options.seed < 0:
        raise CrbpError(f"--seed must be at least 0, not {options.seed}")
    return options


def _images(options: argparse.Namespace, origin: Origin) -> tuple[Tensor, Tensor, str]:
    """Images ``(B, 1, H, W)``, masks ``(B, H, W)``, and what task they are of."""
    seed = options.seed
    if options.preset is not None:
        source: Any = Generated(preset=options.preset)
    elif "data" in origin.run:
        what = f"the data of {options.checkpoint}"
        data = build(ContourData, origin.run["data"], what, trust=("crbp", *options.trust))
        source, seed = data.source, data.seed
    else:
        raise CrbpError(f"{options.checkpoint} does not say what it was trained on; choose a task with --preset")
    try:
        image, mask = stacked(source.items("val", options.images, seed), options.images)
    except (DataError, GenerationError) as error:
        raise CrbpError(f"{error}; --images says how many, --preset of which task") from error
    return image, mask, source.preset if isinstance(source, Generated) else type(source).__name__


def _rows(found: Analysis) -> list[tuple[str, str]]:
    n, last, numbers = found.trained, len(found.trajectory.f1), found.numbers()
    rows = [
        (f"F1 after the {n} steps trained for", f"{numbers['f1_at_n']:.3f}"),
        (f"F1 after {last} steps", f"{numbers['f1_at_end']:.3f}"),
        ("F1 at its best", f"{numbers['f1_best']:.3f}, after {numbers['f1_best_at']} steps"),
        (f"relative residual after {n} steps", f"{found.trajectory.residual[n - 1]:.1e}"),
        (f"relative residual after {last} steps", f"{found.trajectory.residual[-1]:.1e}"),
    ]
    if len(found.radius):
        share = f"{numbers['stable_share']:.0%}"
        rows.append((f"images whose spectral radius after {last} steps is below 1", share))
    if found.states is None:
        return [*rows, ("states", "not finite")]
    statistic, p_value = (
        " and ".join(f"{value:.2g}" for value in tensor.tolist())
        for tensor in (found.states.statistic, found.states.p_value)
    )
    return [
        *rows,
        (f"median distance from step {n} to step {last}, of the state", f"{found.states.moved.median():.2g}"),
        (f"Kolmogorov-Smirnov statistic of axes 1 and 2, {n} to {last}", f"{statistic} (p = {p_value})"),
    ]


def _write(
    file: Path, checkpoint: Path, origin: Origin, found: Analysis, image: Tensor, mask: Tensor, task: str
) -> None:
    n, last = found.trained, len(found.trajectory.f1)
    name = origin.name or checkpoint.stem
    trajectory, states = found.trajectory, found.states
    drawn = {
        "tracing": (
            figures.tracing(
                image[:SHOWN], mask[:SHOWN], {f"{t} steps": trajectory.arrival(t) for t in (n, last)}, steps=n
            ),
            "The first images of the validation split. Colour: the step from which on a pixel stays marked; "
            f"yellow also stands for any step after {n}.",
        ),
        "filmstrip": (
            figures.filmstrip(image[:3], trajectory.probability[:, :3], figures.steps_to_show(n, last)),
            "What the model believes after some of its steps, from 0 (black) to 1.",
        ),
        "f1": (
            figures.over_steps({name: trajectory.f1}, trained=n, label="F1"),
            f"F1 over all pixels of {len(image)} images, read out after each step.",
        ),
        "residual": (
            figures.over_steps({name: trajectory.residual}, trained=n, label="relative residual", log=True),
            RESIDUAL,
        ),
    }
    if states is not None:
        drawn["state_space"] = (
            figures.state_space(states.coordinates, states.explained, trained=n),
            f"States of {states.coordinates.shape[1]} images at every step along the two axes on which they vary most.",
        )
    if len(found.radius):
        drawn["spectral_radius"] = (
            figures.radii({name: found.radius}),
            f"Spectral radius of the step's Jacobian after {last} steps, by power iteration on each of "
            f"{len(found.radius)} images; {float(found.converged.double().mean()):.0%} of the estimates converged.",
        )
    write_page(
        file,
        title=f"crbp: {name}",
        heading=f"{html.escape(name)}, step by step",
        lead=f"<p>{html.escape(str(checkpoint))}, {len(image)} images of <code>{html.escape(task)}</code>.</p>",
        table=[("", ""), *_rows(found)],
        figures=drawn,
        notes={},
    )
