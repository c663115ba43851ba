"""The heads on proposed boxes: which class, which box, which mask, with detectron2's classes, losses and selection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms, clip_boxes_to_image

from crbp.evolve import Run
from crbp.models.panoptic._pool import PyramidPool, at_least_float32
from crbp.models.panoptic.mask_head import MaskHead, MaskPredictor, mask_loss, mask_targets
from crbp.models.panoptic.settings import BoxSettings, MaskSettings

Targets = list[dict[str, Tensor]]
DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


class BoxHead(TwoMLPHead):
    """Two hidden layers on the pooled features, started as detectron2 does."""

    def __init__(self, in_channels: int, representation_size: int) -> None:
        super().__init__(in_channels, representation_size)
        for layer in (self.fc6, self.fc7):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)


class BoxPredictor(FastRCNNPredictor):
    """Scores of the thing classes, with the background last, and box deltas of each of them.

    torchvision has the background first and deltas for it as well.
    """

    def __init__(self, channels: int, things: int) -> None:
        super().__init__(channels, things + 1)
        self.bbox_pred = nn.Linear(channels, 4 * things)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        for layer in (self.cls_score, self.bbox_pred):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(n, things + 1)`` and ``(n, 4 things)`` from ``(n, channels)``, also under autocast in float32."""
        return at_least_float32(self.cls_score(x)), at_least_float32(self.bbox_pred(x))


