"""`crbp analyze`: what a trained model does step by step, far beyond the steps it was trained for, as one page."""

from __future__ import annotations

import argparse
import html
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console

from crbp._checkpoint import add_checkpoint, checkpoint_file, trusted
from crbp._command import Parser, reserve
from crbp._files import write_whole
from crbp.analysis import figures
from crbp.analysis.animation import scrubber, tracing_frames, tracing_gif
from crbp.analysis.inputs import Images, add_images, check_images, evidential, images, load
from crbp.analysis.measured import (
    PENALISED,
    SHOWN,
    Analysis,
    analyse,
    penalty_of,
    training_log,
    write_numbers,
)
from crbp.analysis.page import MEMORY, PENALTY, RESIDUAL, write_page
from crbp.errors import CrbpError


def main(arguments: list[str]) -> None:
    """Run the command.

    Raises:
        CrbpError: if the options are wrong, the checkpoint or its images cannot be had, or it is of no recurrent model.
    """
    options = parser().parse_args(arguments)
    check_images(options)
    folder, console, trust = Path(options.out), Console(), trusted(options)
    file = checkpoint_file(options.checkpoint)
    net, origin = load(file, trust=trust)
    if options.steps is not None and options.steps <= net.evolve.steps:
        raise CrbpError(f"--steps must be above the {net.evolve.steps} trained for, not {options.steps}")
    penalty = penalty_of(file, origin, trust=trust)
    reserve(folder, [folder / "report.html", folder / "analysis.json"])
    with console.status("Making the images …"):
        seen = images(options, file, origin, trust=trust)
    with console.status("Following the model step by step …"), torch.inference_mode(False):
        found = analyse(
            net, seen.image, seen.mask,
            steps=options.steps, evidential=evidential(origin), penalty=penalty, training=training_log(file),
        )  # fmt: skip
    numbers = {"checkpoint": str(file), "images": len(seen.image), "task": seen.task, **found.numbers()}
    _write(folder / "report.html", file, origin.name or file.stem, found, seen)
    write_numbers(folder / "analysis.json", numbers)  # last: where it is, the page is there too
    for name, value in _rows(found):
        console.print(f"{name:<58}{value}", highlight=False, markup=False)
    console.print(f"Open {folder / 'report.html'} to see it.", soft_wrap=True, markup=False)


def parser() -> argparse.ArgumentParser:
    """The command's parser."""
    made = Parser(
        prog="crbp analyze",
        description="Follow a trained model far beyond the steps it was trained for; write a page of figures.",
        allow_abbrev=False,
    )
    add_checkpoint(made)
    made.add_argument("--out", default="analysis", metavar="DIR", help="folder of the report (default: analysis)")
    made.add_argument("--steps", type=int, metavar="T", help="how far to run it (default: 4 times the steps trained)")
    add_images(made)
    return made


def _rows(found: Analysis) -> list[tuple[str, str]]:
    n, last, numbers = found.trained, len(found.trajectory.f1), found.numbers()
    rows = [
        ("parameters", f"{found.parameters:,}"),
        (f"F1 after the {n} steps trained for", f"{numbers['f1_at_n']:.3f}"),
        (f"F1 after {last} steps", f"{numbers['f1_at_end']:.3f}"),
        ("F1 at its best", f"{numbers['f1_best']:.3f}, after {numbers['f1_best_at']} steps"),
        (f"relative residual after {n} steps", f"{found.trajectory.residual[n - 1]:.1e}"),
        (f"relative residual after {last} steps", f"{found.trajectory.residual[-1]:.1e}"),
        (f"Lipschitz coefficient penalty after {n} and {last} steps", _two(found)),
    ]
    share = f"{numbers['stable_share']:.0%}"
    rows.append((f"images of spectral radius below 1 after {last} steps", share))
    rows += _memory_rows(found)
    if found.states is None:
        return [*rows, ("states", "not finite")]
    statistic, p_value = (
        " and ".join(f"{value:.2g}" for value in tensor.tolist())
        for tensor in (found.states.statistic, found.states.p_value)
    )
    return [
        *rows,
        (f"median distance from step {n} to step {last}, of the state", f"{found.states.moved.median():.2g}"),
        (f"Kolmogorov-Smirnov, axes 1 and 2, {n} to {last}", f"{statistic} (p = {p_value})"),
    ]


