"""A warning for a training that is wrecked without a number that is not finite: it has learnt nothing."""

from __future__ import annotations

import math
import warnings

import lightning.pytorch as pl
from torch import Tensor

from crbp._checks import count
from crbp.errors import LearningWarning
from crbp.tasks._resume import ResumableModule


class LearningCheck(pl.Callback):
    """Warn where the loss is no better than that of an answer that looks at no image.

    The task says what such an answer would cost: `ContourTask` the best constant one, `PanopticTask` one that takes all
    classes to be equally likely. The first quarter of the training, at most ``10 · patience`` steps, is left alone.

    Args:
        patience: batches over which the loss is averaged.

    Raises:
        ValueError: if that is below 1.
    """

    def __init__(self, *, patience: int = 100) -> None:
        count("patience", patience)
        self.patience = patience
        self._sums: list[Tensor] = []
        self._seen = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        """Add a batch to the mean; once it is complete, look at it."""
        if not isinstance(pl_module, ResumableModule) or pl_module.progress is None:
            return
        if trainer.global_step <= min(trainer.estimated_stepping_batches / 4, 10 * self.patience):
            return
        # Added up on the device, which is not waited for at every batch.
        self._sums = [a + b for a, b in zip(self._sums, pl_module.progress, strict=False)] or list(pl_module.progress)
        self._seen += 1
        if self._seen < self.patience:
            return
        loss, blind = (float(each) for each in self._sums)
        self._sums, self._seen = [], 0
        if math.isfinite(loss) and loss >= blind and trainer.is_global_zero:
            warnings.warn(
                f"step {trainer.global_step}: the loss of the last {self.patience} batches is "
                f"{loss / self.patience:.3g} on average, that of an answer that looks at no image "
                f"{blind / self.patience:.3g}: nothing is learnt; lower learning_rate, now "
                f"{trainer.optimizers[0].param_groups[0]['lr']:.2g}, or start again from an earlier checkpoint",
                LearningWarning,
                stacklevel=2,
            )
