"""Panoptic FPN and R-FPN: the parts put together, images in, losses or panoptic maps out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from crbp._checks import count
from crbp._semantic import IGNORE, THINGS
from crbp.evolve import Evolve, Report, Run
from crbp.gradients import RBP
from crbp.models.panoptic.backbone import Backbone
from crbp.models.panoptic.box_head import Detections, InstanceHeads, together
from crbp.models.panoptic.mask_head import ConvolutionalMaskHead, RecurrentMaskHead
from crbp.models.panoptic.results import PanopticResult, Size, panoptic_result
from crbp.models.panoptic.rpn import ProposalNetwork
from crbp.models.panoptic.semantic_head import SemanticHead
from crbp.models.panoptic.settings import (
    BackboneSettings,
    BoxSettings,
    MaskSettings,
    MergeSettings,
    PixelSettings,
    ProposalSettings,
    SemanticSettings,
)

DIVISOR = 32
_NEEDED = ("boxes", "labels", "masks", "semantic")
Targets = Sequence[dict[str, Any]]


class PanopticFPN(nn.Module):
    """Panoptic FPN: a ResNet with a feature pyramid, Mask R-CNN's heads and a semantic head, merged to one map.

    With equal weights it computes what detectron2's does. With the defaults and 80 thing classes ResNet-50 has
    45 973 990 parameters, of which 45 751 590 are trained, ResNet-101 64 913 894 and 64 691 494.

    Where only the panoptic map is wanted, set ``merged_only``: detections whose score the merge would leave out then
    get no mask and are not in the results, whose maps are the same. It saves much of a recurrent mask head's time.

    Args:
        depth: layers of the ResNet: 18, 50 or 101.
        things: number of thing classes T, labelled 0 … T − 1.
        stuff: number of stuff classes S, at most 254, labelled 1 … S in semantic maps, where 0 stands for things.
        pixels: how images are scaled.
        backbone: of the ResNet and the pyramid; for training from scratch set its norm.
        proposals: of the region proposal network.
        boxes: of the box head and the detections.
        masks: of the mask head.
        semantic: of the semantic head.
        merge: of the panoptic merge.

    Raises:
        ValueError: for values out of range.

    Source: Kirillov et al., Panoptic feature pyramid networks, CVPR 2019.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        depth: int = 50,
        *,
        things: int = 80,
        stuff: int = 53,
        pixels: PixelSettings = PixelSettings(),
        backbone: BackboneSettings = BackboneSettings(),
        proposals: ProposalSettings = ProposalSettings(),
        boxes: BoxSettings = BoxSettings(),
        masks: MaskSettings = MaskSettings(),
        semantic: SemanticSettings = SemanticSettings(),
        merge: MergeSettings = MergeSettings(),
    ) -> None:
        super().__init__()
        count("things", things)
        count("stuff", stuff)
        if stuff >= IGNORE:
            raise ValueError(f"stuff must be at most {IGNORE - 1}, not {stuff}: label {IGNORE} is void; merge some")
        self.depth, self.things, self.stuff = depth, things, stuff
        self.pixels, self.merge = pixels, merge
        self.stride_in_1x1 = backbone.stride_in_1x1
        self.backbone = Backbone(depth, backbone)
        self.rpn = ProposalNetwork(backbone.channels, proposals)
        self.roi_heads = InstanceHeads(
            backbone.channels,
            things,
            backbone.canonical_size,
            boxes=boxes,
            masks=masks,
            mask_head=ConvolutionalMaskHead(backbone.channels, masks.channels),
        )
        self.semantic_head = SemanticHead(backbone.channels, stuff + 1, semantic)
        # Of the colours, so that a model that is moved takes them along; they are in the settings, not in checkpoints.
        self.register_buffer("pixel_mean", torch.tensor(pixels.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixels.std).view(3, 1, 1), persistent=False)
        self.merged_only = False
        self._warned = False

    def forward(
        self, images: Sequence[Tensor], targets: Targets | None = None, *, sizes: Sequence[Size] | None = None
    ) -> dict[str, Tensor] | list[PanopticResult]:
        """The losses of a batch in training mode, else what is seen in each image.

        Args:
            images: RGB, ``(3, H, W)`` each, values in [0, 255], of any sizes.
            targets: in training, of each image ``boxes`` ``(n, 4)`` corners in pixels, ``labels`` ``(n,)``, ``masks``
                ``(n, H, W)`` of bool and ``semantic`` ``(H, W)`` of int64, 255 where ignored.
            sizes: in evaluation, height and width that each image had before it was resized, at which results are
                given; None takes ``size`` of the targets where there are any, else the images as they are.

        Returns:
            In training the weighted losses ``rpn_class``, ``rpn_box``, ``box_class``, ``box_delta``, ``mask`` and
            ``semantic``; their sum is to be minimised. Else a `PanopticResult` for each image.

        Raises:
            ValueError: for images or targets of another form.
            DivergenceError: if proposals are not finite in training.
        """
        batch = self.batch(images)
        if self.training:
            if targets is None:
                raise ValueError("training needs targets; call eval() first to see what the model says of images")
            _check_targets(images, targets, self.things, self.stuff)
            self._warn_untouched()
            return self._losses(batch, list(targets))
        with torch.no_grad():
            return self._results(batch, _original_sizes(images, targets, sizes))

    def batch(self, images: Sequence[Tensor]) -> ImageList:
        """Scale the images and pad them, on the right and below, to one size that 32 divides."""
        if len(images) == 0:
            raise ValueError("there is no image in the batch")
        for index, image in enumerate(images):
            if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
                raise ValueError(f"image {index} must be RGB of shape (3, H, W), not {tuple(image.shape)}")
        height, width = (max(image.shape[side] for image in images) for side in (1, 2))
        height, width = (-(-side // DIVISOR) * DIVISOR for side in (height, width))
        batch = self.pixel_mean.new_zeros(len(images), 3, height, width)
        for row, image in zip(batch, images, strict=True):
            values = image.to(batch).flip(0) if self.pixels.order == "bgr" else image.to(batch)
            row[:, : image.shape[1], : image.shape[2]] = (values - self.pixel_mean) / self.pixel_std
        return ImageList(batch, [(image.shape[1], image.shape[2]) for image in images])

    def _losses(self, batch: ImageList, targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        features = self.backbone(batch.tensors)
        instances = [{name: target[name] for name in ("boxes", "labels", "masks")} for target in targets]
        proposals, proposing = self.rpn(batch, features, instances)
        found, run = self.roi_heads.losses(features, proposals, instances)
        semantic = self.semantic_head.loss(self.semantic_head(features), _padded(targets, batch.tensors))
        return {
            "rpn_class": proposing["loss_objectness"],
            "rpn_box": proposing["loss_rpn_box_reg"],
            **found,
            "semantic": semantic,
            **self._extra_losses(run, found["mask"]),
        }

    def _extra_losses(self, run: Run | None, like: Tensor) -> dict[str, Tensor]:
        """Losses that a kind of model adds."""
        return {}

    def _results(self, batch: ImageList, sizes: Sequence[Size]) -> list[PanopticResult]:
        features = self.backbone(batch.tensors)
        proposals, _ = self.rpn(batch, features)
        found = self.roi_heads.detect(features, proposals, batch.image_sizes, at_least=self._least_score())
        return self._merged(found, self.semantic_head(features), batch, sizes)

    def _least_score(self) -> float:
        return self.merge.score if self.merged_only else 0.0

    def _merged(
        self, found: list[Detections], semantic: Tensor, batch: ImageList, sizes: Sequence[Size]
    ) -> list[PanopticResult]:
        return [
            panoptic_result(detections, logits, shown, size, self.merge)
            for detections, logits, shown, size in zip(found, semantic, batch.image_sizes, sizes, strict=True)
        ]

    def _warn_untouched(self) -> None:
        if not self._warned and self.backbone.untouched():
            warnings.warn(
                "the backbone's norms are frozen, and their statistics are those of no data; load weights with "
                "crbp.models.panoptic.load_weights, or train from scratch with BackboneSettings(norm='group')",
                stacklevel=3,
            )
        self._warned = True


class RFPN(PanopticFPN):
    """Panoptic FPN whose mask head is one recurrent cell in place of four convolutions.

    The cell, `crbp.cells.GALAHGRU`, is driven by the features of each box and evolved as ``evolve`` says; a batch norm
    of its state, the same deconvolution and predictor follow. It has 783 552 parameters fewer than `PanopticFPN`. The
    losses have ``penalty`` besides the others, where there is one. After a training step ``report`` says what the run
    did and, once ``backward()`` has run, how its gradient was found; it is None where no box was on an object.

    Args:
        depth: as for `PanopticFPN`, and so are ``things``, ``stuff`` and the settings.
        evolve: steps and gradient of the mask head.
        penalty: on its run, such as `crbp.tasks.LipschitzPenalty`, whose ``weight``, where it has one, it is multiplied
            by; None for none. Published: weight .001, bound .95, ``reduction="sum_square"``.
        tolerance: in evaluation an instance stops once its state moves by no more than this share; None runs all steps.
        norm_scale: start of the scales of the cell's two group norms. The published 0.1 holds a small model back that
            is trained for a short time; with 1 it learns sooner.
        horizon: longest time constant in steps that the cell's gates start with, at least 3; None for the number of
            steps, or 3 where that is less. With a shorter one the state settles before the last step.

    Raises:
        ValueError: for values out of range, or a mask head of other channels than the pyramid.

    Source: Linsley et al., Stable and expressive recurrent vision models, NeurIPS 2020.
    """

    def __init__(
        self,
        depth: int = 50,
        *,
        evolve: Evolve = Evolve(steps=20, gradient=RBP()),
        penalty: Callable[[Run], Any] | None = None,  # jsonargparse would make what a class named here says
        tolerance: float | None = None,
        norm_scale: float = 0.1,
        horizon: int | None = None,
        things: int = 80,
        stuff: int = 53,
        pixels: PixelSettings = PixelSettings(),
        backbone: BackboneSettings = BackboneSettings(),
        proposals: ProposalSettings = ProposalSettings(),
        boxes: BoxSettings = BoxSettings(),
        masks: MaskSettings = MaskSettings(),
        semantic: SemanticSettings = SemanticSettings(),
        merge: MergeSettings = MergeSettings(),
    ) -> None:
        if masks.channels != backbone.channels:
            raise ValueError(
                f"the recurrent mask head is driven by the pyramid's {backbone.channels} channels: set "
                f"masks.channels to that, not to {masks.channels}"
            )
        super().__init__(
            depth,
            things=things,
            stuff=stuff,
            pixels=pixels,
            backbone=backbone,
            proposals=proposals,
            boxes=boxes,
            masks=masks,
            semantic=semantic,
            merge=merge,
        )
        self.roi_heads.mask_head = RecurrentMaskHead(
            masks.channels, evolve, tolerance=tolerance, norm_scale=norm_scale, horizon=horizon
        )
        self.penalty = penalty
        self.report: Report | None = None

    @property
    def mask_head(self) -> RecurrentMaskHead:
        """The recurrent mask head, whose ``evolve``, ``steps`` and ``tolerance`` may be set at any time."""
        head: RecurrentMaskHead = self.roi_heads.mask_head
        return head

    @property
    def steps(self) -> int:
        """The most steps of the mask head; may be set to another number, for evaluation too."""
        return self.mask_head.steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self.mask_head.steps = steps

    @torch.no_grad()
    def unroll(
        self, images: Sequence[Tensor], *, steps: int | None = None, sizes: Sequence[Size] | None = None
    ) -> Iterator[list[PanopticResult]]:
        """What is seen in each image after each step of the mask head, all else being computed once.

        After t steps it is what the model returns with ``steps`` set to t and no ``tolerance``. All instances are
        computed together, whatever ``masks.chunk``.

        Args:
            images: as for `forward`.
            steps: how many; None takes those of the model.
            sizes: as for `forward`.

        Raises:
            ValueError: for images of another form, fewer steps than one, or in training mode.
            DivergenceError: once a state is not finite, unless ``evolve`` is told not to raise it.
        """
        if self.training:
            raise ValueError("steps are shown one by one in evaluation only; call eval() first")
        batch, heads = self.batch(images), self.roi_heads
        sizes = _original_sizes(images, None, sizes)
        features = self.backbone(batch.tensors)
        semantic = self.semantic_head(features)
        proposals, _ = self.rpn(batch, features)
        boxes, scores, labels = heads.boxes(features, proposals, batch.image_sizes, at_least=self._least_score())
        pooled, classes = heads.mask_roi_pool(features, boxes), torch.cat(labels)
        for seen in self.mask_head.unroll(pooled, steps=self.steps if steps is None else steps):
            found = together(boxes, scores, labels, heads.probabilities(seen, classes))
            yield self._merged(found, semantic, batch, sizes)

    def _extra_losses(self, run: Run | None, like: Tensor) -> dict[str, Tensor]:
        self.report = None if run is None else run.report
        if self.penalty is None:
            return {}
        if run is None:
            return {"penalty": torch.zeros_like(like)}
        return {"penalty": getattr(self.penalty, "weight", 1.0) * self.penalty(run)}


def _padded(targets: Targets, batch: Tensor) -> Tensor:
    """The semantic maps ``(B, H, W)``, padded with what is ignored."""
    maps = batch.new_full((len(batch), *batch.shape[2:]), IGNORE, dtype=torch.long)
    for row, target in zip(maps, targets, strict=True):
        semantic = target["semantic"]
        row[: semantic.shape[0], : semantic.shape[1]] = semantic
    return maps


def _check_targets(images: Sequence[Tensor], targets: Targets, things: int, stuff: int) -> None:
    if len(images) != len(targets):
        raise ValueError(f"there are {len(images)} images and {len(targets)} targets")
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        name = f"target {index} (image {target.get('image_id', 'without an id')})"
        if missing := [key for key in _NEEDED if key not in target]:
            raise ValueError(f"{name} lacks {', '.join(missing)}")
        objects, size = len(target["boxes"]), tuple(image.shape[1:])
        shapes = {"boxes": (objects, 4), "labels": (objects,), "masks": (objects, *size), "semantic": size}
        for key, shape in shapes.items():
            if tuple(target[key].shape) != shape:
                raise ValueError(f"{name} has {key} of shape {tuple(target[key].shape)}, not {shape}")
        semantic = target["semantic"]
        known = semantic.masked_fill(semantic == IGNORE, THINGS)
        if not 0 <= int(known.min()) <= int(known.max()) <= stuff:
            found = semantic.unique().tolist()
            raise ValueError(f"{name} has semantic labels outside 0 … {stuff} and {IGNORE}: {found}")
        if objects == 0:
            continue
        boxes, labels = target["boxes"], target["labels"]
        if not bool((boxes[:, 2:] > boxes[:, :2]).all()):
            raise ValueError(f"{name} has a box without area; leave such objects out")
        if not 0 <= int(labels.min()) <= int(labels.max()) < things:
            raise ValueError(f"{name} has thing labels outside 0 … {things - 1}: {labels.unique().tolist()}")


def _original_sizes(images: Sequence[Tensor], targets: Targets | None, sizes: Sequence[Size] | None) -> Sequence[Size]:
    if sizes is None and targets is not None:
        sizes = [target["size"] for target in targets]
    if sizes is None:
        return [(image.shape[1], image.shape[2]) for image in images]
    if len(sizes) != len(images):
        raise ValueError(f"there are {len(images)} images and {len(sizes)} sizes")
    return [(int(height), int(width)) for height, width in sizes]
