"""Rows of contour tracing that have been trained, and the figures of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pathfinder import TASKS

METHODS = {
    "crbp": "C-RBP", "rbp": "RBP", "bptt": "BPTT", "cbptt": "C-BPTT", "truncated": "truncated BPTT",
    "allsteps": "BPTT, loss at all steps", "feedforward": "feed-forward", "checkpointed": "checkpointed BPTT",
}  # fmt: skip
COLOURS = dict(
    zip(
        METHODS,
        ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#CC79A7", "#999999", "#000000", "#009E73"),
        strict=True,
    )
)
LATE = {
    "settled": "cured, growth bounded by N", "long": "cured, growth bounded by .95",
    "fixed": "cured, number of steps fixed", "plain": "penalty alone", "clipped": "penalty alone, clipped",
    "falling": "penalty alone, falling rate", "published": "as published",
    "published_5x": "as published, 72 000 images",
}  # fmt: skip
Line = dict[str, Any]
Curve = list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is known of a run that is finished.

    Attributes:
        line: of the table.
        f1: after every step up to 4N; empty of a feed-forward net.
        curves: optimiser step and value of what was validated in training, by tag.
    """

    line: Line
    f1: list[float]
    curves: dict[str, Curve]


def figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """Accuracy by task, F1 beyond the steps trained for, and what happens in training."""
    plain = [row for row in rows if not row.line["variant"]]
    recurrent = [row for row in plain if row.line["cell"]]
    drawn = {"accuracy": accuracy(row.line for row in plain)} if plain else {}
    if any(row.line["variant"] in LATE for row in rows):
        drawn["late"] = late(rows)
    return drawn | ({"beyond": beyond(recurrent), "training": training(recurrent)} if recurrent else {})


def accuracy(lines: Iterable[Line]) -> Figure:
    """F1 at N by task, a line for each cell and method, a dot for each seed."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for line in lines:
        found.setdefault((line["cell"], line["method"]), {}).setdefault(line["task"], []).append(line["f1_at_n"])
    for (cell, method), by_task in found.items():
        if not (places := [place for place, task in enumerate(TASKS) if task in by_task]):
            continue
        name = f"ConvLSTM, {METHODS[method]}" if cell == "convlstm" else METHODS[method]
        style = {"color": COLOURS[method], "linestyle": "--" if cell == "convlstm" else "-"}
        axes.plot(places, [float(np.mean(by_task[TASKS[place]])) for place in places], label=name, **style)
        for place in places:
            values = by_task[TASKS[place]]
            axes.plot([place] * len(values), values, "o", color=COLOURS[method], markersize=4)
    axes.set_xticks(range(len(TASKS)), TASKS)
    axes.set(xlabel="task", ylabel="F1 at the steps trained for")
    axes.legend(frameon=False, fontsize=7)
    return figure


def beyond(rows: Sequence[Row]) -> Figure:
    """F1 after every step up to 4N, a panel for each task, an hGRU's curve for each method."""
    tasks = [task for task in TASKS if any(row.line["task"] == task for row in rows)]
    figure, panels = _panels(tasks or ["no task"])
    for row in rows:
        if row.line["task"] in panels and row.line["cell"] == "hgru" and row.line["seed"] == 0:
            axes = panels[row.line["task"]]
            axes.plot(
                np.arange(1, len(row.f1) + 1) / row.line["steps"],
                row.f1,
                color=COLOURS[row.line["method"]],
                linewidth=1,
            )
            axes.axvspan(0, 1, color="0.96", zorder=0)
    next(iter(panels.values())).set_ylabel("F1")
    for axes in panels.values():
        axes.set_xlabel("steps / steps trained for")
    shown = {row.line["method"] for row in rows}
    _legend(figure, {METHODS[method]: COLOURS[method] for method in METHODS if method in shown})
    return figure


def training(rows: Sequence[Row]) -> Figure:
    """F1, penalty and spectral radius through training, of the hGRU's rows on the middle task."""
    shown = [(row, COLOURS[row.line["method"]]) for row in rows if of_middle_task(row)]
    figure = _through_training(shown)
    _legend(figure, {METHODS[row.line["method"]]: colour for row, colour in shown})
    return figure


def late(rows: Sequence[Row]) -> Figure:
    """The same for C-RBP trained on for long, with what keeps it stable and without, every seed."""
    colours = dict(
        zip(LATE, ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#F0E442", "#999999", "#D55E00", "#CC79A7"), strict=True)
    )
    shown = [(row, colours[row.line["variant"]]) for row in rows if row.line["variant"] in LATE]
    figure = _through_training(shown)
    found = {row.line["variant"] for row, _ in shown}
    _legend(figure, {LATE[name]: colours[name] for name in LATE if name in found})
    return figure


def of_middle_task(row: Row) -> bool:
    """Whether a row is one of those that the figures of training show."""
    middle = TASKS[len(TASKS) // 2]
    line = row.line
    return (line["task"], line["cell"], line["variant"], line["seed"]) == (middle, "hgru", "", 0)


def _through_training(shown: Iterable[tuple[Row, str]]) -> Figure:
    names = {"val/f1": "F1", "val/penalty": "penalty", "val/spectral_radius": "spectral radius"}
    figure, panels = _panels(list(names))
    for row, colour in shown:
        for tag, axes in panels.items():
            if found := row.curves.get(tag):
                steps, values = np.array(found).T
                axes.plot((steps + 1) * row.line["batch"], values, color=colour, linewidth=1)
    for tag, axes in panels.items():
        axes.set(title=names[tag], xlabel="images seen")
    panels["val/penalty"].set_yscale("symlog", linthresh=1e-9)
    panels["val/spectral_radius"].axhline(1, color="0.7", zorder=0, linewidth=0.8)
    return figure


def _panels(names: Iterable[str]) -> tuple[Figure, dict[str, Axes]]:
    names = list(names)
    figure = Figure(figsize=(3.1 * len(names), 3.3), layout="constrained")
    panels = dict(zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True))
    for name, axes in panels.items():
        axes.set_title(name)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _legend(figure: Figure, colours: Mapping[str, str]) -> None:
    if not colours:
        return
    handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False, fontsize=8)
