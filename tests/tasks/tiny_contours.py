"""A task small enough to train in a test: 12 × 12 images of a line whose left end is bright."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import Dataset

import crbp
from crbp.models import PathfinderNet
from crbp.tasks import ContourData, ContourSource, ContourTask, LipschitzPenalty

# Raised inside Lightning by a change in torch; nothing that crbp could set avoids it.
LEAF_SPEC = "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"


class _Lines(Dataset[Any]):
    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed * 10_000 + index)
        marked, other = torch.randperm(12, generator=generator)[:2].tolist()
        image, mask = torch.zeros(1, 12, 12), torch.zeros(12, 12, dtype=torch.bool)
        image[0, [marked, other], 2:10] = 0.7
        image[0, marked, 0:2] = 1.0
        mask[marked, 0:10] = True
        return {"image": image, "mask": mask, "label": index}


@dataclass(frozen=True)
class Lines(ContourSource):
    def items(self, split: str, size: int, seed: int) -> Any:
        return _Lines(size, seed + {"train": 0, "val": 1, "test": 2}[split])


def tiny_data(**settings: Any) -> ContourData:
    defaults: dict[str, Any] = {"batch_size": 4, "train_size": 22, "val_size": 10, "test_size": 10, "workers": 0}
    return ContourData(Lines(), **{**defaults, **settings})


def tiny_net(
    gradient: crbp.GradientMethod | None = None, *, cell: str = "HGRU", steps: int = 4, norm: Any = "instance"
) -> PathfinderNet:
    torch.manual_seed(0)
    extra: dict[str, Any] = {"norm": norm, "norm_scale": 1.0} if cell == "HGRU" else {}
    made = getattr(crbp.cells, cell)(4, 3, horizon=steps, **extra)
    method = gradient or crbp.RBP(crbp.Neumann(terms=3), on_divergence="fallback")
    return PathfinderNet(made, crbp.Evolve(steps=steps, gradient=method), norm=norm)


def tiny_task(gradient: crbp.GradientMethod | None = None, **settings: Any) -> ContourTask:
    defaults: dict[str, Any] = {"penalty": LipschitzPenalty(weight=1.0), "learning_rate": 5e-3}
    return ContourTask(tiny_net(gradient), **{**defaults, **settings})


def trainer(folder: Any, **settings: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "default_root_dir": folder,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "inference_mode": False,
        "log_every_n_steps": 1,
        "logger": False,
        "max_epochs": 1,
    }
    return pl.Trainer(**{**defaults, **settings})
