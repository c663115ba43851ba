"""The ResNet and the feature pyramid on it, arranged as detectron2 does."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from crbp.models.panoptic.settings import BackboneNorm, BackboneSettings

LEVELS = ("p2", "p3", "p4", "p5", "p6")
STRIDES = (4, 8, 16, 32, 64)

_BLOCKS: dict[int, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    18: (BasicBlock, [2, 2, 2, 2]),
    50: (Bottleneck, [3, 4, 6, 3]),
    101: (Bottleneck, [3, 4, 23, 3]),
}


def _group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, or the most that leave two channels or more in each."""
    groups = next((each for each in (32, 16, 8, 4, 2) if channels % each == 0 and channels >= 2 * each), 1)
    return nn.GroupNorm(groups, channels)


_NORMS: dict[BackboneNorm, Callable[[int], nn.Module]] = {
    "frozen": FrozenBatchNorm2d,
    "group": _group_norm,
    "batch": nn.BatchNorm2d,
}


class ScaledResNet(ResNet):
    """torchvision's ResNet, whose stages have ``width / 64`` times the channels; its stem keeps its own."""

    def __init__(self, *arguments: Any, width: int, **options: Any) -> None:
        self._width = width
        super().__init__(*arguments, **options)

    def _make_layer(self, block: Any, planes: int, *arguments: Any, **options: Any) -> nn.Sequential:
        stage: nn.Sequential = super()._make_layer(block, planes * self._width // 64, *arguments, **options)
        return stage


class Backbone(nn.Module):
    """A ResNet with a feature pyramid on its four stages.

    Args:
        depth: layers of the ResNet: 18, 50 or 101.
        settings: see `BackboneSettings`.

    Raises:
        ValueError: for another depth.

    Source: Lin et al., Feature pyramid networks for object detection, CVPR 2017.
    """

    def __init__(self, depth: int, settings: BackboneSettings) -> None:
        super().__init__()
        if depth not in _BLOCKS:
            raise ValueError(f"depth must be one of {', '.join(map(str, _BLOCKS))}, not {depth!r}")
        block, layers = _BLOCKS[depth]
        self.body = ScaledResNet(block, layers, width=settings.width, norm_layer=_NORMS[settings.norm])
        del self.body.avgpool, self.body.fc
        if settings.stride_in_1x1:
            _stride_first(self.body)
        widths = [settings.width * times * block.expansion for times in (1, 2, 4, 8)]
        self.fpn = FeaturePyramidNetwork(widths, settings.channels, extra_blocks=LastLevelMaxPool())
        self.frozen = settings.frozen
        for modules in self.parts()[: self.frozen]:
            for module in modules:
                module.requires_grad_(False)

    def parts(self) -> list[list[nn.Module]]:
        """The stem and the four stages."""
        body = self.body
        return [[body.conv1, body.bn1], [body.layer1], [body.layer2], [body.layer3], [body.layer4]]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """P2–P6, each ``(B, channels, H / stride, W / stride)``, from ``(B, 3, H, W)`` with sides that 32 divides."""
        body = self.body
        x = body.maxpool(body.relu(body.bn1(body.conv1(images))))
        stages: OrderedDict[str, Tensor] = OrderedDict()
        for name, stage in zip(LEVELS, (body.layer1, body.layer2, body.layer3, body.layer4), strict=False):
            stages[name] = x = stage(x)
        return dict(zip(LEVELS, self.fpn(stages).values(), strict=True))

    def untouched(self) -> bool:
        """Whether the frozen norms still are the identity that they are made as, with statistics of no data."""
        norm = self.body.bn1
        if not isinstance(norm, FrozenBatchNorm2d):
            return False
        return all(
            bool(torch.all(buffer == value))
            for buffer, value in ((norm.weight, 1), (norm.bias, 0), (norm.running_mean, 0), (norm.running_var, 1))
        )


def _stride_first(body: ResNet) -> None:
    """Halve the resolution in the first convolution of a bottleneck, where torchvision does so in the second."""
    for block in body.modules():
        if isinstance(block, Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