def _two(found: Analysis) -> str:
    return f"{found.penalty[found.trained - 1]:.1e}, {found.penalty[-1]:.1e}"


def _memory_rows(found: Analysis) -> list[tuple[str, str]]:
    memory = found.memory
    rows = []
    for steps in (found.trained, 4 * found.trained):
        own, bptt = (each[memory.steps.index(steps)] / 2**20 for each in (memory.own, memory.bptt))
        rows.append((f"MiB kept for one image, {steps} steps, not fused", f"{own:.1f} (BPTT {bptt:.1f})"))
    return rows


def _write(file: Path, checkpoint: Path, name: str, found: Analysis, seen: Images) -> None:
    shown = tracing_frames(seen.image[:SHOWN], seen.mask[:SHOWN], found.trajectory.probability)
    frames, trained = {name: shown}, {name: found.trained}
    gif = tracing_gif(frames, trained=trained)
    write_whole(file.with_name("tracing.gif"), gif)
    write_page(
        file,
        title=f"crbp: {name}",
        heading=f"{html.escape(name)}, step by step",
        lead=f"<p>{html.escape(f'{checkpoint}, {len(seen.image)} images of {seen.task}')}.</p>",
        table=[("", ""), *_rows(found)],
        first=scrubber(frames, trained=trained, gif=gif),
        figures={**_of_images(found, seen), **_of_time(name, found, seen), **_of_training(found)},
        notes={},
    )


def _of_images(found: Analysis, seen: Images) -> dict[str, tuple[Figure, str]]:
    n, last, trajectory = found.trained, len(found.trajectory.f1), found.trajectory
    arrivals = {f"{t} steps": trajectory.arrival(t) for t in (n, last)}
    return {
        "tracing": (
            figures.tracing(seen.image[:SHOWN], seen.mask[:SHOWN], arrivals, steps=n),
            "The first images of the validation split. Colour: the step from which on a pixel stays marked; "
            f"yellow also stands for any step after {n}.",
        ),
        "filmstrip": (
            figures.filmstrip(seen.image[:3], trajectory.probability[:, :3], figures.steps_to_show(n, last)),
            "What the model believes after some of its steps, from 0 (black) to 1.",
        ),
    }


def _of_time(name: str, found: Analysis, seen: Images) -> dict[str, tuple[Figure, str]]:
    n, last, states = found.trained, len(found.trajectory.f1), found.states
    drawn = {
        "f1": (
            figures.over_steps({name: found.trajectory.f1}, trained=n, label="F1"),
            f"F1 over all pixels of {len(seen.image)} images, read out after each step.",
        ),
        "residual": (
            figures.over_steps({name: found.trajectory.residual}, trained=n, label="relative residual", log=True),
            RESIDUAL,
        ),
        "penalty": (
            figures.over_steps(
                {name: found.penalty}, trained=n, label="Lipschitz coefficient penalty", linear_below=figures.NEGLIGIBLE
            ),
            f"{PENALTY} Of {min(PENALISED, len(seen.image))} images.",
        ),
    }
    if states is not None:
        drawn["state_space"] = (
            figures.state_space(states.coordinates, states.explained, trained=n),
            f"States of {states.coordinates.shape[1]} images at every step along the two axes on which they vary most.",
        )
    if bool(found.radius.isfinite().any()):
        drawn["spectral_radius"] = (
            figures.radii({name: found.radius}),
            f"Spectral radius of the step's Jacobian after {last} steps, by power iteration on each of "
            f"{len(found.radius)} images; {float(found.converged.double().mean()):.0%} of the estimates converged.",
        )
    return drawn


def _of_training(found: Analysis) -> dict[str, tuple[Figure, str]]:
    memory = found.memory
    curves = {memory.gradient: memory.own} | ({"BPTT": memory.bptt} if memory.gradient != "BPTT" else {})
    counted = f", {memory.penalty} counted" if memory.penalty else ""
    drawn = {"memory": (figures.memory(memory.steps, curves), f"{MEMORY}{counted}.")}
    if found.training:
        drawn["training"] = (figures.training(found.training), "What the log of the run has of penalty and residual.")
    return drawn
