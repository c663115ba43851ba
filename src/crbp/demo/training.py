"""Train and measure one of the demo's models, in a process of its own with one thread."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor

import crbp
from crbp.analysis import Trajectory, arrival_steps, follow
from crbp.data.pathfinder import Pathfinder, PathfinderConfig
from crbp.demo.recipe import Recipe
from crbp.models import PathfinderNet
from crbp.tasks import ContourData, ContourTask, Generated

Share = Synchronized  # of a float: the share of the training done, 0 to 1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one model.

    Attributes:
        trajectory: F1 and residual after every step to 4N, over the validation images.
        radius: spectral radius at 4N of some validation images, ``(B,)``.
        settled: whether the estimate of each has converged, ``(B,)``.
        arrival: step that reached each pixel of the examples for good, ``(B, H, W)``, in N steps.
        arrival_late: the same in 4N steps.
        probability: of the target after each of 4N steps on the examples, ``(4N, B, H, W)``.
        weights: of the model.
        images: seen in training.
        seconds: of training.
        failed_solves: backward solves that diverged, as a share of all.
    """

    trajectory: Trajectory
    radius: Tensor
    settled: Tensor
    arrival: Tensor
    arrival_late: Tensor
    probability: Tensor
    weights: dict[str, Tensor]
    images: int
    seconds: float
    failed_solves: float


class _Lead(pl.Callback):
    """Tell how far the training is."""

    def __init__(self, progress: Share, total: int) -> None:
        self.progress, self.total = progress, total

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.progress.value = trainer.global_step / self.total


class _Follow(pl.Callback):
    """Train for as long as another process does, on the schedule that its progress gives."""

    def __init__(self, progress: Share, learning_rate: float) -> None:
        self.progress, self.learning_rate = progress, learning_rate

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        done = self.progress.value
        factor = min(1.0, done / 0.02 + 0.02) * (1 + math.cos(math.pi * done)) / 2
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.learning_rate * factor

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        trainer.should_stop = self.progress.value >= 1


def train(name: str, recipe: Recipe, progress: Share, seed: int) -> Outcome:
    """Train one model and measure it.

    Args:
        name: ``"crbp"``, which sees ``recipe.images`` images, or ``"bptt"``, which trains until that one is done.
        recipe: the settings.
        progress: shared by both; the first writes it, the second reads it.
        seed: of weights and images.
    """
    torch.set_num_threads(1)
    leads = name == "crbp"
    net = _train(recipe, progress, seed) if leads else _train_beside(recipe, progress, seed)
    raise RuntimeError
