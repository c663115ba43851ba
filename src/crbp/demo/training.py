"""Train and measure one of the demo's models, in a process of its own with one thread."""

from __future__ import annotations

import logging
import math
import time
import warnings
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor

import crbp
from crbp.analysis import Trajectory, follow, late_radius
from crbp.data.pathfinder import Pathfinder
from crbp.demo.recipe import Recipe
from crbp.gradients import GradientMethod
from crbp.models import PathfinderNet
from crbp.ops import keep_freed_memory
from crbp.tasks import ContourTask
from crbp.tasks.sampling import stacked

if TYPE_CHECKING:
    Progress = Synchronized[float]  # shared between processes: the share of the training done, from 0 to 1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one model.

    Attributes:
        weights: the model's `state_dict`.
        images: seen in training.
        seconds: spent in training.
        trajectory: over the validation images to 4N, with the probabilities on the examples.
        radius: spectral radius at the state after 4N steps, one for each of some validation images, ``(B,)``.
        converged: whether that estimate is to be trusted, ``(B,)``.
    """

    weights: dict[str, Tensor]
    images: int
    seconds: float
    trajectory: Trajectory
    radius: Tensor
    converged: Tensor


WARMUP = 0.02  # share of the training over which the learning rate rises
RADII = 32  # images whose spectral radius is measured


class _Lead(pl.Callback):
    """Tell how far the training is."""

    def __init__(self, progress: Progress, batches: int) -> None:
        self.progress, self.batches = progress, batches

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.progress.value = trainer.global_step / self.batches


class _Follow(pl.Callback):
    """Train for as long as the other process does, on the schedule that its progress gives."""

    def __init__(self, progress: Progress, learning_rate: float) -> None:
        self.progress, self.learning_rate = progress, learning_rate

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        share = self.progress.value
        factor = min(1.0, (share + 1e-3) / WARMUP) * (1 + math.cos(math.pi * share)) / 2
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.learning_rate * factor

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = self.progress.value >= 1


def crbp_model(recipe: Recipe, progress: Progress, seed: int) -> Outcome:
    """Train with C-RBP on ``recipe.images`` images and measure the model."""
    batches = recipe.images // recipe.batch_size
    task = _task(
        recipe,
        recipe.rbp,
        seed,
        penalty=recipe.penalty,
        penalty_ramp=recipe.penalty_ramp,
        residual_weight=0.0,  # its state settles without these two
        spectral_weight=0.0,
        step_jitter=recipe.step_jitter,
        warmup=WARMUP,
    )
    return _train(task, recipe, seed, _Lead(progress, batches), max_steps=batches)


def bptt_model(recipe: Recipe, progress: Progress, seed: int) -> Outcome:
    """Train with BPTT, the ordinary way, until the process that trains with C-RBP is done, and measure the model."""
    task = _task(recipe, crbp.BPTT(), seed, schedule="constant", warmup=0.0)
    return _train(task, recipe, seed, _Follow(progress, recipe.learning_rate), max_steps=-1)


def validation(recipe: Recipe, seed: int) -> tuple[Tensor, Tensor]:
    """Images ``(B, 1, H, W)`` and masks ``(B, H, W)`` that no model is trained on."""
    data = Pathfinder(config=recipe.config, split="val", size=recipe.validation, seed=seed)
    return stacked(data, recipe.validation)


def _task(recipe: Recipe, gradient: GradientMethod, seed: int, **settings: Any) -> ContourTask:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    keep_freed_memory()
    return ContourTask(
        recipe.net(gradient),
        learning_rate=recipe.learning_rate,
        beta2=recipe.beta2,
        gamma=recipe.gamma,
        spectral_radius=False,
        **settings,
    )


def _train(task: ContourTask, recipe: Recipe, seed: int, pace: pl.Callback, *, max_steps: int) -> Outcome:
    _quiet()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        max_epochs=-1,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        callbacks=[pace],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(task, datamodule=recipe.data(seed))
    seconds = time.perf_counter() - start
    net = task.net
    assert isinstance(net, PathfinderNet)
    return _measure(net.eval(), recipe, seed, images=trainer.global_step * recipe.batch_size, seconds=seconds)


def _quiet() -> None:
    """Keep what would break into the progress bar and tells the user nothing to act on from being printed."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Lightning 2.6 with the newest torch.
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
    # One process on one core is what is wanted here.
    warnings.filterwarnings("ignore", r".*does not have many workers")


def _measure(net: PathfinderNet, recipe: Recipe, seed: int, *, images: int, seconds: float) -> Outcome:
    image, mask = validation(recipe, seed)
    late = 4 * recipe.steps
    radius, converged = late_radius(net, image[:RADII], steps=late, seed=seed)
    return Outcome(
        weights=net.state_dict(),
        images=images,
        seconds=seconds,
        trajectory=follow(net, image, mask, steps=late, shown=recipe.examples),
        radius=radius,
        converged=converged,
    )
