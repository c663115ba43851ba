"""Figures of a run over time. Each function draws one and returns it; saving is the caller's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

_PATHS = 12  # images whose way through the state space is drawn
NEGLIGIBLE = 1e-6  # of a penalty: below it, an axis is linear
# Okabe and Ito: told apart by colour-blind readers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def tracing(images: Tensor, masks: Tensor, arrivals: Mapping[str, Tensor], *, steps: int) -> Figure:
    """One row an image: input, target, and for each model the traced pixels coloured by the step that reached them.

    Args:
        images: ``(B, 1, H, W)`` in [0, 1].
        masks: ``(B, H, W)`` of bool.
        arrivals: model name → ``(B, H, W)``, as `crbp.analysis.arrival_steps` gives them.
        steps: the last step of the colour scale.
    """
    rows, columns = len(images), 2 + len(arrivals)
    figure = Figure(figsize=(1.75 * columns + 0.7, 1.75 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    shown = None
    for row in range(rows):
        picture = images[row, 0].numpy()
        grid[row, 0].imshow(picture, cmap="gray", vmin=0, vmax=1)
        grid[row, 1].imshow(masks[row].numpy(), cmap="gray")
        for column, arrival in enumerate(arrivals.values(), start=2):
            step = arrival[row].numpy()
            grid[row, column].imshow(0.45 * picture, cmap="gray", vmin=0, vmax=1)
            shown = grid[row, column].imshow(np.ma.masked_equal(step, 0), cmap="viridis", vmin=1, vmax=steps)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    for axes, title in zip(grid[0], ["input", "target", *arrivals], strict=True):
        axes.set_title(title, fontsize=9)
    if shown is not None:
        figure.colorbar(shown, ax=grid[:, 2:], label="reached at step", fraction=0.03)
    return figure


def steps_to_show(trained: int, last: int) -> list[int]:
    """Close together at first, when most happens, and the last."""
    steps = {1, 2, 3, *(round(trained * share) for share in (0.4, 0.6, 0.8, 1.0)), last}
    return sorted(step for step in steps if 0 < step <= last)


def filmstrip(images: Tensor, probability: Tensor, at: Sequence[int]) -> Figure:
    """One row an image: the input and the probability of the target after some of the steps.

    Args:
        images: ``(B, 1, H, W)`` in [0, 1].
        probability: ``(T, B, H, W)``, after step 1 … T.
        at: the steps to show, each in 1 … T.
    """
    rows, columns = len(images), 1 + len(at)
    figure = Figure(figsize=(1.45 * columns, 1.45 * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for row in range(rows):
        grid[row, 0].imshow(images[row, 0].numpy(), cmap="gray", vmin=0, vmax=1)
        for column, step in enumerate(at, start=1):
            grid[row, column].imshow(probability[step - 1, row].numpy(), cmap="magma", vmin=0, vmax=1)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    for axes, title in zip(grid[0], ["input", *(f"step {step}" for step in at)], strict=True):
        axes.set_title(title, fontsize=9)
    return figure


def over_steps(
    curves: Mapping[str, Tensor],
    *,
    trained: int | Mapping[str, int],
    label: str,
    level: tuple[str, float] | None = None,
    log: bool = False,
    linear_below: float | None = None,
) -> Figure:
    """Curves against the step, with the steps trained for shaded, or marked where each model has its own.

    Args:
        curves: model name → ``(T,)``.
        trained: the number of steps trained for, of all models or by name.
        label: of the vertical axis.
        level: name and height of a line to compare with.
        log: logarithmic vertical axis.
        linear_below: where a logarithmic axis becomes a linear one that has zero on it.
    """
    figure, axes = _axes()
    longest = max(len(curve) for curve in curves.values())
    if isinstance(trained, int):
        axes.axvspan(0, trained, color="0.93", zorder=0)
        axes.text(trained, 1.01, "trained up to here", transform=axes.get_xaxis_transform(), ha="right", fontsize=8)
    for (name, curve), style in zip(curves.items(), _styles(), strict=False):
        marked: dict[str, Any] = {} if isinstance(trained, int) else {"marker": "o", "markevery": [trained[name] - 1]}
        axes.plot(np.arange(1, len(curve) + 1), curve.numpy(), label=_plain(name), linewidth=2, **style, **marked)
    if level is not None:
        axes.axhline(level[1], color="0.5", linestyle=":", label=level[0])
    if linear_below is not None:
        axes.set_yscale("symlog", linthresh=linear_below)
    elif log:
        axes.set_yscale("log")
    axes.set(xlabel="step t", ylabel=label, xlim=(0, longest))
    axes.legend(frameon=False)
    return figure


def state_space(coordinates: Tensor, explained: Tensor, *, trained: int) -> Figure:
    """How often the states lie where, seen along their two principal axes: up to the steps trained for, and beyond.

    Args:
        coordinates: of every state, ``(T, B, 2)``.
        explained: share of the variance along each axis, ``(2,)``.
        trained: the number of steps trained for, below T.
    """
    figure = Figure(figsize=(8.4, 3.9), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    low, high = (getattr(coordinates.flatten(0, 1), name)(dim=0).values for name in ("min", "max"))
    room = 0.05 * (high - low).clamp_min(1e-6)
    extent = [(float(a), float(b)) for a, b in zip(low - room, high + room, strict=True)]
    paths = coordinates[:, :_PATHS].numpy()
    parts = {
        f"steps 1 to {trained}": coordinates[:trained],
        f"{trained + 1} to {len(coordinates)}": coordinates[trained:],
    }
    shown = None
    for axes, (title, part) in zip(panels, parts.items(), strict=True):
        x, y = part.flatten(0, 1).numpy().T
        weights = np.full(len(x), 1 / len(x))
        *_, shown = axes.hist2d(
            x, y, bins=48, range=extent, weights=weights, cmap="Blues", norm="log", vmin=1e-4, vmax=1
        )
        axes.plot(paths[..., 0], paths[..., 1], color=_COLOURS[1], linewidth=0.7)
        axes.plot(*paths[trained - 1].T, "o", color=_COLOURS[1], markersize=5, label=f"some images at step {trained}")
        axes.plot(*paths[-1].T, "x", color="black", markersize=6, label=f"the same at step {len(coordinates)}")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(f"axis 1 ({explained[0]:.0%} of the variance)")
    panels[0].set_ylabel(f"axis 2 ({explained[1]:.0%})")
    panels[0].legend(frameon=False, fontsize=8, loc="upper right")
    if shown is not None:
        figure.colorbar(shown, ax=panels, label="share of the states", fraction=0.03)
    return figure


def memory(steps: Sequence[int], curves: Mapping[str, Sequence[int]]) -> Figure:
    """Activation memory of a training step against the number of steps of recurrence."""
    figure, axes = _axes()
    for (name, found), style in zip(curves.items(), _styles(), strict=False):
        axes.plot(steps, np.asarray(found) / 2**20, marker="o", label=_plain(name), linewidth=2, markersize=4, **style)
    axes.set(xlabel="steps of recurrence N", ylabel="saved activations (MiB)", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def radii(found: Mapping[str, Tensor]) -> Figure:
    """Spectral radius of the step's Jacobian at the final state, image by image, in order of size."""
    figure, axes = _axes()
    for (name, values), style in zip(found.items(), _styles(), strict=False):
        ordered = values.sort().values.numpy()
        axes.plot(np.linspace(0, 100, len(ordered)), ordered, label=_plain(name), linewidth=2, **style)
    axes.axhline(1.0, color="0.5", linestyle=":", label="edge of stability")
    axes.set(xlabel="images (%)", ylabel="spectral radius", xlim=(0, 100))
    axes.legend(frameon=False)
    return figure


def training(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """What a run has logged, against its optimiser steps.

    Args:
        curves: name → (optimiser step, value) in order.
    """
    figure, axes = _axes()
    for (name, curve), style in zip(curves.items(), _styles(), strict=False):
        at, values = np.asarray(curve, float).reshape(-1, 2).T
        axes.plot(at, values, label=_plain(name), linewidth=2, **style)
    axes.set(xlabel="optimiser step", ylabel="logged value")
    axes.set_yscale("symlog", linthresh=NEGLIGIBLE)
    axes.legend(frameon=False)
    return figure


def _styles() -> Iterator[dict[str, Any]]:
    """A colour and a dash for each curve, none the same."""
    for dash in ("-", "--", ":", "-."):
        for colour in _COLOURS:
            yield {"color": colour, "linestyle": dash}


def _plain(name: str) -> str:
    """A name as matplotlib writes it: no formula, and not left out for its first letter."""
    return "\u200b" + name.replace("$", r"\$") if name.startswith("_") else name.replace("$", r"\$")


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
