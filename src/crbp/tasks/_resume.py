"""What a run needs to go on exactly where it was cut off, and to leave its end behind."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

import crbp
from crbp._files import write_whole


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there, so that a kill or a full disk leaves the last one whole.

    A plugin of the trainer. Lightning's own writes it in the system's folder of temporary files, from which it is
    copied into place where that is another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write a checkpoint to the local file ``path``.

        Raises:
            StorageError: if it cannot be written.
        """
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_whole(Path(path), content.getbuffer())


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
        trainer.save_checkpoint(last_checkpoint(trainer))


def last_checkpoint(trainer: pl.Trainer) -> Path:
    """Where `LastCheckpoint` keeps it."""
    return Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "last.ckpt"


class ResumableModule(pl.LightningModule):
    """A module whose checkpoints hold the state of the random numbers, so that one that draws some resumes exactly.

    Attributes:
        progress: loss of the last training batch, without penalties, and what an answer that looks at no image would
            cost; None where that is not known. `LearningCheck` reads it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rng: dict[str, Tensor] | None = None
        self.progress: tuple[Tensor, Tensor] | None = None

    def training_report(self) -> crbp.Report | None:
        """What the last training run says of itself; None where there was none."""
        return None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the state of the random numbers."""
        checkpoint["rng"] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            checkpoint["rng"]["cuda"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state of the random numbers until training starts."""
        self._rng = checkpoint.get("rng")

    def on_train_start(self) -> None:
        """Take up the random numbers where the checkpoint left them."""
        if self._rng is None:
            return
        torch.set_rng_state(self._rng["cpu"].cpu())
        if self.device.type == "cuda" and "cuda" in self._rng:
            torch.cuda.set_rng_state(self._rng["cuda"].cpu(), self.device)
        self._rng = None
