"""Train rows of panoptic segmentation one after the other, and measure them at several numbers of steps.

    python benchmarks/panoptic.py 'shapes_*' --seeds 0 1 --jobs 2     # resumes what was cut off
    python benchmarks/panoptic_results.py 'shapes_*' --seeds 0 1      # sets the table and draws the figure

A row is a file in `configs/panoptic`; its run lies in ``runs/NAME/version_0``, whose last weights are what is
measured, on the whole validation split: nothing is picked by its score. A row that starts from the weights of another
has that trained first.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from _runs import ROOT, train_all
from torch import Tensor

from crbp.models import RFPN
from crbp.models.panoptic.mask_head import mask_targets
from crbp.tasks import PanopticData, PanopticTask, load_net
from crbp.tasks.weights import build

CONFIGS = ROOT / "configs" / "panoptic"
STEPS = (1, 2, 3, 5, 10, 20, 30)  # of the mask head, at which a recurrent network is measured


def analyse(name: str, run: Path) -> bool:
    """Measure one run and write ``analysis.json`` beside it; an error ends the script."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    net = load_net(run / "weights" / "last.safetensors")
    data = build(PanopticData, config["data"], f"the data of {name}")
    trained = net.steps if isinstance(net, RFPN) else None
    counts = [trained] if trained is None else sorted({*STEPS, trained})
    overlaps = in_true_boxes(net, data, counts)
    found = {
        "parameters": sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad),
        "steps": trained,
        "quality": [
            {"steps": steps, **quality(net, data, steps, precise=steps == trained), "true_box_iou": overlap}
            for steps, overlap in zip(counts, overlaps, strict=True)
        ],
    }
    (run / "analysis.json").write_text(json.dumps(found, indent=2) + "\n")
    return True


@torch.no_grad()
def in_true_boxes(net: Any, data: PanopticData, counts: Sequence[int | None]) -> list[float]:
    """Mean overlap (IoU) of masks with the targets of training in the true boxes, of any class: the mask head alone."""
    overlaps: list[list[Tensor]] = [[] for _ in counts]
    for batch in data.val_dataloader():
        images, (target,) = net.batch(batch.images), batch.targets
        features = net.backbone(images.tensors)
        every = torch.arange(len(target["boxes"]))
        for steps, found in zip(counts, overlaps, strict=True):
            if steps is not None:
                net.steps = steps
            masks, _ = net.roi_heads.masks(features, [target["boxes"]], target["labels"])
            said = masks >= 0.5
            true = mask_targets(target["masks"], target["boxes"], every, masks.shape[-1])
            found.append((said & true).sum((1, 2)) / (said | true).sum((1, 2)).clamp_min(1))
    return [round(float(torch.cat(found).mean()), 5) for found in overlaps]


def quality(net: Any, data: PanopticData, steps: int | None, *, precise: bool) -> dict[str, float]:
    """Panoptic quality on the validation split, and average precision where it is wanted: it takes its time."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, inference_mode=True
    )
    task = PanopticTask(net, steps=steps, average_precision=precise)
    (found,) = trainer.validate(task, data, verbose=False)
    return {name.removeprefix("val/"): round(value, 5) for name, value in found.items()}


if __name__ == "__main__":
    train_all(__doc__, CONFIGS, analyse)
