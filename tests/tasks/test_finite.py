"""A number that is not finite is caught at its step, its source is named, and the policy is followed."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny_contours import LEAF_SPEC, Lines, tiny_data, tiny_net, tiny_task, trainer
from torch import Tensor, nn
from torch.utils.data import Dataset

import crbp
from crbp.losses import constant_loss, focal_loss
from crbp.models import PathfinderNet, Prediction
from crbp.tasks import ContourData, ContourSource, ContourTask, LearningCheck, NonFinite
from crbp.tasks._resume import LastCheckpoint

pytestmark = [
    pytest.mark.filterwarnings(LEAF_SPEC),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]

BAD = 7  # the image that is broken


class _Broken(Dataset[Any]):
    def __init__(self, items: Any, value: float, number: int) -> None:
        self.items, self.value, self.number = items, value, number

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        if index == self.number:
            item["image"][0, 3, 4] = self.value
        return item  # type: ignore[no-any-return]


@dataclass(frozen=True)
class BrokenLines(ContourSource):
    """Lines, one image of which holds a number that is not finite."""

    value: float = math.nan
    number: int = BAD

    def items(self, split: str, size: int, seed: int) -> Any:
        items = Lines().items(split, size, seed)
        return _Broken(items, self.value, self.number) if split == "train" else items


def broken_data(value: float = math.nan, **settings: Any) -> ContourData:
    defaults: dict[str, Any] = {"batch_size": 4, "train_size": 24, "val_size": 4, "workers": 0}
    return ContourData(BrokenLines(value), **{**defaults, **settings})


def step_of_bad(data: ContourData) -> int:
    """The batch of the first epoch that holds the broken image."""
    keys = [key.item for key in data.train_dataloader().sampler.keys(0)]
    return keys.index(BAD) // data.batch_size


class Break(pl.Callback):
    """Puts a value into a parameter, or into its gradient, at one step."""

    def __init__(self, name: str, step: int, *, gradient: bool = False, value: float = math.nan) -> None:
        self.name, self.step, self.gradient, self.value = name, step, gradient, value

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        parameter = pl_module.get_parameter(self.name)
        if trainer.global_step == self.step and not self.gradient:
            parameter.data.view(-1)[0] = self.value

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        gradient = pl_module.get_parameter(self.name).grad
        if trainer.global_step == self.step and self.gradient and gradient is not None:
            gradient.view(-1)[0] = self.value


class Watch(pl.Callback):
    """Weights, buffers and the optimiser's state after every batch."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.seen.append(copy.deepcopy((pl_module.state_dict(), trainer.optimizers[0].state_dict()["state"])))


def fit(folder: Path, task: ContourTask, data: ContourData, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    made = trainer(folder, callbacks=list(callbacks), **{"limit_val_batches": 0, **settings})
    made.fit(task, data)
    return made


def equal(a: Any, b: Any) -> bool:
    try:
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_image_is_named_at_its_step(tmp_path: Path, value: float) -> None:
    data = broken_data(value)
    step = step_of_bad(data)
    message = rf"step {step}, batch {step} of epoch 0: \['image'\] of image {BAD} of the training data is not finite"
    with pytest.raises(crbp.NonFiniteError, match=message):
        fit(tmp_path, tiny_task(), data, NonFinite())


def test_a_broken_weight_is_named_at_its_step(tmp_path: Path) -> None:
    for name in ("net.readout.weight", "net.cell.alpha"):
        with pytest.raises(crbp.NonFiniteError, match=rf"step 2, batch 2 of epoch 0: {name} is not finite"):
            fit(tmp_path, tiny_task(), tiny_data(), Break(name, 2), NonFinite())


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_broken_gradient_is_named_at_its_step(tmp_path: Path, value: float) -> None:
    broken = Break("net.readout.bias", 3, gradient=True, value=value)
    with pytest.raises(
        crbp.NonFiniteError, match=r"step 3.*: the gradient of net.readout.bias is not finite, of a fin"
    ):
        fit(tmp_path, tiny_task(), tiny_data(), broken, NonFinite())


class Shaky(crbp.cells.HGRU):
    """A state that stays between -1 and 1 and moves ever so fast with the one before."""

    def forward(self, state: Tensor, drive: Tensor) -> Tensor:
        return torch.sin(1e25 * state + drive)


@pytest.mark.parametrize(("solver", "terms"), [(crbp.Neumann(terms=5), 2), (crbp.GMRES(terms=5), 1)])
def test_a_backward_series_that_overflows_is_named(tmp_path: Path, solver: crbp.Solver, terms: int) -> None:
    method = crbp.RBP(solver, on_divergence="warn")
    net = PathfinderNet(Shaky(4, 3, horizon=4), crbp.Evolve(steps=4, gradient=method))
    with (
        pytest.warns(crbp.DivergenceWarning, match="not finite"),
        pytest.raises(crbp.NonFiniteError, match=rf"step 0.*: the backward series is not finite after {terms} terms"),
    ):
        fit(tmp_path, ContourTask(net, warmup=0.0), tiny_data(), NonFinite())


def test_gradients_that_are_large_but_finite_pass(tmp_path: Path) -> None:
    broken = Break("net.readout.bias", 1, gradient=True, value=1e30)  # its square is not finite
    check = NonFinite("skip")
    made = fit(tmp_path, tiny_task(), tiny_data(), broken, check, gradient_clip_val=1.0, max_steps=2)
    assert (made.global_step, check.found) == (2, 0)


class BreakAfter(pl.Callback):
    """Breaks a weight as an update does that overflows."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        pl_module.get_parameter("net.readout.bias").data[1] = math.inf


def test_a_step_that_breaks_the_weights_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(crbp.NonFiniteError, match=r"after step 1: net.readout.bias is not finite"):
        fit(tmp_path, tiny_task(), tiny_data(), BreakAfter(), NonFinite(), LastCheckpoint(), max_steps=1)
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


class Normed(nn.Module):
    """A net that keeps statistics of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))

    def forward(self, image: Tensor) -> Prediction:
        return Prediction(logits=self.layers(image))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("normed", [False, True])
