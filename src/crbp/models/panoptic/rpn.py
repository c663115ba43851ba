"""The region proposal network with detectron2's anchors, losses and order of proposals."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import batched_nms, clip_boxes_to_image

from crbp.errors import DivergenceError
from crbp.models.panoptic._pool import at_least_float32
from crbp.models.panoptic.backbone import STRIDES
from crbp.models.panoptic.settings import ProposalSettings


class Anchors(AnchorGenerator):
    """Anchors whose corners are not rounded, on grids of the fixed strides 4 … 64 that start in the image's corner.

    torchvision rounds the corners and takes the strides from the sizes of image and feature maps at hand, which for P6
    is not 64 where the image's sides are no multiples of 64.
    """

    def generate_anchors(
        self,
        scales: list[float],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008  # torchvision's signature
    ) -> Tensor:
        """Corners ``(ratios · sizes, 4)`` around 0, in pixels."""
        corners = []
        for size in scales:
            for ratio in aspect_ratios:
                width = math.sqrt(size**2 / ratio)
                height = ratio * width
                corners.append([-width / 2, -height / 2, width / 2, height / 2])
        return torch.tensor(corners, dtype=dtype, device=device)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors of all levels, ``(H W A, 4)`` after one another, the same for each image."""
        # Of the precision that places need, whatever the features have under autocast.
        self.set_cell_anchors(at_least_float32(feature_maps[0]).dtype, feature_maps[0].device)
        strides = [[stride, stride] for stride in STRIDES]
        anchors = torch.cat(self.grid_anchors([list(feature.shape[-2:]) for feature in feature_maps], strides))
        return [anchors] * len(image_list.image_sizes)


class ProposalHead(RPNHead):
    """A 3×3 convolution, and 1×1 ones for objectness and box deltas."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """``(B, A, H, W)`` and ``(B, 4 A, H, W)`` for each level, also under autocast in float32."""
        logits, deltas = super().forward(x)
        return [at_least_float32(each) for each in logits], [at_least_float32(each) for each in deltas]


class ProposalNetwork(RegionProposalNetwork):
    """Proposes boxes that may hold an object.

    ``loss = (Σ BCE + Σ |Δ − Δ*|) / (samples · images)``, the second sum over the sampled anchors on an object; whatever
    number of anchors is found, the divisor stays.

    Args:
        channels: of the features.
        settings: see `ProposalSettings`.

    Source: Ren et al., Faster R-CNN, NeurIPS 2015.
    """

    def __init__(self, channels: int, settings: ProposalSettings) -> None:
        super().__init__(
            Anchors(tuple((size,) for size in settings.anchor_sizes), (settings.anchor_ratios,) * len(STRIDES)),
            ProposalHead(channels, len(settings.anchor_ratios)),
            settings.foreground,
            settings.background,
            settings.samples,
            settings.positive_share,
            {"training": settings.before_nms, "testing": settings.before_nms_test},
            {"training": settings.after_nms, "testing": settings.after_nms_test},
            settings.nms,
        )

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The best boxes of each image, ordered by logit, since probabilities near 1 are equal in float32."""
        logits = objectness.detach().view(len(image_shapes), -1)
        if self.training and not (bool(logits.isfinite().all()) and bool(proposals.isfinite().all())):
            raise DivergenceError(
                "the proposals are not finite: training has diverged; lower the learning rate or lengthen its warm-up"
            )
        level = torch.arange(len(num_anchors_per_level), device=logits.device)
        levels = level.repeat_interleave(torch.tensor(num_anchors_per_level, device=logits.device))
        chosen = self._get_top_n_idx(logits, num_anchors_per_level)
        boxes, scores = [], []
        for index, all_boxes, all_logits, shape in zip(chosen, proposals, logits, image_shapes, strict=True):
            finite = all_boxes[index].isfinite().all(dim=1) & all_logits[index].isfinite()
            box, score = clip_boxes_to_image(all_boxes[index], shape), all_logits[index]
            usable = finite & (box[:, 2] > box[:, 0]) & (box[:, 3] > box[:, 1])
            box, score = box[usable], score[usable]
            kept = batched_nms(box, score, levels[index][usable], self.nms_thresh)[: self.post_nms_top_n()]
            boxes.append(box[kept])
            scores.append(score[kept])
        return boxes, scores

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The two losses, divided by the number of samples asked for and not by that found."""
        positive, negative = (torch.cat(masks).bool() for masks in self.fg_bg_sampler(labels))
        sampled = positive | negative
        divisor = self.fg_bg_sampler.batch_size_per_image * len(labels)
        box = F.l1_loss(pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], reduction="sum")
        logits, wanted = objectness.flatten()[sampled], torch.cat(labels)[sampled]
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / divisor, box / divisor
