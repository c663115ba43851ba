"""What a panoptic model says of an image, at the size that the image had before it was resized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crbp.models.panoptic.box_head import Detections
from crbp.models.panoptic.merge import merge_panoptic
from crbp.models.panoptic.settings import MergeSettings

MASK_THRESHOLD = 0.5
Size = tuple[int, int]


@dataclass(kw_only=True)
class PanopticResult:
    """What a model says of one image, at its original size.

    Attributes:
        panoptic: ``(H, W)`` of int32, the segment of each pixel; 0 is void.
        segments: of each segment ``id``, ``label`` (a contiguous thing label, or a semantic label of a stuff class),
            ``isthing``, ``area`` in pixels, and of things ``score`` and ``instance``, their row below.
        boxes: ``(n, 4)``, corners of the detections in pixels.
        scores: ``(n,)``.
        labels: ``(n,)``, contiguous thing labels.
        masks: ``(n, H, W)`` of bool.
        steps: ``(n,)``, steps that the recurrence of each instance took, where instances stop by themselves.
    """

    panoptic: Tensor
    segments: list[dict[str, Any]]
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor
    steps: Tensor | None = None


def paste_masks(masks: Tensor, boxes: Tensor, size: Size, *, threshold: float = MASK_THRESHOLD) -> Tensor:
    """Masks within boxes as masks of the image: sampled bilinearly at pixel centres, zero outside the box.

    Args:
        masks: ``(n, m, m)``, probabilities.
        boxes: ``(n, 4)``, corners in pixels.
        size: height and width of the image.
        threshold: pixels from it on belong to the mask.

    Returns:
        ``(n, H, W)`` of bool.
    """
    height, width = size
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    corners = torch.cat([boxes[:, :2].floor() - 1, boxes[:, 2:].ceil() + 1], dim=1).tolist()
    for row, (mask, box) in enumerate(zip(masks, boxes, strict=True)):
        left, top = (max(int(place), 0) for place in corners[row][:2])
        right, bottom = min(int(corners[row][2]), width), min(int(corners[row][3]), height)
        if right <= left or bottom <= top:
            continue
        x = (torch.arange(left, right, device=box.device, dtype=box.dtype) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
        y = (torch.arange(top, bottom, device=box.device, dtype=box.dtype) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=2)
        sampled = F.grid_sample(mask[None, None].to(grid.dtype), grid[None], align_corners=False)
        pasted[row, top:bottom, left:right] = sampled[0, 0] >= threshold
    return pasted


def semantic_map(logits: Tensor, shown: Size, size: Size) -> Tensor:
    """Semantic labels ``(H, W)`` at the original size, from logits ``(classes, h, w)`` at a quarter of the padded one.

    Args:
        logits: of one image.
        shown: size of the image as the model was shown it, before padding.
        size: its original size.
    """
    full = F.interpolate(logits[None], scale_factor=4, mode="bilinear", align_corners=False)
    cut = full[:, :, : shown[0], : shown[1]]
    return F.interpolate(cut, size=size, mode="bilinear", align_corners=False)[0].argmax(dim=0)


def panoptic_result(
    found: Detections, logits: Tensor, shown: Size, size: Size, settings: MergeSettings
) -> PanopticResult:
    """Bring what was found to the original size and merge it.

    Args:
        found: the detections of one image.
        logits: of its semantic head, ``(classes, h, w)``.
        shown: size of the image as the model was shown it, before padding.
        size: its original size.
        settings: of the merge.
    """
    scale = found.boxes.new_tensor([size[1] / shown[1], size[0] / shown[0]] * 2)
    limit = found.boxes.new_tensor([size[1], size[0]] * 2)
    boxes = torch.minimum((found.boxes * scale).clamp_min(0), limit)
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    boxes, scores, labels = boxes[kept], found.scores[kept], found.labels[kept]
    masks = paste_masks(found.masks[kept], boxes, size)
    panoptic, segments = merge_panoptic(masks, scores, labels, semantic_map(logits, shown, size), settings)
    return PanopticResult(
        panoptic=panoptic,
        segments=segments,
        boxes=boxes,
        scores=scores,
        labels=labels,
        masks=masks,
        steps=None if found.steps is None else found.steps[kept],
    )
