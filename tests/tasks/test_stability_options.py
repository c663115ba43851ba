"""The options that make training settle: each has the effect that it names, and a value out of range is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny_contours import LEAF_SPEC, tiny_data, tiny_net, tiny_task, trainer

from crbp.models import FeedForwardNet, PathfinderNet
from crbp.tasks import ContourTask

pytestmark = pytest.mark.filterwarnings(LEAF_SPEC)


class _Weights(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.append(float(trainer.callback_metrics["train/penalty_weight"]))


def test_the_ramp_raises_the_penalty_geometrically_to_its_weight(tmp_path: Path) -> None:
    weights = _Weights()
    task = tiny_task(penalty_ramp=0.6)
    trainer(tmp_path, callbacks=[weights], max_epochs=2, limit_val_batches=0).fit(task, tiny_data())
    assert task.penalty is not None
    wanted = [task.penalty.weight * 100 ** min(step / 10 / 0.6 - 1, 0) for step in range(10)]
    assert weights.seen == pytest.approx(wanted)
    assert weights.seen[0] == pytest.approx(task.penalty.weight / 100)
    assert weights.seen[-1] == task.penalty.weight


def test_jitter_reaches_further_beyond_n_as_training_goes_on_in_half_of_the_batches(tmp_path: Path) -> None:
    task, taken = tiny_task(step_jitter=2), []
    net = task.net
    assert isinstance(net, PathfinderNet)
    forward = net.forward

    def spy(*arguments: Any, **settings: Any) -> Any:
        prediction = forward(*arguments, **settings)
        taken.append(prediction.run.report.steps)
        return prediction

    net.forward = spy  # type: ignore[method-assign]
    trainer(tmp_path, max_epochs=12, limit_val_batches=0).fit(task, tiny_data())
    assert all(4 <= steps <= 4 + round(2 * t / len(taken)) for t, steps in enumerate(taken))
    assert set(taken) == {4, 5, 6}
    assert taken.count(4) > 0.65 * len(taken)  # expected are .73; .58 if all from N to the last were drawn alike
    taken.clear()
    trainer(tmp_path).validate(task, tiny_data(), verbose=False)
    assert set(taken) == {4}


def test_a_penalty_brings_what_keeps_it_effective() -> None:
    names = ("penalty_ramp", "residual_weight", "spectral_weight", "step_jitter")

    def settings(task: ContourTask) -> tuple[float, ...]:
        return tuple(getattr(task, name) for name in names)

    cured = tiny_task()
    assert settings(cured) == (0.8, 1.0, 1.0, 8)
    assert cured.schedule == "cosine"
    assert settings(tiny_task(**dict.fromkeys(names, 0))) == (0, 0, 0, 0)
    assert settings(tiny_task(penalty=None)) == (0, 0, 0, 0)


def test_a_sixth_of_what_moves_is_left_at_four_times_the_steps() -> None:
    task = tiny_task()
    assert task.net.evolve.steps == 4
    assert task.spectral_bound ** (3 * 4) == pytest.approx(1 / 6)
    assert tiny_task(spectral_bound=0.5).spectral_bound == 0.5


def test_the_bound_on_growth_reaches_its_penalty(tmp_path: Path) -> None:
    def growth(bound: float) -> float:
        torch.manual_seed(0)
        task = tiny_task(spectral_bound=bound, spectral_weight=1.0)
        fit = trainer(tmp_path / str(bound), max_steps=1, limit_val_batches=0)
        fit.fit(task, tiny_data())
        return float(fit.callback_metrics["train/spectral_penalty"])

    assert growth(0.0) > growth(0.5) > 0


def test_beta2_reaches_the_optimiser(tmp_path: Path) -> None:
    fit = trainer(tmp_path, limit_val_batches=0)
    fit.fit(tiny_task(beta2=0.95), tiny_data())
    assert fit.optimizers[0].param_groups[0]["betas"] == (0.9, 0.95)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"penalty_ramp": 1.0}, "penalty_ramp"),
        ({"penalty_ramp": 0.5, "penalty": None}, "no penalty to raise"),
        ({"step_jitter": -1}, "step_jitter"),
        ({"spectral_bound": 1.0}, "spectral_bound"),
        ({"spectral_bound": 0.9, "spectral_weight": 0.0}, "no penalty on growth"),
        ({"beta2": 1.0}, "beta2"),
    ],
)
def test_values_out_of_range_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tiny_task(**settings)


def test_a_feedforward_net_takes_no_jitter() -> None:
    with pytest.raises(ValueError, match="step_jitter needs a recurrent network"):
        ContourTask(FeedForwardNet(4, 3), step_jitter=1)


def test_the_filter_scale_scales_the_drive_by_its_square() -> None:
    plain = tiny_net()
    torch.manual_seed(0)
    loud = PathfinderNet(plain.cell, plain.evolve, filter_scale=3.0)  # type: ignore[arg-type]
    image = torch.rand(2, 1, 9, 9)
    torch.testing.assert_close(loud.drive(image), 9 * plain.drive(image))
    with pytest.raises(ValueError, match="filter_scale"):
        PathfinderNet(plain.cell, plain.evolve, filter_scale=0.0)  # type: ignore[arg-type]