def test_a_skipped_step_changes_nothing(tmp_path: Path, accumulate: int, normed: bool) -> None:
    data, watch, check = broken_data(), Watch(), NonFinite("skip")
    task = ContourTask(Normed() if normed else tiny_net())
    with pytest.warns(crbp.NonFiniteWarning, match=rf"of image {BAD} .* the step is skipped \(1 so far\)"):
        made = fit(tmp_path, task, data, watch, check, accumulate_grad_batches=accumulate)
    first = accumulate * (step_of_bad(data) // accumulate)
    assert first > 0, "the broken image has to come after a step"
    changed = [not equal(a, b) for a, b in zip(watch.seen, watch.seen[1:], strict=False)]
    assert equal(watch.seen[first - 1], watch.seen[first + accumulate - 1])
    assert not any(torch.isnan(value).any() for value in task.state_dict().values())
    assert made.callback_metrics["train/not_finite"] == check.found == 1
    assert sum(changed) >= 6 // accumulate - 2, "all other steps but the first, before which there is nothing"


@pytest.mark.parametrize("gradient", [False, True], ids=["weight", "gradient"])
def test_restoring_takes_weights_and_optimiser_from_the_last_checkpoint(tmp_path: Path, gradient: bool) -> None:
    watch, last = Watch(), LastCheckpoint()
    broken = Break("net.readout.weight", 7, gradient=gradient)  # the second epoch's third step of five
    with pytest.warns(crbp.NonFiniteWarning, match=r"net.readout.weight is not finite.*; .*restored .*last.ckpt"):
        made = fit(tmp_path, tiny_task(), tiny_data(), broken, NonFinite("restore"), watch, last, max_epochs=2)
    # A broken weight is found before its batch, which then trains what was restored; a gradient after it.
    assert equal(watch.seen[7], watch.seen[4]) == gradient
    assert {int(each["step"]) for each in watch.seen[-1][1].values()} == {7 if gradient else 8}
    assert made.callback_metrics["train/not_finite"] == 1
    rates = {group["lr"] for group in made.optimizers[0].param_groups}
    assert rates == set(made.lr_scheduler_configs[0].scheduler.get_last_lr())


def test_there_has_to_be_something_to_restore(tmp_path: Path) -> None:
    with pytest.raises(crbp.NonFiniteError, match=r"there is no .*last.ckpt yet"):
        fit(tmp_path, tiny_task(), broken_data(), NonFinite("restore"))


@pytest.mark.filterwarnings("ignore::crbp.NonFiniteWarning")
def test_skipping_comes_to_an_end(tmp_path: Path) -> None:
    class Always(Break):
        def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.step = trainer.global_step
            super().on_after_backward(trainer, pl_module)

    check = NonFinite("skip", most_in_a_row=3)
    with pytest.raises(crbp.NonFiniteError, match=r"for more than 3 steps in a row"):
        fit(tmp_path, tiny_task(), tiny_data(), Always("net.readout.bias", 0, gradient=True), check)
    with pytest.raises(crbp.NonFiniteError, match=r"net.readout.bias is not finite"):
        fit(tmp_path, tiny_task(), tiny_data(), Break("net.readout.bias", 1), NonFinite("skip"))


@pytest.mark.filterwarnings("ignore::crbp.NonFiniteWarning")
def test_restoring_comes_to_an_end_where_every_step_breaks_the_weights(tmp_path: Path) -> None:
    class Late(BreakAfter):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.current_epoch:  # there is a checkpoint to restore from then on
                super().on_train_batch_end(trainer, pl_module)

    callbacks = Late(), NonFinite("restore", most_in_a_row=3), LastCheckpoint()
    with pytest.raises(crbp.NonFiniteError, match=r"for more than 3 steps in a row"):
        fit(tmp_path, tiny_task(), tiny_data(), *callbacks, max_epochs=2)


def test_the_count_outlives_a_resumption() -> None:
    check, resumed = NonFinite("skip"), NonFinite("skip")
    check.found = 4
    resumed.load_state_dict(check.state_dict())
    assert resumed.found == 4


def test_values_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="policy must be one of 'raise', 'skip', 'restore', not 'warn'"):
        NonFinite("warn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="most_in_a_row"):
        NonFinite(most_in_a_row=0)
    with pytest.raises(ValueError, match="patience"):
        LearningCheck(patience=0)


@pytest.mark.skipif(sys.platform != "linux", reason="forks its processes")
def test_processes_skip_alike_what_one_of_them_finds(tmp_path: Path) -> None:
    weights = []
    for processes in (1, 2):
        together: dict[str, Any] = {"devices": processes, "strategy": "ddp_fork"} if processes > 1 else {}
        task, data = tiny_task(learning_rate=1e-3), broken_data(batch_size=4 // processes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", crbp.NonFiniteWarning)
            made = fit(tmp_path / str(processes), task, data, NonFinite("skip"), **together)
        assert made.callback_metrics["train/not_finite"] == 1
        weights.append(task.net.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.7])
def test_no_constant_answer_costs_less(gamma: float, share: float) -> None:
    mask = torch.arange(1000).view(1, 10, 100) < 1000 * share
    p = torch.linspace(1e-4, 1 - 1e-4, 5000)
    costs = [focal_loss(torch.stack([torch.log1p(-q), q.log()]).view(1, 2, 1, 1).expand(1, 2, 10, 100), mask, gamma)
             for q in p[::25]]  # fmt: skip
    least = float(constant_loss(mask, gamma))
    assert least <= float(min(costs)) * 1.01
    assert least == pytest.approx(float(min(costs)), rel=0.02)
    assert float(constant_loss(torch.zeros(1, 4, 4, dtype=torch.bool), gamma)) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("error::crbp.LearningWarning")
def test_a_rate_a_hundred_times_too_high_does_not_end_in_silence(tmp_path: Path) -> None:
    def checks() -> list[pl.Callback]:
        return [NonFinite(), LearningCheck(patience=20)]

    settings: dict[str, Any] = {"max_epochs": 12, "enable_checkpointing": False}
    fit(tmp_path, tiny_task(learning_rate=0.02), tiny_data(), *checks(), **settings)
    with pytest.raises((crbp.NonFiniteError, crbp.LearningWarning), match="lower learning_rate"):
        fit(tmp_path, tiny_task(learning_rate=2.0), tiny_data(), *checks(), **settings)


def test_a_net_that_cannot_learn_is_told_of(tmp_path: Path) -> None:
    net = tiny_net().requires_grad_(False)
    net.readout.bias.requires_grad_(True)
    net.readout.weight.data.zero_()
    task = ContourTask(net, learning_rate=5e-3, schedule="constant", warmup=0)
    with pytest.warns(crbp.LearningWarning, match=r"nothing is learnt; lower learning_rate, now 0.005") as told:
        fit(tmp_path, task, tiny_data(), LearningCheck(patience=5), max_epochs=3)
    assert sum(each.category is crbp.LearningWarning for each in told) == 2, (
        "the first quarter of the training is left alone, every window after it is told of"
    )
