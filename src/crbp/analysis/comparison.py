"""`crbp compare`: several trained models on the same images, side by side, as one page."""

from __future__ import annotations

import argparse
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from crbp._checkpoint import add_checkpoints, named_file, not_taken, trusted
from crbp._command import Parser, reserve
from crbp._files import write_whole
from crbp.analysis import figures
from crbp.analysis.animation import scrubber, tracing_frames, tracing_gif
from crbp.analysis.inputs import (
    Images,
    add_images,
    check_images,
    evidential,
    images,
    images_of,
    load,
    parameters,
    task_named,
    trained_on,
    unfused,
)
from crbp.analysis.measured import PENALISED, Memory, penalty_of, plain, training_memory, write_numbers
from crbp.analysis.page import PENALTY, RESIDUAL, write_page
from crbp.analysis.trajectory import Trajectory, follow, late_radius, penalty_curve
from crbp.errors import CrbpError
from crbp.models import PathfinderNet
from crbp.tasks import Origin
from crbp.tasks.penalties import Penalty

SHOWN = 4  # images in the animation


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One of the models.

    Attributes:
        file: of its weights.
        net: itself.
        origin: where it came from.
        task: that it was trained on; empty where that is not known.
        penalty: that it was trained with.
    """

    file: Path
    net: PathfinderNet
    origin: Origin
    task: str
    penalty: Penalty | None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of one of them; see `crbp.analysis.measured.Analysis`."""

    trained: int
    trajectory: Trajectory
    radius: Tensor
    penalty: Tensor
    memory: Memory
    parameters: int

    def numbers(self) -> dict[str, Any]:
        """All of it that is a number, None for what is not finite; 4N is four times this model's own N."""
        n, late = self.trained, 4 * self.trained
        f1, residual, memory = self.trajectory.f1, self.trajectory.residual, self.memory
        found = {
            "parameters": self.parameters,
            "gradient": memory.gradient,
            "trained_steps": n,
            "f1_at_n": float(f1[n - 1]),
            "f1_at_4n": float(f1[late - 1]),
            "residual_at_n": float(residual[n - 1]),
            "residual_at_4n": float(residual[late - 1]),
            "penalty_at_n": float(self.penalty[n - 1]),
            "penalty_at_4n": float(self.penalty[late - 1]),
            "median_radius": float(self.radius.median()),
            "stable_share": float((self.radius < 1).double().mean()),
            "memory_bytes_at_n": memory.own[memory.steps.index(n)],
            "memory_bytes_at_4n": memory.own[memory.steps.index(late)],
            "f1": f1.tolist(),
            "residual": residual.tolist(),
            "penalty": self.penalty.tolist(),
            "spectral_radius": self.radius.tolist(),
        }
        return {name: plain(value) for name, value in found.items()}


def main(arguments: list[str]) -> None:
    """Run the command.

    Raises:
        CrbpError: if the options are wrong, a checkpoint or the images cannot be had, or the models are of images
            of different sizes.
    """
    options = parser().parse_args(arguments)
    check_images(options)
    folder, console, trust = Path(options.out), Console(), trusted(options)
    entries = _entries(options, trust)
    reserve(folder, [folder / "report.html", folder / "comparison.json"])
    with console.status("Making the images …"):
        first = next(iter(entries.values()))
        seen = images(options, first.file, first.origin, trust=trust)
        if options.preset is None:
            _check_sizes(entries, seen, trust)
    last = 4 * max(entry.net.evolve.steps for entry in entries.values())
    found = {}
    for name, entry in entries.items():
        with console.status(f"Following {escape(name)} …"), torch.inference_mode(False):
            found[name] = _measure(entry, seen, last)
    numbers = {name: {"checkpoint": str(entries[name].file), "task": entries[name].task, **found[name].numbers()}
               for name in entries}  # fmt: skip
    shared = {"task": seen.task, "seed": seen.seed, "images": len(seen.image), "steps": last}
    _write(folder / "report.html", found, entries, seen)
    write_numbers(folder / "comparison.json", {**shared, "models": numbers})  # last: where it is, the page is there too
    _tell(console, found, entries, seen)
    console.print(f"Open {folder / 'report.html'} to see it.", soft_wrap=True, markup=False)


def parser() -> argparse.ArgumentParser:
    """The command's parser."""
    made = Parser(
        prog="crbp compare",
        description="Run several trained models on the same images, each to four times its steps; write a page.",
        allow_abbrev=False,
    )
    add_checkpoints(made)
    made.add_argument("--out", default="comparison", metavar="DIR", help="folder of the page (default: comparison)")
    add_images(made, default="what the first was trained on")
    return made


def _entries(options: argparse.Namespace, trust: Sequence[str]) -> dict[str, Entry]:
    """The models by name, each name once."""
    if len(options.checkpoint) < 2:
        raise CrbpError(f"at least 2 networks are compared, not {len(options.checkpoint)}; crbp analyze looks at one")
    entries: dict[str, Entry] = {}
    for named in options.checkpoint:
        given, file = named_file(named)
        net, origin = load(file, trust=trust)
        name = not_taken(given or origin.name or file.stem, entries)
        penalty = penalty_of(file, origin, trust=trust)
        entries[name] = Entry(file=file, net=net, origin=origin, task=task_named(origin), penalty=penalty)
    return entries


