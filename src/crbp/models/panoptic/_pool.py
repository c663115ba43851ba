"""Features of boxes: RoIAlign on the level of the pyramid that suits each box, aligned as detectron2's is."""

from __future__ import annotations

import torch
import torchvision  # noqa: F401  # registers the operator that is called
from torch import Tensor, nn

from crbp.models.panoptic.backbone import LEVELS, STRIDES

CANONICAL_LEVEL = 4
_POOLED = 4  # P2–P5; P6 is for proposals only


def at_least_float32(x: Tensor) -> Tensor:
    """The values in a precision that box arithmetic and losses can do with, also under autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def roi_align(features: Tensor, rows: Tensor, size: int, scale: float) -> Tensor:
    """RoIAlign of ``(n, 5)`` rows of image and corners, aligned, with as many samples as a cell is large.

    The operator itself and not `torchvision.ops.roi_align`, which, where deterministic kernels are asked for on a GPU,
    takes another way that visits every pixel of the map for every cell.
    """
    found: Tensor = torch.ops.torchvision.roi_align(features, rows, scale, size, size, 0, True)
    return found


class PyramidPool(nn.Module):
    """RoIAlign with half-pixel alignment and as many samples as a cell is large.

    A box of area ``w h`` is pooled from the level ``⌊4 + log₂(√(w h) / canonical + 1e-8)⌋``, kept within P2–P5.
    `torchvision.ops.MultiScaleRoIAlign` cannot align, takes the scales from the sizes at hand, and rounds elsewhere.

    Args:
        size: side of what is pooled.
        canonical_size: side in pixels of a box pooled from P4.
    """

    def __init__(self, size: int, canonical_size: int) -> None:
        super().__init__()
        self.size, self.canonical_size = size, canonical_size

    def levels(self, boxes: Tensor) -> Tensor:
        """Index of the level, 0 for P2, of each of the boxes ``(n, 4)``."""
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        level = torch.floor(CANONICAL_LEVEL + torch.log2(side / self.canonical_size + 1e-8))
        return level.clamp(2, 1 + _POOLED).long() - 2

    def forward(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]] | None = None
    ) -> Tensor:
        """Pool ``(n, C, size, size)``, image after image; the shapes are part of torchvision's interface only."""
        every = torch.cat(boxes)
        image = torch.cat([torch.full_like(own[:, :1], index) for index, own in enumerate(boxes)])
        rois, levels = torch.cat([image, every], dim=1), self.levels(every)
        pooled, places = [], []
        for index, (name, stride) in enumerate(zip(LEVELS[:_POOLED], STRIDES, strict=False)):
            place = torch.where(levels == index)[0]
            feature = at_least_float32(features[name])
            rows = rois[place].to(feature.dtype)
            pooled.append(roi_align(feature, rows, self.size, 1 / stride))
            places.append(place)
        return torch.cat(pooled)[torch.argsort(torch.cat(places))]
