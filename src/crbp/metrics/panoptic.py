"""Panoptic quality by the rules of the official tool, from maps in memory."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

_Array = NDArray[Any]


class ClassCounts(NamedTuple):
    """What one image adds to each class, in the order of the categories: the sum of IoUs, and how many segments."""

    iou: _Array
    tp: _Array
    fp: _Array
    fn: _Array


class PanopticQuality(Metric):
    """Panoptic quality (PQ), its two factors (SQ, RQ) and a table per class, exactly as the official tool has them.

    A predicted and a true segment of one class match where their IoU exceeds ½; at most one pair of each can. With TP
    the matched pairs, FP the predicted and FN the true segments left over, and ``s`` the sum of the IoUs of the pairs,
    each over all images, a class has ``SQ = s / TP``, ``RQ = TP / (TP + FP/2 + FN/2)`` and ``PQ = SQ · RQ = s / (TP +
    FP/2 + FN/2)``. The averages are over the classes with any of TP, FP and FN. Pixels that are void (id 0) in the
    target do not count towards a union; true crowd segments are neither matched nor missed; a predicted segment left
    over is no FP where more than half of it is void or the crowd of its class in the target.

    Areas are counted from the maps. For true segments the official tool takes the ``area`` of the JSON instead, so the
    two agree where that is the number of pixels, as it is in COCO.

    Everything is a fraction in [0, 1]. The state, four numbers a class, is on the metric's device and is summed over
    processes; the maps may be on any device.

    Args:
        categories: those of the COCO JSON: mappings with ``id`` and ``isthing`` (0 or 1); other keys are left alone.

    Raises:
        ValueError: there is no category, one has no ``id`` or no ``isthing``, or two have one id.

    Source: Kirillov et al., *Panoptic Segmentation*, CVPR 2019; the rules in full are those of ``panopticapi``.
    """

    iou: Tensor
    tp: Tensor
    fp: Tensor
    fn: Tensor
    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    def __init__(self, categories: Iterable[Mapping[str, Any]]) -> None:
        super().__init__()
        self._things = thing_flags(categories)
        classes = len(self._things)
        # In float64, as the official tool counts; torchmetrics leaves it alone when a module is cast to half precision.
        self.add_state("iou", torch.zeros(classes, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("tp", "fp", "fn"):
            self.add_state(name, torch.zeros(classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        pred_map: Tensor | _Array,
        pred_segments: Sequence[Mapping[str, Any]],
        target_map: Tensor | _Array,
        target_segments: Sequence[Mapping[str, Any]],
    ) -> None:
        """Count one image.

        Args:
            pred_map: ids of segments ``(H, W)``, of any integer type; 0 is void.
            pred_segments: COCO ``segments_info``: mappings with ``id`` and ``category_id``.
            target_map: like ``pred_map``, and of its shape.
            target_segments: like ``pred_segments``, and ``iscrowd`` (0 or 1) where it is 1. Areas are not read but
                counted from the map.

        Raises:
            ValueError: a map is not ``(H, W)`` of integers, the two differ in shape, a category is unknown, an id of a
                map is not among its segments or the other way round, an id is given twice, or a segment has id 0 or
                another ``iscrowd`` than 0 and 1.
        """
        counts = count_segments(self._things, pred_map, pred_segments, target_map, target_segments)
        for name, value in counts._asdict().items():
            state = getattr(self, name)
            setattr(self, name, state + torch.from_numpy(value).to(state.device))

    def compute(self) -> dict[str, Any]:
        """The averages, and the table of classes, of the images since the last reset.

        Returns:
            ``pq``, ``sq``, ``rq`` and ``n``, the number of classes averaged; the same with ``_things`` and ``_stuff``
            for the classes of either kind; and ``per_class``: category id → ``pq``, ``sq``, ``rq``, ``tp``, ``fp``,
            ``fn`` and ``iou``, the sum over the matched pairs. Where no class of a kind occurs, its ``n`` is 0 and so
            are its averages; likewise a class that does not occur.
        """
        return quality(
            self._things, ClassCounts(*(state.cpu().numpy() for state in (self.iou, self.tp, self.fp, self.fn)))
        )


def thing_flags(categories: Iterable[Mapping[str, Any]]) -> dict[int, bool]:
    """Category id → whether it is a thing, in the order given, for the categories of a COCO JSON."""
    things: dict[int, bool] = {}
    for category in categories:
        number = _integer(category, "id", "a category")
        isthing = _integer(category, "isthing", f"category {number}")
        if isthing not in (0, 1):
            raise ValueError(f"category {number} has isthing {isthing}; give 1 for things and 0 for stuff")
        if number in things:
            raise ValueError(f"the categories have the id {number} twice; give each its own")
        things[number] = bool(isthing)
    if not things:
        raise ValueError("there are no categories; give those of the data set's JSON")
    return things


def count_segments(
    things: Mapping[int, bool],
    pred_map: Tensor | _Array,
    pred_segments: Sequence[Mapping[str, Any]],
    target_map: Tensor | _Array,
    target_segments: Sequence[Mapping[str, Any]],
) -> ClassCounts:
    """What `PanopticQuality.update` adds for one image; ``things`` is what `thing_flags` returns."""
    classes = {category: place for place, category in enumerate(things)}
    pred = _Segments.read("prediction", pred_segments, classes)
    target = _Segments.read("target", target_segments, classes)
    shared = _shared_pixels(_ids("prediction", pred_map), pred, _ids("target", target_map), target)
    return _match(shared, pred, target, len(classes))


def quality(things: Mapping[int, bool], counts: ClassCounts) -> dict[str, Any]:
    """What `PanopticQuality.compute` returns for these counts; ``things`` is what `thing_flags` returns."""
    iou, tp, fp, fn = counts
    share = tp + 0.5 * fp + 0.5 * fn
    columns: dict[str, _Array] = {"pq": _ratio(iou, share), "sq": _ratio(iou, tp), "rq": _ratio(tp, share)}
    isthing = np.array(list(things.values()))
    found: dict[str, Any] = {}
    for kind, chosen in (("", isthing | ~isthing), ("_things", isthing), ("_stuff", ~isthing)):
        occurs = chosen & (share > 0)
        n = int(occurs.sum())
        found |= {name + kind: float(values[occurs].sum()) / max(n, 1) for name, values in columns.items()}
        found["n" + kind] = n
    columns |= {"tp": tp, "fp": fp, "fn": fn, "iou": iou}
    found["per_class"] = {
        category: {name: values[place].item() for name, values in columns.items()}
        for place, category in enumerate(things)
    }
    return found


class _Segments(NamedTuple):
    """The segments of one map, after an entry for void: their ids in ascending order, class places, and crowd flags."""

    owner: str
    ids: _Array
    classes: _Array
    crowd: NDArray[np.bool_]
    order: _Array  # where each stood in the list, which decides between two crowds of one class

    @classmethod
    def read(cls, owner: str, segments: Sequence[Mapping[str, Any]], places: Mapping[int, int]) -> _Segments:
        ids, classes, crowd = [0], [-1], [False]
        for segment in segments:
            number = _integer(segment, "id", f"a segment of the {owner}")
            category = _integer(segment, "category_id", f"segment {number} of the {owner}")
            if number == 0:
                raise ValueError(f"a segment of the {owner} has id 0, which means void; number segments from 1")
            if category not in places:
                raise ValueError(
                    f"segment {number} of the {owner} has category_id {category}, which is not among the categories "
                    f"({_few(sorted(places))}); give the ids of the data set, not contiguous labels"
                )
            if (iscrowd := segment.get("iscrowd", 0)) not in (0, 1):
                raise ValueError(f"segment {number} of the {owner} has iscrowd {iscrowd!r}; give 0 or 1")
            ids.append(number)
            classes.append(places[category])
            crowd.append(bool(iscrowd))
        order = np.argsort(ids, kind="stable")
        found = np.array(ids)[order]
        if len(twice := found[1:][found[1:] == found[:-1]]):
            raise ValueError(f"the segments of the {owner} name the id {_few(twice)} twice; give each segment its own")
        return cls(owner, found, np.array(classes)[order], np.array(crowd)[order], order)

    def places(self, ids: _Array) -> _Array:
        """Where each of `ids`, taken from the map, stands among the segments; all of which must be there."""
        places = np.searchsorted(self.ids, ids).clip(max=len(self.ids) - 1)
        if (unnamed := self.ids[places] != ids).any():
            raise ValueError(
                f"the map of the {self.owner} has the id {_few(np.unique(ids[unnamed]))}, which its segments do not "
                "name; name it among them, or set its pixels to 0 (void)"
            )
        here = np.bincount(places, minlength=len(self.ids)) > 0
        here[self.ids == 0] = True
        if not here.all():
            raise ValueError(
                f"the segments of the {self.owner} name the id {_few(self.ids[~here])}, which no pixel of its map has; "
                "leave segments without pixels out of the list"
            )
        return places


def _integer(mapping: Mapping[str, Any], key: str, owner: str) -> int:
    if not isinstance(mapping, Mapping) or key not in mapping:
        held = ", ".join(map(repr, mapping)) if isinstance(mapping, Mapping) else repr(mapping)
        raise ValueError(f"{owner} has no {key!r} but {held or 'nothing'}; give it as COCO does")
    try:
        number = operator.index(mapping[key])
    except TypeError as error:
        raise ValueError(f"{owner} has the {key} {mapping[key]!r}; give a whole number") from error
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError(f"{owner} has the {key} {number}; give a number that 64 bits can hold")
    return number


def _few(ids: Iterable[int]) -> str:
    numbers = [str(number) for number in ids]
    return ", ".join(numbers[:5]) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")


def _ids(owner: str, pixels: Tensor | _Array) -> Tensor:
    """The map as int64, which every integer type that ids come in can be compared in."""
    kind = pixels.dtype
    whole = not (kind.is_floating_point or kind.is_complex) if isinstance(kind, torch.dtype) else kind.kind in "iu"
    if not whole or kind == torch.bool:
        raise ValueError(f"the map of the {owner} is of {kind}; give integer ids of segments")
    if pixels.ndim != 2:
        raise ValueError(f"the map of the {owner} has shape {tuple(pixels.shape)}; give one image at a time, (H, W)")
    return pixels.to(torch.int64) if isinstance(pixels, Tensor) else torch.from_numpy(pixels.astype(np.int64))


def _shared_pixels(pred_map: Tensor, pred: _Segments, target_map: Tensor, target: _Segments) -> _Array:
    """How many pixels each true segment (row) has in common with each predicted one (column), the void included.

    Few pixels differ from their neighbour, so the maps are first cut into runs, where they are; the rest handles some
    thousands of numbers and not all pixels.
    """
    if pred_map.shape != target_map.shape:
        raise ValueError(
            f"the map of the prediction has shape {tuple(pred_map.shape)} and that of the target "
            f"{tuple(target_map.shape)}; predict at the size of the target"
        )
    p, t = pred_map.flatten(), target_map.flatten().to(pred_map.device)
    change = torch.ones(len(p), dtype=torch.bool, device=p.device)
    change[1:] = (p[1:] != p[:-1]) | (t[1:] != t[:-1])
    starts = change.nonzero().squeeze(1)
    rows, columns = target.places(t[starts].cpu().numpy()), pred.places(p[starts].cpu().numpy())
    lengths = np.diff(starts.cpu().numpy(), append=len(p))
    shape = (len(target.ids), len(pred.ids))
    counts = np.bincount(rows * shape[1] + columns, weights=lengths, minlength=shape[0] * shape[1])
    return counts.reshape(shape)


def _match(shared: _Array, pred: _Segments, target: _Segments, classes: int) -> ClassCounts:
    area, target_area = shared.sum(0), shared.sum(1, keepdims=True)
    void = shared[target.ids == 0].sum(0)
    # Void has no class, and its union may be empty.
    alike = (target.classes[:, None] == pred.classes) & (target.classes[:, None] >= 0) & ~target.crowd[:, None]
    iou = np.divide(shared, area + target_area - shared - void, out=np.zeros(shared.shape), where=alike)
    matched = iou > 0.5
    left = ~matched.any(0) & (pred.classes >= 0)
    missed = ~matched.any(1) & (target.classes >= 0) & ~target.crowd
    crowd_of = np.full(classes, -1)
    for place in sorted(np.flatnonzero(target.crowd), key=lambda place: int(target.order[place])):
        crowd_of[target.classes[place]] = place  # of several crowds of a class in an image, only the last one counts
    crowd = crowd_of[pred.classes]
    excused = void + np.where(crowd >= 0, shared[crowd, np.arange(len(area))], 0)
    false = left & (excused <= 0.5 * area)
    rows = matched.nonzero()[0]
    return ClassCounts(
        np.bincount(target.classes[rows], weights=iou[matched], minlength=classes),
        np.bincount(target.classes[rows], minlength=classes),
        np.bincount(pred.classes[false], minlength=classes),
        np.bincount(target.classes[missed], minlength=classes),
    )


def _ratio(part: _Array, whole: _Array) -> _Array:
    ratio: _Array = np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)
    return ratio
