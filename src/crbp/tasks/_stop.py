"""How a run of several processes ends before its time: asked to by the system, or because one of them is gone."""

from __future__ import annotations

import signal
import sys
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from crbp.tasks._resume import LastCheckpoint

SIGNALS = (signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))


class Stopped(SystemExit):
    """The run has saved its state and ended as a signal asked; its exit status is 128 + the signal's number."""


class StopOnSignal(Callback):
    """On SIGTERM or SIGUSR1 to any process save ``last.ckpt`` and end all of them, after the batch at hand.

    Lightning's own handlers save and broadcast at once, in the middle of whatever a process does: where processes
    are signalled at different places, each then waits for the other. Here a handler does no more than note the signal.

    Args:
        last: what saves the state.
    """

    def __init__(self, last: LastCheckpoint) -> None:
        self.last = last
        self._received = 0
        self._shared_batches = 0

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals over from Lightning, which gives them back at the end."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same where no sanity check came before."""
        self.on_sanity_check_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop where one process has been asked to and no gradient is being gathered."""
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        assert fetcher is not None
        if loop._should_check_val_fx(fetcher):
            return  # saved here, the state would be taken up after the validation; it can stop soon enough itself
        progress = loop.batch_progress
        if progress.is_last_batch or progress.current.ready % trainer.accumulate_grad_batches == 0:
            self._stop_if_asked(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the batches that every process has: only there can they agree."""
        batches = torch.tensor(trainer.num_val_batches[0], device=pl_module.device)
        self._shared_batches = int(trainer.strategy.reduce(batches, reduce_op="min"))

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: Any, output: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop in the middle of a validation, which the resumed run does over from its start."""
        training = trainer.state.fn is TrainerFn.FITTING and not trainer.sanity_checking
        if training and dataloader_idx == 0 and batch_idx < self._shared_batches:
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            self._stop_if_asked(trainer, progress)

    def _note(self, number: int, frame: Any) -> None:
        self._received = number

    def _stop_if_asked(self, trainer: pl.Trainer, validation: Any = None) -> None:
        received = torch.tensor(self._received, device=trainer.strategy.root_device)
        number = int(trainer.strategy.reduce(received, reduce_op="max"))
        if not number:
            return
        if validation is not None:
            # To Lightning a validation whose batch has begun and not ended, which it takes up where `current` is.
            validation.total.processed = validation.total.completed
            validation.current.reset()
        path = self.last.save(trainer)
        if trainer.is_global_zero:
            name = signal.Signals(number).name
            print(
                f"crbp: stopped on {name} after {trainer.global_step} steps; resume with --ckpt_path {path}",
                file=sys.stderr,
            )
        raise Stopped(128 + number)


def lost_process(error: BaseException) -> bool:
    """Whether an error means that another process of the run has ended or does not answer."""
    # Gloo's errors have no type of their own.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))
