"""The demo's settings: the task, the model, how long it is trained. Found by trial; every one is a number to change."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import crbp
from crbp.data.pathfinder import PathfinderConfig
from crbp.gradients import GradientMethod
from crbp.models import PathfinderNet
from crbp.tasks import ContourData, Generated, LipschitzPenalty

EPOCH = 100_000  # images before one comes round again


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides what the demo's two models become, but the seed.

    Attributes:
        preset: of the generator.
        settings: put in place of the preset's.
        channels: of the cell.
        kernel_size: of the cell.
        steps: N, for both models.
        step_jitter: how many steps more than N half of the batches may have at the end of training, with C-RBP alone.
        terms: of the Neumann series.
        horizon: of the gates.
        images: seen by the model trained with C-RBP; the other trains for as long as this takes.
        lead_in: share of them, at the start, that show the shorter contours of `lead_in_length`.
        lead_in_length: dashes of those contours; tracing is learnt sooner on them and then carries over.
        batch_size: images of a batch.
        filter_scale: start of the filter bank.
        learning_rate: peak, after a short rise; it then falls to 0 on a cosine.
        beta2: of Adam.
        gamma: of the focal loss.
        penalty: on the dynamics, of C-RBP alone.
        penalty_ramp: share of the training over which its weight rises.
        validation: images never trained on, on which every number of the report is measured.
        examples: of these, shown in the figures.
    """

    preset: str = "mini"
    settings: dict[str, Any] = field(default_factory=dict)
    channels: int = 16
    kernel_size: int = 7
    steps: int = 8
    step_jitter: int = 14
    terms: int = 6
    horizon: int = 10
    images: int = 5_600
    lead_in: float = 0.2
    lead_in_length: int = 3
    batch_size: int = 16
    filter_scale: float = 2.5
    learning_rate: float = 1e-2
    beta2: float = 0.99
    gamma: float = 1.0
    penalty: LipschitzPenalty = field(default_factory=lambda: LipschitzPenalty(weight=100.0))
    penalty_ramp: float = 0.8
    validation: int = 256
    examples: int = 6

    def net(self, gradient: GradientMethod) -> PathfinderNet:
        """A fresh model that is differentiated by ``gradient``."""
        return PathfinderNet(
            crbp.cells.HGRU(self.channels, self.kernel_size, norm_scale=1.0, horizon=self.horizon),
            crbp.Evolve(steps=self.steps, gradient=gradient),
            filter_scale=self.filter_scale,
            target_share=0.05,
        )

    @property
    def config(self) -> PathfinderConfig:
        """The generator's settings, complete."""
        return PathfinderConfig.preset(self.preset, **self.settings)

    def data(self, seed: int) -> ContourData:
        """The training images, made on the fly."""
        short = {**self.settings, "contour_length": self.lead_in_length}
        return ContourData(
            Generated(preset=self.preset, settings=self.settings),
            batch_size=self.batch_size,
            train_size=EPOCH,
            lead_in=Generated(preset=self.preset, settings=short),
            lead_in_size=round(self.lead_in * self.images),
            workers=0,
            seed=seed,
        )

    @property
    def rbp(self) -> crbp.RBP:
        """The gradient of C-RBP; a series that grows early in training is cut where its terms were smallest."""
        return crbp.RBP(crbp.Neumann(terms=self.terms), on_divergence="fallback")


FULL = Recipe()
QUICK = replace(FULL, images=720, validation=96)
