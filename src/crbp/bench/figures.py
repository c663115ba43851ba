"""The figures of `crbp bench`, drawn from its numbers. Each function returns one; saving is the caller's."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from crbp.bench.measure import Numbers

# Okabe and Ito: told apart by colour-blind readers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MIB = 2**20


def memory(numbers: Numbers) -> Figure:
    """Saved activations and growth of the process against the number of steps."""
    figure, grid = _axes(2)
    for axes, key, label in zip(
        grid, ("saved_bytes", "peak_bytes"), ("saved activations (MiB)", "growth of the process (MiB)"), strict=True
    ):
        for (name, curve), colour in zip(numbers["methods"].items(), _COLOURS, strict=False):
            rows = curve["rows"]
            axes.plot(
                [row["steps"] for row in rows], [row[key] / _MIB for row in rows], "o-", label=name, color=colour, ms=4
            )
        axes.set(xlabel="steps of recurrence N", ylabel=label, xscale="log", yscale="log")
    grid[0].legend(frameon=False, fontsize=8)
    return figure


def solvers(numbers: Numbers) -> Figure:
    """Relative error of the gradient against vector-Jacobian products, for each network."""
    figure, grid = _axes(len(numbers["networks"]))
    for axes, (name, found) in zip(grid, numbers["networks"].items(), strict=True):
        for (solver, errors), colour in zip(found["relative_error"].items(), _COLOURS, strict=False):
            axes.plot(numbers["products"], errors, label=solver, color=colour, linewidth=2)
        title = f"{name.split('_')[0]}, spectral radius {found['spectral_radius']:.2f}"
        axes.set(xlabel="vector-Jacobian products", yscale="log", title=title)
    grid[0].set(ylabel="relative error of the gradient")
    grid[0].legend(frameon=False)
    return figure


def scaling(numbers: Numbers) -> Figure:
    """Seconds of a training step against batch, image side and channels."""
    names = {"batch": "images of a batch", "image": "image side (pixels)", "channels": "channels"}
    figure, grid = _axes(len(names))
    for axes, (axis, label) in zip(grid, names.items(), strict=True):
        part = numbers[axis]
        values = [row["value"] for row in part["rows"]]
        for code, colour in zip(("crbp", "textbook"), _COLOURS, strict=False):
            seconds = [row[code]["median"] for row in part["rows"]]
            line = f"{code}, exponent {part['exponents'][code]:.2f}"
            axes.plot(values, seconds, "o-", label=line, color=colour, ms=4)
        axes.set(xlabel=label, ylabel="seconds a training step", xscale="log", yscale="log")
        axes.set_xticks(values, [str(value) for value in values], minor=False)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend(frameon=False, fontsize=8)
    return figure


def time_to_f1(numbers: Numbers) -> Figure:
    """Validation F1 against seconds of training."""
    figure, (axes,) = _axes(1)
    for (code, found), colour in zip(numbers["codes"].items(), _COLOURS, strict=False):
        curve = found["curve"]
        axes.plot([p["seconds"] for p in curve], [p["f1"] for p in curve], "o-", label=code, color=colour, ms=4)
    axes.axhline(numbers["target"], color="0.5", linestyle=":")
    axes.set(xlabel="seconds of training, one core", ylabel="validation F1", ylim=(0, 1))
    axes.legend(frameon=False)
    return figure


DRAWN = {"memory": memory, "solvers": solvers, "scaling": scaling, "time_to_f1": time_to_f1}


def _axes(columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.2 * columns + 1.0, 3.4), layout="constrained")
    grid: list[Axes] = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid
