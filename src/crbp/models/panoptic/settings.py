"""The settings of the panoptic models, grouped by part; the defaults are detectron2's for COCO at 800 pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from crbp._checks import choice, count, non_negative, share

BackboneNorm = Literal["frozen", "group", "batch"]
Order = Literal["bgr", "rgb"]
Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class PixelSettings:
    """How images, which come as RGB with values in [0, 255], are scaled: ``(channel − mean) / std``.

    The defaults suit detectron2's weights. torchvision's take ``order="rgb"``, ``mean=(123.675, 116.28, 103.53)`` and
    ``std=(58.395, 57.12, 57.375)``, which `PixelSettings.torchvision` makes.

    Args:
        order: of the channels that the backbone sees, and of ``mean`` and ``std``.
        mean: subtracted from each channel.
        std: each channel is divided by.

    Raises:
        ValueError: for an unknown order or a deviation that is not positive.
    """

    order: Order = "bgr"
    mean: Triple = (103.53, 116.28, 123.675)
    std: Triple = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        choice("order", self.order, get_args(Order))
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std need three numbers each, std above 0, not {self.mean} and {self.std}")

    @classmethod
    def torchvision(cls) -> PixelSettings:
        """What torchvision's ImageNet weights were trained with."""
        return cls(order="rgb", mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))


@dataclass(frozen=True, kw_only=True)
class BackboneSettings:
    """The ResNet and the feature pyramid P2–P6 on it.

    Args:
        norm: of the ResNet: ``"frozen"``, batch norm whose statistics and scales are those that came with the weights;
            ``"group"`` (32 groups, fewer where less than two channels would be in one) or ``"batch"``, which training
            from scratch needs: frozen statistics of no data leave the layers without any normalisation.
        frozen_stages: parts of the ResNet that are not trained: 0 none, 1 the stem, 2 the stem and the first stage, up
            to 5. None takes 2 with a frozen norm and 0 with any other.
        stride_in_1x1: a bottleneck halves the resolution in its first 1×1 convolution, as in the weights of MSRA, or,
            where False, in its 3×3 one, as in torchvision's.
        width: channels of the first of the four stages, which double from stage to stage; 64 is ResNet's own, and what
            its weights have. The stem has 64 always.
        channels: of the pyramid.
        canonical_size: side in pixels of the boxes that are pooled from P4; half of it from P3, and so on.

    Raises:
        ValueError: for values out of range, or stages to be frozen whose norm is not.
    """

    norm: BackboneNorm = "frozen"
    frozen_stages: int | None = None
    stride_in_1x1: bool = True
    width: int = 64
    channels: int = 256
    canonical_size: int = 224

    def __post_init__(self) -> None:
        choice("norm", self.norm, get_args(BackboneNorm))
        count("width", self.width)
        count("channels", self.channels)
        count("canonical_size", self.canonical_size)
        if self.frozen_stages is not None and self.frozen_stages not in range(6):
            raise ValueError(f"frozen_stages must be a whole number from 0 to 5, not {self.frozen_stages!r}")
        if self.frozen_stages and self.norm != "frozen":
            raise ValueError(
                f"frozen_stages={self.frozen_stages} needs norm='frozen', not {self.norm!r}: what is not trained would "
                "keep the weights it started from"
            )

    @property
    def frozen(self) -> int:
        """Parts of the ResNet that are not trained."""
        if self.frozen_stages is None:
            return 2 if self.norm == "frozen" else 0
        return self.frozen_stages


@dataclass(frozen=True, kw_only=True)
class ProposalSettings:
    """The region proposal network.

    Args:
        anchor_sizes: square roots of the anchors' areas in pixels, one for each of P2–P6.
        anchor_ratios: height over width.
        before_nms: best anchors of each level of an image that go into non-maximum suppression, in training; a level of
            small images has fewer.
        before_nms_test: the same in evaluation.
        after_nms: proposals of an image that are kept, in training.
        after_nms_test: the same in evaluation.
        nms: overlap (IoU) from which a proposal is suppressed.
        samples: anchors of an image that the losses see.
        positive_share: at most so many of them on an object.
        foreground: IoU from which an anchor is on an object.
        background: IoU below which it is on none.

    Raises:
        ValueError: for values out of range.
    """

    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    before_nms: int = 2000
    before_nms_test: int = 1000
    after_nms: int = 1000
    after_nms_test: int = 1000
    nms: float = 0.7
    samples: int = 256
    positive_share: float = 0.5
    foreground: float = 0.7
    background: float = 0.3

    def __post_init__(self) -> None:
        if len(self.anchor_sizes) != 5 or min(self.anchor_sizes) <= 0:
            raise ValueError(f"anchor_sizes must be five numbers above 0, for P2 to P6, not {self.anchor_sizes}")
        if not self.anchor_ratios or min(self.anchor_ratios) <= 0:
            raise ValueError(f"anchor_ratios must be numbers above 0, not {self.anchor_ratios}")
        for name in ("before_nms", "before_nms_test", "after_nms", "after_nms_test", "samples"):
            count(name, getattr(self, name))
        for name in ("nms", "positive_share", "foreground", "background"):
            share(name, getattr(self, name), closed=True)
        if self.background > self.foreground:
            raise ValueError(f"background={self.background} must not exceed foreground={self.foreground}")


