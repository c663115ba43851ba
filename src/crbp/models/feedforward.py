"""The feed-forward baseline of contour tracing: as many layers as the recurrent model trained by BPTT takes steps."""

from __future__ import annotations

from torch import Tensor, nn

from crbp._checks import count
from crbp.cells._parts import Norm, check_cell, make_norm
from crbp.models.pathfinder import Prediction, make_readout
from crbp.ops import Conv2d


class FeedForwardNet(nn.Module):
    """``image → 7×7 convolution, norm → depth × (convolution, norm, ReLU) → 1×1 readout``, without recurrence.

    With the paper's settings (25 channels, 15×15 kernels, 6 layers) it has 845 527 parameters.

    Args:
        channels: of every layer.
        kernel_size: side of the kernels of the layers after the first, odd.
        depth: number of those layers, at most 1000.
        norm: see `crbp.cells.HGRU`.
        target_share: share of target pixels that the readout starts from.

    Raises:
        ValueError: for values out of range.

    Source: Linsley et al., Stable and expressive recurrent vision models, NeurIPS 2020.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        depth: int = 6,
        norm: Norm = "instance",
        target_share: float = 0.01,
    ) -> None:
        super().__init__()
        check_cell(channels, kernel_size)
        count("depth", depth)
        if depth > 1000:
            raise ValueError(f"depth must be at most 1000, not {depth}")
        layers = [nn.Conv2d(1, channels, 7, padding="same", bias=False), make_norm(norm, channels)]
        for _ in range(depth):
            conv = Conv2d(channels, channels, kernel_size, bias=True)
            layers += [conv, make_norm(norm, channels), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.readout = make_readout(channels, target_share)

    def forward(self, image: Tensor) -> Prediction:
        """Logits of a batch of images ``(B, 1, H, W)`` in [0, 1]."""
        return Prediction(logits=self.readout(self.layers(image)))
