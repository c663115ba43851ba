"""The official tool beside ours: cases as files for it, and what it says of them."""

from __future__ import annotations

import contextlib
import copy
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from panopticapi.evaluation import pq_compute_single_core
from panopticapi.utils import id2rgb
from PIL import Image

Segments = list[dict[str, Any]]


class Case(NamedTuple):
    """One image, in the order in which `PanopticQuality.update` takes it."""

    pred_map: NDArray[Any]
    pred_segments: Segments
    target_map: NDArray[Any]
    target_segments: Segments


def categories(things: int = 4, stuff: int = 3) -> Segments:
    """Ids with gaps, things and stuff mixed."""
    kinds = [1] * things + [0] * stuff
    ids = [3 * place + 1 for place in range(len(kinds))]
    order = np.random.default_rng(0).permutation(len(kinds))
    return [{"id": ids[place], "name": f"c{ids[place]}", "isthing": kinds[place]} for place in order]


def evaluate(cases: list[Case], kinds: Segments, folder: Path) -> dict[str, Any]:
    """What the official tool says of PNG files of these cases, in the form of `PanopticQuality.compute`."""
    pairs = []
    for number, case in enumerate(cases):
        annotations = []
        for name, pixels, segments in (("gt", *case[2:]), ("pred", *case[:2])):
            (folder / name).mkdir(exist_ok=True)
            Image.fromarray(id2rgb(pixels.astype(np.int64))).save(folder / name / f"{number}.png")
            # The tool writes into what it is given.
            annotations.append(
                {"image_id": number, "file_name": f"{number}.png", "segments_info": copy.deepcopy(segments)}
            )
        pairs.append(tuple(annotations))
    with contextlib.redirect_stdout(io.StringIO()):
        counted = pq_compute_single_core(
            0, pairs, str(folder / "gt"), str(folder / "pred"), {kind["id"]: kind for kind in kinds}
        )
    return averages(counted, kinds)


def averages(counted: Any, kinds: Segments) -> dict[str, Any]:
    by_id = {kind["id"]: kind for kind in kinds}
    found: dict[str, Any] = {}
    for suffix, isthing in (("", None), ("_things", True), ("_stuff", False)):
        try:
            average, table = counted.pq_average(by_id, isthing=isthing)
        except ZeroDivisionError:  # no class of the kind occurs
            average = dict.fromkeys(("pq", "sq", "rq", "n"), 0)
        else:
            if isthing is None:
                found["per_class"] = table
        found |= {name + suffix: value for name, value in average.items()}
    for number, row in found.get("per_class", {}).items():
        one = counted.pq_per_cat[number]
        row |= {"tp": one.tp, "fp": one.fp, "fn": one.fn, "iou": float(one.iou)}
    return found


def random_case(rng: np.random.Generator, kinds: Segments, *, size: int = 40) -> Case:
    """A target of overlapping rectangles with void and crowds, and a prediction that is about the same.

    Void covers up to all of the image, a class may have several crowds, and the prediction may be empty.
    """
    height, width = rng.integers(size // 2, size + 1, 2)
    target = np.zeros((height, width), np.int64)
    names = {}
    for number in rng.choice(2**24 - 1, rng.integers(0, 9), replace=False) + 1:
        _rectangle(rng, target)[...] = number
        names[number] = {"category_id": _class(rng, kinds), "iscrowd": int(rng.random() < 0.3)}
    _rectangle(rng, target)[...] = 0
    pred = np.where(rng.random(target.shape) < rng.choice([0, 0, 0.05, 0.4]), 0, target)
    pred = np.roll(pred, rng.integers(-2, 3, 2), axis=(0, 1))
    kept = {number: name["category_id"] for number, name in names.items()}
    for number in rng.choice(2**24 - 1, rng.integers(0, 4), replace=False) + 1:
        _rectangle(rng, pred)[...] = number
        kept[number] = _class(rng, kinds)
    for number in list(kept):
        if rng.random() < 0.1:
            kept[number] = _class(rng, kinds)
        if rng.random() < 0.1:
            pred[pred == number] = 0
    if rng.random() < 0.05:
        pred[...] = 0
    target_segments = [
        {"id": int(number), **name, "area": int((target == number).sum())}
        for number, name in names.items()
        if (target == number).any()
    ]
    pred_segments = [
        {"id": int(number), "category_id": kind} for number, kind in kept.items() if (pred == number).any()
    ]
    return Case(pred, pred_segments, target, target_segments)


def _rectangle(rng: np.random.Generator, pixels: NDArray[Any]) -> NDArray[Any]:
    (top, bottom), (left, right) = (np.sort(rng.integers(0, side + 1, 2)) for side in pixels.shape)
    return pixels[top:bottom, left:right]


def _class(rng: np.random.Generator, kinds: Segments) -> int:
    return int(kinds[min(int(rng.exponential(1.5)), len(kinds) - 1)]["id"])
