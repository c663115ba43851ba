"""Detections and a semantic map become one panoptic map, in which every pixel belongs to one segment or to none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crbp._semantic import THINGS
from crbp.models.panoptic.settings import MergeSettings


def merge_panoptic(
    masks: Tensor, scores: Tensor, labels: Tensor, semantic: Tensor, settings: MergeSettings | None = None
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Paste instances by descending score, then stuff on what is left free.

    An instance is left out if its score is too low, if it is empty, or if too large a share of it is covered already;
    else its free pixels become a segment. Then each stuff class becomes one segment of its free pixels, if these are
    enough. What remains is void.

    Args:
        masks: ``(n, H, W)`` of bool.
        scores: ``(n,)``.
        labels: ``(n,)``, thing labels.
        semantic: ``(H, W)``, semantic labels; 0 stands for things.
        settings: thresholds; None takes the published ones.

    Returns:
        The map ``(H, W)`` of int32, segments counted from 1, 0 void; and of each segment, in this order, ``id``,
        ``label`` (of its thing or its stuff class), ``isthing``, ``area`` in pixels, and of things ``score`` and
        ``instance``, the row of ``masks``.

    Source: Kirillov et al., Panoptic feature pyramid networks, CVPR 2019.
    """
    settings = settings or MergeSettings()
    panoptic = torch.zeros_like(semantic, dtype=torch.int32)
    segments: list[dict[str, Any]] = []
    order = torch.argsort(scores, descending=True, stable=True).tolist()
    areas, values, classes = masks.flatten(1).sum(dim=1).tolist(), scores.tolist(), labels.tolist()
    for instance in order:
        if values[instance] < settings.score:
            break
        free = masks[instance] & (panoptic == 0)
        area = int(free.sum())
        if area == 0 or (areas[instance] - area) / areas[instance] > settings.overlap:
            continue
        segments.append(
            {
                "id": len(segments) + 1,
                "label": classes[instance],
                "isthing": True,
                "area": area,
                "score": values[instance],
                "instance": instance,
            }
        )
        panoptic[free] = len(segments)
    for label, area in zip(*_counts(semantic[panoptic == 0]), strict=True):
        if label == THINGS or area < settings.stuff_area:
            continue
        segments.append({"id": len(segments) + 1, "label": label, "isthing": False, "area": area})
        panoptic[(semantic == label) & (panoptic == 0)] = len(segments)
    return panoptic, segments


def _counts(labels: Tensor) -> tuple[list[int], list[int]]:
    found, counts = torch.unique(labels, return_counts=True)
    return found.tolist(), counts.tolist()
