"""Quality of traced contours. One count of pixels serves every number, so all of them agree by construction."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from crbp.losses import check_maps


def contour_metrics() -> MetricCollection:
    """F1, IoU, precision, recall and balanced accuracy of the target class, over all pixels seen since the last reset.

    With TP, FP, FN and TN the pixels of all images together: ``precision = TP / (TP + FP)``, ``recall = TP / (TP +
    FN)``, ``F1 = 2 TP / (2 TP + FP + FN)``, ``IoU = TP / (TP + FP + FN) = F1 / (2 − F1)``, ``balanced accuracy =
    (recall + TN / (TN + FP)) / 2``. Each lies in [0, 1]; a ratio of 0 to 0 is 0. The counts are summed over processes.

    The collection is updated with logits ``(B, 2, H, W)``, of which it takes the larger, and a mask ``(B, H, W)`` of
    bool, and raises ``ValueError`` for other shapes. Its keys are ``f1``, ``iou``, ``precision``, ``recall`` and
    ``balanced_accuracy``.
    """
    return MetricCollection(
        {
            "f1": _F1(),
            "iou": _IoU(),
            "precision": _Precision(),
            "recall": _Recall(),
            "balanced_accuracy": _BalancedAccuracy(),
        }
    )


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return part / whole.clamp_min(1)  # the counts are whole numbers, so this changes nothing but 0 / 0


class _PixelCounts(Metric):
    """Counts of pixels, ``tp``, ``fp``, ``fn`` and ``tn``, which the metrics of one collection share."""

    tp: Tensor
    fp: Tensor
    fn: Tensor
    tn: Tensor
    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("tp", "fp", "fn", "tn"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, mask: Tensor) -> None:
        check_maps(logits, mask)
        found = logits.argmax(dim=1).bool()
        self.tp += (found & mask).sum()
        self.fp += (found & ~mask).sum()
        self.fn += (~found & mask).sum()
        self.tn += (~found & ~mask).sum()


class _F1(_PixelCounts):
    def compute(self) -> Tensor:
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)


class _IoU(_PixelCounts):
    def compute(self) -> Tensor:
        return _ratio(self.tp, self.tp + self.fp + self.fn)


class _Precision(_PixelCounts):
    def compute(self) -> Tensor:
        return _ratio(self.tp, self.tp + self.fp)


class _Recall(_PixelCounts):
    def compute(self) -> Tensor:
        return _ratio(self.tp, self.tp + self.fn)


class _BalancedAccuracy(_PixelCounts):
    def compute(self) -> Tensor:
        return (_ratio(self.tp, self.tp + self.fn) + _ratio(self.tn, self.tn + self.fp)) / 2
