from __future__ import annotations

import pytest
import torch
import torchmetrics.functional.classification as reference
from torch import Tensor

from crbp.metrics import contour_metrics


def maps(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, 8, 8, generator=generator), torch.rand(3, 8, 8, generator=generator) > 0.8


def measure(*batches: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    metrics = contour_metrics()
    for logits, mask in batches:
        metrics.update(logits, mask)
    return dict(metrics.compute())


def test_identities() -> None:
    found = measure(maps(0), maps(1))
    f1, precision, recall = found["f1"], found["precision"], found["recall"]
    torch.testing.assert_close(found["iou"], f1 / (2 - f1))
    torch.testing.assert_close(f1, 2 * precision * recall / (precision + recall))


def test_agrees_with_torchmetrics() -> None:
    logits, mask = maps(0)
    found, labels = measure((logits, mask)), logits.argmax(1)
    torch.testing.assert_close(found["f1"], reference.binary_f1_score(labels, mask))
    torch.testing.assert_close(found["iou"], reference.binary_jaccard_index(labels, mask))
    torch.testing.assert_close(found["precision"], reference.binary_precision(labels, mask))
    torch.testing.assert_close(found["recall"], reference.binary_recall(labels, mask))
    balanced = reference.multiclass_accuracy(labels, mask.long(), num_classes=2, average="macro")
    torch.testing.assert_close(found["balanced_accuracy"], balanced)


def test_pixels_are_pooled_over_batches() -> None:
    batches = [maps(0), maps(1)]
    pooled = (torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches]))
    assert measure(*batches) == measure(pooled)


def test_chance_is_a_half_and_perfect_is_one() -> None:
    _, mask = maps(0)
    perfect = torch.stack([~mask, mask], dim=1).float()
    assert all(value == 1 for value in measure((perfect, mask)).values())
    nothing = torch.stack([torch.ones(3, 8, 8), torch.zeros(3, 8, 8)], dim=1)
    found = measure((nothing, mask))
    assert found["balanced_accuracy"] == 0.5
    assert found["f1"] == found["precision"] == found["recall"] == found["iou"] == 0


def test_the_counts_are_kept_once() -> None:
    metrics = contour_metrics()
    metrics.update(*maps(0))
    assert len(metrics.compute_groups) == 1


def test_mistakes() -> None:
    logits, mask = maps(0)
    with pytest.raises(ValueError, match="logits must have shape"):
        contour_metrics().update(logits[:, :1], mask)
