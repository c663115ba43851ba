"""What a run needs to go on exactly where it was cut off, and to leave its end behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor


class LastCheckpoint(Checkpoint):
    """Keep ``checkpoints/last.ckpt`` beside the logs: the state after every validation and at the end of training.

    Lightning's own ``save_last`` writes it only where the best checkpoint is written too.
    """

    def __init__(self) -> None:
        self._saved = -1

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the state of this moment; that of the end of an epoch once the epoch is over."""
        fitting = trainer.state.fn is TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end of an epoch."""
        self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end, where no epoch ends."""
        if self._saved != trainer.global_step:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        self._saved = trainer.global_step
        trainer.save_checkpoint(Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "last.ckpt")


class Restoring(pl.Callback):
    """Knows whether a checkpoint is being taken up, since what goes wrong then is the file's fault.

    Attributes:
        active: from the setup of the trainer until its first stage starts.
    """

    def __init__(self) -> None:
        self.active = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The checkpoint comes next."""
        self.active = True

    def _over(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.active = False

    on_train_start = on_validation_start = on_test_start = on_predict_start = _over


class ResumableModule(pl.LightningModule):
    """A module whose checkpoints hold the state of the random numbers, so that one that draws some resumes exactly."""

    def __init__(self) -> None:
        super().__init__()
        self._rng: dict[str, Tensor] | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the state of the random numbers."""
        checkpoint["rng"] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            checkpoint["rng"]["cuda"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state of the random numbers until training starts."""
        self._rng = checkpoint.get("rng")
        if self._rng is not None:
            torch.Generator().set_state(self._rng["cpu"].cpu())  # a broken state is refused while it is read

    def on_train_start(self) -> None:
        """Take up the random numbers where the checkpoint left them."""
        if self._rng is None:
            return
        torch.set_rng_state(self._rng["cpu"].cpu())
        if self.device.type == "cuda" and "cuda" in self._rng:
            torch.cuda.set_rng_state(self._rng["cuda"].cpu(), self.device)
        self._rng = None
