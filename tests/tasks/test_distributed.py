from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_contours import LEAF_SPEC, tiny_data, tiny_task, trainer

from crbp.tasks import FrobeniusPenalty

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks its processes"),
    pytest.mark.filterwarnings(LEAF_SPEC),
    # The processes are forked from one with a single thread of torch; Python cannot know that the others are idle.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]


def fit(
    folder: Path, *, processes: int, resume: Path | None = None, **settings: Any
) -> tuple[dict[str, float], dict[str, Any]]:
    """Train on 16 images an epoch in batches of 4 over all processes, and validate on 9."""
    together: dict[str, Any] = {"devices": processes, "strategy": "ddp_fork"} if processes > 1 else {}
    # Without the residual, which is relative to the states of each process's own batch, the loss is a mean over images.
    task = tiny_task(learning_rate=1e-3, residual_weight=0.0, step_jitter=0)
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fitted = trainer(folder, max_epochs=2, callbacks=[keep], **together, **settings)
    data = tiny_data(batch_size=4 // processes, train_size=16, val_size=9)
    fitted.fit(task, data, ckpt_path=resume, weights_only=True)
    return {name: float(value) for name, value in fitted.callback_metrics.items()}, task.net.state_dict()


def assert_same(found: dict[str, Any], weights: dict[str, Any]) -> None:
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    one, weights = fit(tmp_path / "one", processes=1)
    two, same_weights = fit(tmp_path / "two", processes=2)
    assert_same(same_weights, weights)
    for name in one:
        if name.startswith("val/") and "radius" not in name:  # the radius is of each process's first batch
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    assert two["train/backward_failed"] == 2 * one["train/backward_failed"]  # each process has solves of its own


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(before: int, after: int, tmp_path: Path) -> None:
    """From the middle of an epoch, to the end that it would have come to without a break."""
    _, whole = fit(tmp_path / "whole", processes=before)
    _, found = fit(tmp_path / "rest", processes=after, resume=tmp_path / "whole" / "step=3.ckpt")
    assert_same(found, whole)


class _Apart(pl.Callback):
    """Has each process draw other random numbers than the others, as the sampling of anchors does."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        torch.rand(trainer.global_rank + 1)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
def test_resumed_processes_take_up_their_own_random_numbers(tmp_path: Path) -> None:
    ends = []
    for resume in (None, tmp_path / "step=2.ckpt"):
        torch.manual_seed(0 if resume is None else 9)
        keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        callbacks = [keep, _Apart()] if resume is None else []
        task = tiny_task(penalty=FrobeniusPenalty(weight=0.1))
        run = trainer(tmp_path, devices=2, strategy="ddp_fork", callbacks=callbacks)
        run.fit(task, tiny_data(batch_size=2, train_size=16), ckpt_path=resume, weights_only=True)
        ends.append(task.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name], value), name


def test_statistics_over_processes_are_refused_on_cpus_at_once(tmp_path: Path) -> None:
    task = tiny_task()
    task.extra = torch.nn.BatchNorm2d(1)
    with pytest.raises(Exception, match="SyncBatchNorm layers only work with GPU modules"):
        trainer(tmp_path, devices=2, strategy="ddp_fork", sync_batchnorm=True).fit(task, tiny_data())
