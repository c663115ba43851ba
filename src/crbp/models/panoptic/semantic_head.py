"""The semantic head of Panoptic FPN: all levels brought to one size, added, and read out pixel by pixel."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.misc import Conv2dNormActivation

from crbp._semantic import IGNORE
from crbp.models.panoptic._pool import at_least_float32
from crbp.models.panoptic.backbone import LEVELS
from crbp.models.panoptic.settings import SemanticSettings

SCALE = 4  # the common stride of what is added, in pixels
_GROUPS = 32


class SemanticHead(nn.Module):
    """Logits of every pixel for the stuff classes and, as class 0, "things".

    P2 passes one 3×3 convolution with group norm and ReLU; P3, P4 and P5 one, two and three, each followed by a
    bilinear upsampling by 2. Their sum is read out by a 1×1 convolution.

    Args:
        inputs: channels of the features.
        classes: stuff classes and one.
        settings: see `SemanticSettings`.

    Source: Kirillov et al., Panoptic feature pyramid networks, CVPR 2019.
    """

    def __init__(self, inputs: int, classes: int, settings: SemanticSettings) -> None:
        super().__init__()
        channels = settings.channels
        self.weight = settings.weight
        self.levels = nn.ModuleDict(
            {name: _level(inputs, channels, upsamplings) for upsamplings, name in enumerate(LEVELS[:4])}
        )
        self.predictor = nn.Conv2d(channels, classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        assert self.predictor.bias is not None
        nn.init.zeros_(self.predictor.bias)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Logits ``(B, classes, H / 4, W / 4)``."""
        total = torch.stack([level(features[name]) for name, level in self.levels.items()]).sum(dim=0)
        return at_least_float32(self.predictor(total))

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Weighted mean cross-entropy over the pixels that are not ignored; zero, on the graph, where all are.

        Args:
            logits: ``(B, classes, H / 4, W / 4)``.
            target: ``(B, H, W)`` of int64; 255 is ignored.
        """
        full = F.interpolate(logits, scale_factor=SCALE, mode="bilinear", align_corners=False)
        loss = F.cross_entropy(full, target, ignore_index=IGNORE, reduction="sum")
        return self.weight * loss / (target != IGNORE).sum().clamp_min(1)


def _level(inputs: int, channels: int, upsamplings: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(max(upsamplings, 1)):
        layers.append(
            Conv2dNormActivation(
                inputs if index == 0 else channels, channels, norm_layer=partial(nn.GroupNorm, _GROUPS), bias=False
            )
        )
        if upsamplings:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*layers)