@dataclass(frozen=True, kw_only=True)
class BoxSettings:
    """The box head and what is kept of its detections.

    Args:
        channels: of its two hidden layers.
        size: side of the pooled features.
        samples: proposals of an image that the losses see.
        positive_share: at most so many of them on an object.
        foreground: IoU with an object from which a proposal is on it.
        score: detections below it are dropped.
        nms: overlap (IoU) from which a detection is suppressed by a better one of its class.
        detections: the most of an image.

    Raises:
        ValueError: for values out of range.
    """

    channels: int = 1024
    size: int = 7
    samples: int = 512
    positive_share: float = 0.25
    foreground: float = 0.5
    score: float = 0.05
    nms: float = 0.5
    detections: int = 100

    def __post_init__(self) -> None:
        for name in ("channels", "size", "samples", "detections"):
            count(name, getattr(self, name))
        for name in ("positive_share", "foreground", "score", "nms"):
            share(name, getattr(self, name), closed=True)


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """The mask head.

    Args:
        channels: of its layers, and of the recurrent cell.
        size: side of the pooled features; masks have twice that.
        chunk: instances at once in evaluation, which bounds its memory; None for all. It changes nothing else.

    Raises:
        ValueError: for values out of range.
    """

    channels: int = 256
    size: int = 14
    chunk: int | None = None

    def __post_init__(self) -> None:
        count("channels", self.channels)
        count("size", self.size)
        if self.chunk is not None:
            count("chunk", self.chunk)


@dataclass(frozen=True, kw_only=True)
class SemanticSettings:
    """The semantic head.

    Args:
        channels: of its layers, a multiple of the 32 groups of its norms.
        weight: of its loss.

    Raises:
        ValueError: for values out of range.
    """

    channels: int = 128
    weight: float = 0.5

    def __post_init__(self) -> None:
        count("channels", self.channels)
        if self.channels % 32:
            raise ValueError(
                f"the semantic head normalises 32 groups: its channels must be a multiple of 32, not {self.channels}"
            )
        non_negative("weight", self.weight)


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """How detections and the semantic map become one panoptic map.

    Args:
        score: detections below it are left out.
        overlap: an instance is left out if more than this share of it is covered already.
        stuff_area: pixels, at the original size, that a stuff segment needs.

    Raises:
        ValueError: for values out of range.
    """

    score: float = 0.5
    overlap: float = 0.5
    stuff_area: int = 4096

    def __post_init__(self) -> None:
        share("score", self.score, closed=True)
        share("overlap", self.overlap, closed=True)
        count("stuff_area", self.stuff_area, at_least=0)


def mini_settings(size: int = 192) -> dict[str, Any]:
    """Settings of a model that trains from scratch on two CPU cores, for images of about ``size`` pixels a side.

    ResNet-18 with group norm, 64 channels everywhere, anchors, proposals and areas in proportion to the images.

    ```python
    PanopticFPN(things=8, stuff=4, **mini_settings(192))
    ```
    """
    count("size", size, at_least=32)
    return {
        "depth": 18,
        "backbone": BackboneSettings(norm="group", channels=64, canonical_size=max(size // 2, 16)),
        "proposals": ProposalSettings(
            anchor_sizes=tuple(size / 12 * 2 ** (level / 1.25) for level in range(5)),
            before_nms=200,
            before_nms_test=200,
            after_nms=100,
            after_nms_test=100,
            samples=128,
        ),
        "boxes": BoxSettings(channels=256, samples=64, detections=50),
        "masks": MaskSettings(channels=64),
        "semantic": SemanticSettings(channels=64),
        "merge": MergeSettings(stuff_area=max(size * size // 150, 1)),
    }
