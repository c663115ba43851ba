"""Panoptic models and batches small enough for a test."""

from typing import Any

import torch
from torch import Tensor

from crbp.models.panoptic import (
    BackboneSettings,
    BoxSettings,
    MaskSettings,
    MergeSettings,
    ProposalSettings,
    SemanticSettings,
)

THINGS, STUFF = 3, 2


def tiny_settings(**changes: Any) -> dict[str, Any]:
    """Arguments of a model of ResNet-18 with 32 channels, for images of about 64 pixels."""
    return {
        "depth": 18,
        "things": THINGS,
        "stuff": STUFF,
        "backbone": BackboneSettings(norm="group", channels=32, canonical_size=32),
        "proposals": ProposalSettings(
            anchor_sizes=(8.0, 16.0, 24.0, 32.0, 48.0),
            before_nms=40,
            before_nms_test=40,
            after_nms=20,
            after_nms_test=20,
            samples=32,
        ),
        "boxes": BoxSettings(channels=32, size=5, samples=16, score=0.0, detections=4),
        "masks": MaskSettings(channels=32, size=6),
        "semantic": SemanticSettings(channels=32),
        "merge": MergeSettings(stuff_area=10, score=0.0),
        **changes,
    }


def tiny_image(height: int = 64, width: int = 64) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def tiny_target(objects: int = 2, height: int = 64, width: int = 64) -> dict[str, Any]:
    """Rectangles on stuff that is in part void."""
    boxes, masks = [], torch.zeros(objects, height, width, dtype=torch.bool)
    semantic = torch.randint(1, STUFF + 1, (height, width))
    semantic[:5] = 255
    for index in range(objects):
        left, top = 8 + 20 * index, 10 + 6 * index
        boxes.append([left, top, left + 18, top + 24])
        masks[index, top : top + 24, left : left + 18] = True
        semantic[masks[index]] = 0
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.arange(objects) % THINGS,
        "masks": masks,
        "semantic": semantic,
        "image_id": 7,
        "size": (height, width),
    }
