"""A run that is signalled: what it saves, and that it goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from tiny_contours import LEAF_SPEC, tiny_data, tiny_task, trainer

from crbp.tasks import FrobeniusPenalty
from crbp.tasks._resume import LastCheckpoint
from crbp.tasks._stop import StopOnSignal, Stopped

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks its processes"),
    pytest.mark.filterwarnings(LEAF_SPEC),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]


class Signal(pl.Callback):
    """Signals its own process once, in the middle of a batch of training or of validation."""

    def __init__(self, number: int, place: str, batch: int, rank: int = 0) -> None:
        self.number, self.place, self.batch, self.rank = number, place, batch, rank

    def _signal(self, trainer: pl.Trainer, place: str, batch: int) -> None:
        at = (place, batch) == (self.place, self.batch)
        if at and trainer.current_epoch == 1 and not trainer.sanity_checking and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self._signal(trainer, "train", batch_idx)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._signal(trainer, "validate", batch_idx)


class Found(pl.Callback):
    """What each validation found."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        if not trainer.sanity_checking:
            self.values.append(float(trainer.callback_metrics["val/loss"]))


def fit(folder: Path, *callbacks: pl.Callback, resume: Path | None = None, **settings: Any) -> tuple[Any, list[float]]:
    torch.manual_seed(0)
    found, last = Found(), LastCheckpoint()
    task = tiny_task(penalty=FrobeniusPenalty(weight=0.1))
    run = trainer(folder, max_epochs=3, callbacks=[found, StopOnSignal(last), last, *callbacks], **settings)
    run.fit(task, tiny_data(), ckpt_path=resume, weights_only=True)
    return task.state_dict(), found.values


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[float]]:
    return fit(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    ("number", "place", "batch", "validated"),
    [
        (signal.SIGTERM, "train", 1, 1),
        (signal.SIGUSR1, "train", 4, 1),  # the last of the epoch
        (signal.SIGTERM, "validate", 1, 1),
        (signal.SIGUSR1, "validate", 2, 1),  # the last of the validation
    ],
)
def test_a_signalled_run_saves_stops_and_goes_on(
    whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, place: str, batch: int, validated: int
) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(Stopped) as stopped:
        fit(tmp_path, Signal(number, place, batch))
    assert stopped.value.code == 128 + number
    assert handlers == [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)]
    last = tmp_path / "checkpoints" / "last.ckpt"
    steps = 5 + (batch + 1 if place == "train" else 5)
    told = f"stopped on {signal.Signals(number).name} after {steps} steps; resume with --ckpt_path {last}"
    assert told in capsys.readouterr().err
    weights, found = fit(tmp_path, resume=last)
    for name, value in whole[0].items():
        assert torch.equal(weights[name], value), name
    assert found == whole[1][validated:]


def test_processes_signalled_at_different_places_stop_together(tmp_path: Path) -> None:
    """Shares are uneven in validation: the second process has a batch fewer."""
    for place, batch in (("train", 1), ("validate", 0)):
        # A process that waits in vain gives up.
        strategy = DDPStrategy(start_method="fork", timeout=timedelta(seconds=60))
        with pytest.raises(torch.multiprocessing.ProcessExitedException) as stopped:
            fit(tmp_path / place, Signal(signal.SIGUSR1, place, batch, rank=1), devices=2, strategy=strategy)
        assert stopped.value.exit_code == 128 + signal.SIGUSR1
        assert torch.load(tmp_path / place / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 1