@dataclass(kw_only=True)
class Detections:
    """What was found in one image.

    Attributes:
        boxes: ``(n, 4)``, corners in pixels of the image that the model was shown.
        scores: ``(n,)``.
        labels: ``(n,)``, contiguous thing labels.
        masks: ``(n, m, m)``, probabilities within each box.
        steps: ``(n,)``, steps that each instance's recurrence took, where instances stop by themselves.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor
    steps: Tensor | None = None


def together(
    boxes: list[Tensor], scores: list[Tensor], labels: list[Tensor], masks: Tensor, steps: Tensor | None = None
) -> list[Detections]:
    """The detections of each image, from the masks ``(n, m, m)`` and the steps ``(n,)`` of all of them."""
    sizes = [len(box) for box in boxes]
    every_steps = [None] * len(boxes) if steps is None else torch.split(steps, sizes)
    return [
        Detections(boxes=box, scores=score, labels=label, masks=mask, steps=taken)
        for box, score, label, mask, taken in zip(
            boxes, scores, labels, torch.split(masks, sizes), every_steps, strict=True
        )
    ]


class InstanceHeads(RoIHeads):
    """Classes, boxes and masks of proposals.

    Training compares 512 proposals an image, ground truth among them, with the objects: cross-entropy over classes and
    background, the L1 distance of encoded boxes over those on an object divided by the number of all, and the binary
    cross-entropy of the masks of the right class.

    Args:
        channels: of the features.
        things: number of thing classes.
        canonical_size: see `BackboneSettings`.
        boxes: see `BoxSettings`.
        masks: see `MaskSettings`.
        mask_head: what comes between the pooled features and the mask predictor.

    Source: He et al., Mask R-CNN, ICCV 2017.
    """

    def __init__(
        self,
        channels: int,
        things: int,
        canonical_size: int,
        *,
        boxes: BoxSettings,
        masks: MaskSettings,
        mask_head: MaskHead,
    ) -> None:
        super().__init__(
            PyramidPool(boxes.size, canonical_size),
            BoxHead(channels * boxes.size**2, boxes.channels),
            BoxPredictor(boxes.channels, things),
            boxes.foreground,
            boxes.foreground,
            boxes.samples,
            boxes.positive_share,
            DELTA_WEIGHTS,
            boxes.score,
            boxes.nms,
            boxes.detections,
            PyramidPool(masks.size, canonical_size),
            mask_head,
            MaskPredictor(masks.channels, things),
        )
        self.things, self.chunk = things, masks.chunk

    def losses(
        self, features: dict[str, Tensor], proposals: list[Tensor], targets: Targets
    ) -> tuple[dict[str, Tensor], Run | None]:
        """The losses of a batch, and the run of the mask head where it is recurrent."""
        # torchvision samples with the background as class 0; it comes last from here on.
        shifted = [target | {"labels": target["labels"] + 1} for target in targets]
        proposals, matched, labels, deltas = self.select_training_samples(proposals, shifted)
        classes = [torch.where(label == 0, self.things, label - 1) for label in labels]
        hidden = self.box_head(self.box_roi_pool(features, proposals))
        scores, found = self.box_predictor(hidden)
        losses = self._box_losses(scores, found, torch.cat(classes), torch.cat(deltas))
        on_object = [label < self.things for label in classes]
        boxes = [box[chosen] for box, chosen in zip(proposals, on_object, strict=True)]
        seen = self.mask_head(self.mask_roi_pool(features, boxes))
        logits = self.mask_predictor(seen.features)
        wanted = torch.cat(
            [
                mask_targets(target["masks"], box, match[chosen], logits.shape[-1])
                for target, box, match, chosen in zip(targets, boxes, matched, on_object, strict=True)
            ]
        )
        own = torch.cat([label[chosen] for label, chosen in zip(classes, on_object, strict=True)])
        return losses | {"mask": mask_loss(logits, own, wanted)}, seen.run

    def _box_losses(self, scores: Tensor, deltas: Tensor, classes: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        count = max(len(classes), 1)
        on_object = torch.where(classes < self.things)[0]
        own = deltas.view(len(deltas), self.things, 4)[on_object, classes[on_object]]
        return {
            "box_class": F.cross_entropy(scores, classes, reduction="sum") / count,
            "box_delta": F.l1_loss(own, wanted[on_object], reduction="sum") / count,
        }

    def detect(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        *,
        at_least: float = 0.0,
    ) -> list[Detections]:
        """What is found in each image, of the scores wanted. A detection is suppressed by better ones only."""
        boxes, scores, labels = self.boxes(features, proposals, image_shapes, at_least=at_least)
        masks, steps = self.masks(features, boxes, torch.cat(labels))
        return together(boxes, scores, labels, masks, steps)

    def boxes(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        *,
        at_least: float = 0.0,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Boxes, scores and labels of `detect`, of each image."""
        hidden = self.box_head(self.box_roi_pool(features, proposals))
        logits, deltas = self.box_predictor(hidden)
        found = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        wanted = [scores >= at_least for scores in found[1]]
        boxes, scores, labels = ([v[rows] for v, rows in zip(each, wanted, strict=True)] for each in found)
        return boxes, scores, labels

    def masks(self, features: dict[str, Tensor], boxes: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Probabilities ``(n, m, m)`` of the masks in given boxes, a chunk of boxes at a time.

        Args:
            features: of the pyramid.
            boxes: ``(n, 4)`` of each image, corners in pixels.
            labels: ``(n,)``, the classes of all boxes, whose masks are wanted.

        Returns:
            The probabilities, and the steps of each instance, ``(n,)``, where instances stop by themselves.
        """
        pooled = self.mask_roi_pool(features, boxes)
        probabilities, steps = [], []
        chunk = self.chunk or max(len(pooled), 1)
        for rows, classes in zip(torch.split(pooled, chunk), torch.split(labels, chunk), strict=True):
            seen = self.mask_head(rows)
            probabilities.append(self.probabilities(seen.features, classes))
            steps.append(seen.steps)
        taken = [each for each in steps if each is not None]
        return torch.cat(probabilities), torch.cat(taken) if taken else None

    def probabilities(self, features: Tensor, labels: Tensor) -> Tensor:
        """``(n, m, m)`` of the masks of given classes ``(n,)``, from what the mask head made of each box."""
        logits = self.mask_predictor(features)
        return at_least_float32(logits[torch.arange(len(labels), device=labels.device), labels]).sigmoid()

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Boxes, scores and labels of each image's best detections, class by class suppressed."""
        sizes = [len(box) for box in proposals]
        decoded = self.box_coder.decode(box_regression, proposals).view(-1, self.things, 4)
        found: tuple[list[Tensor], list[Tensor], list[Tensor]] = [], [], []
        by_image = torch.split(decoded, sizes), torch.split(class_logits.softmax(dim=1), sizes)
        for boxes, scores, shape in zip(*by_image, image_shapes, strict=True):
            finite = boxes.isfinite().all(dim=2).all(dim=1) & scores.isfinite().all(dim=1)
            # The background, which is last, is no detection.
            row, label = torch.where(finite[:, None] & (scores[:, :-1] > self.score_thresh))
            box, score = clip_boxes_to_image(boxes[row, label], shape), scores[row, label]
            kept = batched_nms(box, score, label, self.nms_thresh)[: self.detections_per_img]
            for values, each in zip(found, (box, score, label), strict=True):
                values.append(each[kept])
        return found
