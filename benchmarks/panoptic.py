"""Train rows of panoptic segmentation one after the other, and measure them at several numbers of steps.

    python benchmarks/panoptic.py 'shapes_*' --seeds 0 1 --jobs 2     # resumes what was cut off
    python benchmarks/panoptic_results.py 'shapes_*' --seeds 0 1      # sets the table and draws the figure

A row is a file in `configs/panoptic`; its run lies in ``runs/NAME/version_0``, whose last weights are what is
measured, on the whole validation split: nothing is picked by its score. A row that starts from the weights of another
has that trained first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from _runs import ROOT, train_all
from torch import Tensor

import crbp
from crbp._temporarily import temporarily
from crbp.metrics import PanopticQuality
from crbp.models import RFPN, PanopticFPN
from crbp.models.panoptic.box_head import InstanceHeads
from crbp.models.panoptic.mask_head import RecurrentMaskHead, mask_targets
from crbp.models.panoptic.results import panoptic_result
from crbp.tasks import PanopticData, load_net
from crbp.tasks.panoptic import QUALITIES, segments_info
from crbp.tasks.weights import build

CONFIGS = ROOT / "configs" / "panoptic"
STEPS = (1, 2, 3, 5, 10, 20, 30)  # of the mask head, at which a recurrent network is measured
MANY = 200  # images above which it is measured at its own and at the last of these alone
Counts = Sequence[int | None]  # numbers of steps, or None alone for a mask head without them


def analyse(name: str, run: Path) -> bool:
    """Measure one run and write ``analysis.json`` beside it; an error ends the script."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    net: Any = load_net(run / "weights" / "last.safetensors")
    data = build(PanopticData, config["data"], f"the data of {name}")
    trained = net.steps if isinstance(net, RFPN) else None
    steps = STEPS if config["data"]["init_args"]["source"]["init_args"]["val"] <= MANY else STEPS[-1:]
    counts: Counts = [None] if trained is None else sorted({*steps, trained})
    found = {
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "steps": trained,
        "quality": measure(net, data, counts),
    }
    (run / "analysis.json").write_text(json.dumps(found, indent=2) + "\n")
    return True


@torch.no_grad()
def measure(net: PanopticFPN, data: PanopticData, counts: Counts) -> list[dict[str, Any]]:
    """Panoptic quality on the validation split, and the overlap of masks with the truth, after each number of steps.

    Boxes do not depend on the steps of the mask head: they are found once, and one run of it passes all numbers of
    steps. ``true_box_iou`` is the mean overlap (IoU) with the targets of training in the true boxes, of any class: of
    the mask head alone. ``true_box_pq_things`` is the quality of things were their boxes and classes found without a
    mistake, merged with the stuff that the network sees; where two masks overlap the thing named first has the pixel.
    """
    of = data.categories
    qualities, exact = ([PanopticQuality(of.as_json()) for _ in counts] for _ in range(2))
    overlaps: list[list[Tensor]] = [[] for _ in counts]
    heads = net.roi_heads
    for batch in data.val_dataloader():
        assert batch.truths is not None
        images, (target,), (truth,) = net.batch(batch.images), batch.targets, batch.truths
        features = net.backbone(images.tensors)
        proposals, _ = net.rpn(images, features)
        recurrent = isinstance(heads.mask_head, RecurrentMaskHead)
        with temporarily(heads.mask_head, steps=1) if recurrent else nullcontext():  # its masks are not looked at
            (seen,) = heads.detect(features, proposals, images.image_sizes, at_least=net.merge.score)
        (logits,) = net.semantic_head(features)
        boxes, every = target["boxes"], torch.arange(len(target["boxes"]))
        known = replace(seen, boxes=boxes, labels=target["labels"], scores=torch.ones(len(boxes)))
        for detected, of_detected in ((seen, qualities), (known, exact)):
            given = list(masks_at(heads, features, detected.boxes, detected.labels, counts))
            for quality, masks in zip(of_detected, given, strict=True):
                found = replace(detected, masks=masks)
                result = panoptic_result(found, logits, images.image_sizes[0], target["size"], net.merge)
                quality.update(result.panoptic, segments_info(result, of), *truth)
        for overlap, masks in zip(overlaps, given, strict=True):  # of those in the true boxes, which came last
            overlap.append(iou(masks >= 0.5, mask_targets(target["masks"], boxes, every, masks.shape[-1])))
    return [
        {
            "steps": steps,
            **{name: round(float(value), 5) for name, value in quality.compute().items() if name in QUALITIES},
            "true_box_iou": round(float(torch.cat(overlap).mean()), 5),
            "true_box_pq_things": round(float(known_quality.compute()["pq_things"]), 5),
        }
        for steps, quality, overlap, known_quality in zip(counts, qualities, overlaps, exact, strict=True)
    ]


def masks_at(
    heads: InstanceHeads, features: dict[str, Tensor], boxes: Tensor, labels: Tensor, counts: Counts
) -> Iterator[Tensor]:
    """Probabilities ``(n, m, m)`` of the masks in the boxes of one image, after each number of steps."""
    pooled = heads.mask_roi_pool(features, [boxes])
    for seen in _features_at(heads.mask_head, pooled, counts):
        yield heads.mask_predictor(seen)[torch.arange(len(labels)), labels].sigmoid()


def _features_at(head: Any, pooled: Tensor, counts: Counts) -> Iterator[Tensor]:
    if not isinstance(head, RecurrentMaskHead):
        yield head(pooled).features
        return
    state = head.cell.initial_state(pooled)
    for step in range(1, max(count for count in counts if count is not None) + 1):
        state = head.cell(state, pooled)
        if step in counts:
            if not bool(state.isfinite().all()):
                raise crbp.DivergenceError(f"the state of an instance is not finite after {step} steps")
            yield head.output_norm(state)


def iou(said: Tensor, true: Tensor) -> Tensor:
    """Intersection over union of masks ``(n, m, m)`` of bool, 0 where both are empty."""
    return (said & true).sum((1, 2)) / (said | true).sum((1, 2)).clamp_min(1)


if __name__ == "__main__":
    train_all(__doc__, CONFIGS, analyse)
