"""What a run needs to go on exactly where it was cut off, and to leave its end behind."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.callbacks import Checkpoint, GradientAccumulationScheduler
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

import crbp
from crbp._files import write_whole
from crbp.errors import SettingsError
from crbp.tasks.sampling import ResumableLoader


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
        self.path: Path | None = None  # of the last checkpoint of this run, once there is one

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the state of this moment; that of the end of an epoch once the epoch is over."""
        fitting = trainer.state.fn is TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end of an epoch."""
        self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end, where no epoch ends."""
        if self._saved != trainer.global_step:
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> Path:
        """Save the state of this moment, on all processes; where it is."""
        self._saved = trainer.global_step
        self.path = last_checkpoint(trainer)
        trainer.save_checkpoint(self.path, weights_only=False)  # said, or Lightning logs each time that it was not
        return self.path


def last_checkpoint(trainer: pl.Trainer) -> Path:
    """Where `LastCheckpoint` keeps it."""
    return Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "last.ckpt"


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
    """A module whose checkpoints hold the state of the random numbers, so that one that draws some resumes exactly.

    Attributes:
        progress: loss of the last training batch, without penalties, and what an answer that looks at no image would
            cost; None where that is not known. `LearningCheck` reads it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rng: list[dict[str, Tensor]] | None = None
        self._loaded = False
        self.progress: tuple[Tensor, Tensor] | None = None

    def training_report(self) -> crbp.Report | None:
        """What the last training run says of itself; None where there was none."""
        return None

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take weights, and remember that there are some."""
        self._loaded = True
        return super().load_state_dict(state_dict, strict, assign)

    def has_weights(self) -> bool:
        """Whether there is anything to measure: weights were taken up, or will be before the first image.

        Override it where a network brings its own.
        """
        return self._loaded

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the state of the random numbers, that of each process: they draw as many as their images need."""
        own = checkpoint["rng"] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.trainer.world_size > 1:
            every: list[Any] = [None] * self.trainer.world_size
            dist.all_gather_object(every, own)
            checkpoint["rng_of_processes"] = every

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the states of the random numbers until training starts."""
        self._loaded = True
        first = [checkpoint["rng"]] if "rng" in checkpoint else None
        self._rng = checkpoint.get("rng_of_processes", first)
        for state in self._rng or ():
            torch.Generator().set_state(state["cpu"].cpu())  # a broken state is refused while it is read

    def on_train_start(self) -> None:
        """Take up the random numbers where the checkpoint left them, and the batches where the images stand."""
        self._count_batches_anew()
        if self._rng is None:
            return
        # Another number of processes has no states of its own: all take up that of the first.
        own = self._rng[self.global_rank if len(self._rng) == self.trainer.world_size else 0]
        torch.set_rng_state(own["cpu"].cpu())
        if self.device.type == "cuda" and "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"].cpu(), self.device)
        self._rng = None

    def _count_batches_anew(self) -> None:
        """Let the trainer end the epoch with its last image also where a batch of all processes has another size."""
        loader, progress = self.trainer.train_dataloader, self.trainer.fit_loop.epoch_loop.batch_progress
        if isinstance(loader, ResumableLoader) and self.trainer.fit_loop.restarting:
            ended = progress.is_last_batch
            done = self.trainer.num_training_batches if ended else loader.batches_done(self.trainer.current_epoch)
            progress.current.increment_by(int(done) - progress.current.ready)


class ResumableData(pl.LightningDataModule):
    """Data whose training images are taken up by a checkpoint where they stand, by any number of processes.

    The images of an optimiser step have to stay the same, since rate and schedule are made for them.
    """

    batch_size: int
    workers: int
    seed: int

    def __init__(self) -> None:
        super().__init__()
        self._loader: ResumableLoader | None = None
        self._resume: dict[str, int] | None = None

    def resumed(self, loader: ResumableLoader) -> ResumableLoader:
        """The loader of the training images, at the place that a checkpoint says."""
        if self._resume is not None:
            loader.load_state_dict(self._resume)
        self._resume, self._loader = None, loader
        return loader

    def state_dict(self) -> dict[str, int]:
        """Where the training images stand; saved with every checkpoint."""
        return {} if self._loader is None else {**self._loader.state_dict(), "step": self._images_per_step()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take the training images up again where a checkpoint left them.

        Raises:
            SettingsError: if training goes on with another number of images an optimiser step.
        """
        # The trainer hands a loader its state only if that has not been asked for its length before, which a schedule
        # does; the data module is handed its own in any case.
        self._resume = state_dict or None
        fitting = self.trainer is not None and self.trainer.state.fn is TrainerFn.FITTING
        if fitting and "step" in state_dict and state_dict["step"] != (here := self._images_per_step()):
            raise SettingsError(
                f"the checkpoint was trained with {state_dict['step']} images an optimiser step, this run has "
                f"{here}, for which its rate and schedule are not made; choose data.batch_size, devices and "
                "trainer.accumulate_grad_batches so that their product is the same"
            )

    def loader_settings(self) -> dict[str, Any]:
        """What every loader of this data is made with."""
        return {
            "batch_size": self.batch_size,
            "num_workers": self.workers,
            "persistent_workers": self.workers > 0,
            "pin_memory": torch.cuda.is_available(),
            # A generator of the loader's own: starting an iteration must not draw from the numbers of training.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def _images_per_step(self) -> int:
        """Images of an optimiser step, over all processes and accumulated batches."""
        trainer = self.trainer
        if trainer is None:
            return self.batch_size
        # Such a callback changes the number from epoch to epoch; it does so again where training is resumed.
        scheduled = any(isinstance(each, GradientAccumulationScheduler) for each in trainer.callbacks)  # type: ignore[attr-defined]
        return self.batch_size * trainer.world_size * (1 if scheduled else trainer.accumulate_grad_batches)