def _check_sizes(entries: dict[str, Entry], seen: Images, trust: Sequence[str]) -> None:
    """See that the images of the first model's task are of the size that the others were trained on."""
    first = next(iter(entries))
    size = tuple(seen.image.shape[-2:])
    for name, entry in entries.items():
        if not entry.task or (entry.task == seen.task and name == first):
            continue
        source, seed = trained_on(entry.file, entry.origin, trust=trust)
        other = tuple(images_of(source, 1, seed=seed).image.shape[-2:])
        if other != size:
            raise CrbpError(
                f"{first} was trained on images of {size[0]}×{size[1]} ({seen.task}) and {name} of "
                f"{other[0]}×{other[1]} ({entry.task}); choose the images of one task with --preset"
            )


def _measure(entry: Entry, seen: Images, last: int) -> Measured:
    net, n = unfused(entry.net), entry.net.evolve.steps
    return Measured(
        trained=n,
        trajectory=follow(
            net,
            seen.image,
            seen.mask,
            steps=last,
            shown=min(SHOWN, len(seen.image)),
            evidential=evidential(entry.origin),
        ),
        radius=late_radius(net, seen.image[:64], steps=4 * n)[0],
        penalty=penalty_curve(net, seen.image[:PENALISED], steps=last),
        memory=training_memory(net, seen.image[:1], steps=(n, 4 * n), penalty=entry.penalty),
        parameters=parameters(net),
    )


def _rows(found: dict[str, Measured], entries: dict[str, Entry]) -> list[list[str]]:
    """The table: names first, then a row for each measure."""
    numbers = {name: each.numbers() for name, each in found.items()}
    measures = [
        ("N, steps trained for", "trained_steps", "{}"),
        ("gradient", "gradient", "{}"),
        ("parameters", "parameters", "{:,}"),
        ("F1 at N", "f1_at_n", "{:.3f}"),
        ("F1 at 4N", "f1_at_4n", "{:.3f}"),
        ("relative residual at N", "residual_at_n", "{:.1e}"),
        ("relative residual at 4N", "residual_at_4n", "{:.1e}"),
        ("Lipschitz coefficient penalty at 4N", "penalty_at_4n", "{:.1e}"),
        ("median spectral radius at 4N", "median_radius", "{:.3f}"),
        ("images of spectral radius below 1 at 4N", "stable_share", "{:.0%}"),
    ]
    rows = [["", *found], ["trained on", *(entry.task or "not known" for entry in entries.values())]]
    for label, key, form in measures:
        values = [numbers[name][key] for name in found]
        rows.append([label, *("not finite" if value is None else form.format(value) for value in values)])
    for when in ("n", "4n"):
        kept = [f"{numbers[name][f'memory_bytes_at_{when}'] / 2**20:.1f}" for name in found]
        rows.append([f"MiB kept for one image, {when.upper()} steps, not fused", *kept])
    return rows


def _tell(console: Console, found: dict[str, Measured], entries: dict[str, Entry], seen: Images) -> None:
    head, *rows = _rows(found, entries)
    table = Table("", *map(escape, head[1:]), title=escape(_same(seen)), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table, highlight=False)


def _same(seen: Images) -> str:
    return f"the same {len(seen.image)} images of {seen.task} (validation split, seed {seen.seed}) for all"


def _write(file: Path, found: dict[str, Measured], entries: dict[str, Entry], seen: Images) -> None:
    trained = {name: each.trained for name, each in found.items()}
    frames = {
        name: tracing_frames(seen.image[:SHOWN], seen.mask[:SHOWN], each.trajectory.probability, columns=2)
        for name, each in found.items()
    }
    gif = tracing_gif(frames, trained=trained)
    write_whole(file.with_name("tracing.gif"), gif)
    radii = {name: each.radius for name, each in found.items() if bool(each.radius.isfinite().any())}
    dot = "The dot is at the N that each was trained for."
    drawn = {
        "f1": (
            figures.over_steps({k: v.trajectory.f1 for k, v in found.items()}, trained=trained, label="F1"),
            f"F1 over all pixels, read out after each step. {dot}",
        ),
        "residual": (
            figures.over_steps(
                {k: v.trajectory.residual for k, v in found.items()},
                trained=trained, label="relative residual", log=True,
            ),
            f"{RESIDUAL} {dot}",
        ),
        "penalty": (
            figures.over_steps(
                {k: v.penalty for k, v in found.items()},
                trained=trained, label="Lipschitz coefficient penalty", linear_below=figures.NEGLIGIBLE,
            ),
            f"{PENALTY} Of {min(PENALISED, len(seen.image))} images.",
        ),
    }  # fmt: skip
    if radii:
        told = "Spectral radius of the step's Jacobian at each one's own 4N; below 1, small perturbations die out."
        drawn["spectral_radius"] = (figures.radii(radii), told)
    write_page(
        file,
        title="crbp: " + ", ".join(found),
        heading=html.escape(", ".join(found)),
        lead=f"<p>All on {html.escape(_same(seen))}.</p>",
        table=[[html.escape(cell) for cell in row] for row in _rows(found, entries)],
        first=scrubber(frames, trained=trained, gif=gif),
        figures=drawn,
        notes={},
    )
