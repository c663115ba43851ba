"""Panoptic shapes, networks and trainers small enough for a test, and results without a mistake."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch

import crbp
from crbp.data.panoptic import Categories
from crbp.models import RFPN, PanopticFPN
from crbp.models.panoptic import PanopticResult, mini_settings
from crbp.models.panoptic.settings import BoxSettings, MaskSettings, ProposalSettings, SemanticSettings
from crbp.tasks import GeneratedShapes, LipschitzPenalty, PanopticData
from crbp.tasks.panoptic import instances

SHAPES = GeneratedShapes(size=128, train=10, val=3)


def tiny_net(kind: str = "rfpn", *, norm: Literal["group", "batch"] = "group", **changes: Any) -> PanopticFPN:
    torch.manual_seed(0)
    settings = mini_settings(128) | {
        "things": 10,
        "stuff": 6,
        "proposals": ProposalSettings(
            anchor_sizes=(12.0, 20.0, 32.0, 48.0, 80.0),
            before_nms=50,
            before_nms_test=50,
            after_nms=25,
            after_nms_test=25,
            samples=32,
        ),
        "boxes": BoxSettings(channels=32, samples=16, detections=5, score=0.0),
        "masks": MaskSettings(channels=32, size=6),
        "semantic": SemanticSettings(channels=32),
    }
    settings["backbone"] = replace(settings["backbone"], norm=norm, channels=32)
    if kind == "fpn":
        return PanopticFPN(**settings, **changes)
    evolve = crbp.Evolve(steps=3, gradient=crbp.RBP(crbp.Neumann(terms=2), on_divergence="fallback"))
    penalty = LipschitzPenalty(weight=1e-3, bound=0.95, reduction="sum_square")
    return RFPN(**settings, evolve=evolve, penalty=penalty, **changes)


def tiny_data(**settings: Any) -> PanopticData:
    defaults: dict[str, Any] = {"batch_size": 2, "shortest": (96, 128), "shortest_test": 128, "longest": 128}
    return PanopticData(SHAPES, **{**defaults, "workers": 0, **settings})


def trainer(folder: Path, **settings: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "default_root_dir": folder, "enable_model_summary": False,
        "enable_progress_bar": False, "log_every_n_steps": 1, "logger": False, "max_steps": 2,
        "num_sanity_val_steps": 0, "limit_val_batches": 0,
    }  # fmt: skip
    return pl.Trainer(**{**defaults, **settings})


def true_result(truth: Any, categories: Categories) -> PanopticResult:
    """The result of a network that makes no mistake, crowds left out."""
    ids, listed = truth
    segments, kept = [], torch.zeros_like(ids)
    for segment in listed:
        if segment["iscrowd"]:
            continue
        kept[ids == segment["id"]] = segment["id"]
        thing = categories.isthing(segment["category_id"])
        label = (categories.thing_label if thing else categories.semantic_label)(segment["category_id"])
        found = {"id": segment["id"], "label": label, "isthing": thing, "area": segment["area"]}
        segments.append(found | ({"score": 1.0} if thing else {}))
    things = instances((ids, [s for s in listed if not s["iscrowd"]]), categories)
    return PanopticResult(
        panoptic=kept,
        segments=segments,
        boxes=things["boxes"],
        scores=torch.ones(len(things["boxes"])),
        labels=things["labels"],
        masks=things["masks"],
    )
