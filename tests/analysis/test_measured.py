"""The penalties that are counted are those that the task trains with."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import crbp
from crbp.analysis.measured import TrainedPenalties, penalty_of, training_memory
from crbp.models import PathfinderNet
from crbp.tasks import ContourTask, LipschitzPenalty, Origin
from crbp.tasks.weights import WeightsError

LIPSCHITZ = {"class_path": "crbp.tasks.LipschitzPenalty", "init_args": {"weight": 3.0, "bound": 0.0}}
FILE = Path("a.safetensors")


def read(**given: Any) -> TrainedPenalties | None:
    run = {"model": {"class_path": "crbp.tasks.ContourTask", "init_args": given}}
    return penalty_of(FILE, Origin(net={}, run=run), trust=("crbp",))


def net() -> PathfinderNet:
    torch.manual_seed(0)
    return PathfinderNet(crbp.cells.HGRU(3, 3), crbp.Evolve(steps=3, gradient=crbp.RBP()), target_share=0.4)


@pytest.mark.parametrize(
    "weights", [{}, {"residual_weight": 0.0}, {"residual_weight": 30.0, "spectral_weight": 0.5}, {"spectral_weight": 0}]
)
def test_they_are_what_the_task_adds_to_its_loss(weights: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[str, Any] = {}
    monkeypatch.setattr(ContourTask, "log", lambda self, name, value, **_: logged.update({name: value}))
    monkeypatch.setattr(ContourTask, "log_dict", lambda self, values: logged.update(values))
    # Of any growth, since this untrained net contracts.
    monkeypatch.setattr(crbp, "spectral_penalty", partial(crbp.spectral_penalty, bound=0.0))
    bound = {} if weights.get("spectral_weight") == 0 else {"spectral_bound": 0.0}
    penalty = LipschitzPenalty(weight=3.0, bound=0.0)
    task = ContourTask(net(), penalty=penalty, penalty_ramp=0, step_jitter=0, **bound, **weights)
    batch = {"image": torch.rand(2, 1, 9, 9), "mask": torch.rand(2, 9, 9) > 0.5}
    added = task.training_step(batch, 0) - logged["train/focal"]
    found = read(penalty=LIPSCHITZ, **{"residual_weight": None, "spectral_weight": None, **weights})
    assert found is not None
    torch.testing.assert_close(found(task.net(batch["image"]).run), added)


def test_what_has_no_weight_takes_no_memory() -> None:
    def kept(*names: str) -> int:
        weights = {f"{name}_weight": float(name in names) for name in ("residual", "spectral")}
        found = read(penalty=LIPSCHITZ if "lipschitz" in names else None, **weights)
        memory = training_memory(net(), torch.rand(1, 1, 9, 9), steps=(3, 12), penalty=found)
        assert memory.penalty == ("" if found is None else ", ".join(found.names))
        assert len(set(memory.own)) == 1
        return memory.own[0]

    with_lipschitz = kept("lipschitz")
    assert kept() < with_lipschitz < kept("lipschitz", "residual") < kept("lipschitz", "residual", "spectral")
    only = LipschitzPenalty(weight=3.0, bound=0.0)
    assert training_memory(net(), torch.rand(1, 1, 9, 9), steps=(3,), penalty=only).own[0] == with_lipschitz


def test_weights_that_are_not_named_or_left_open() -> None:
    left_open = read(penalty=LIPSCHITZ, residual_weight=None, spectral_weight=None)
    assert left_open is not None
    assert left_open.names == ["LipschitzPenalty", "residual_penalty", "spectral_penalty"]
    not_named = read(penalty=LIPSCHITZ)  # trained before there were others
    assert not_named is not None
    assert not_named.names == ["LipschitzPenalty"]
    alone = read(penalty=None, residual_weight=2.0)
    assert alone is not None
    assert alone.names == ["residual_penalty"]
    assert read(penalty=None, residual_weight=None, spectral_weight=None) is None
    assert penalty_of(FILE, Origin(net={}, run={"model": {"init_args": None}}), trust=("crbp",)) is None
    with pytest.raises(ValueError, match="no penalty"):
        TrainedPenalties(penalty=None, residual_weight=0.0, spectral_weight=0.0)


@pytest.mark.parametrize("value", [-1.0, float("nan"), "much", [1.0]])
def test_a_weight_that_is_none_is_named_with_its_file(value: Any) -> None:
    with pytest.raises(WeightsError, match=r"a\.safetensors"):
        read(penalty=LIPSCHITZ, spectral_weight=value)
