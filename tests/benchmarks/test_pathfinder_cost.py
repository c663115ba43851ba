"""The script that says what a training step costs: the arithmetic it counts, and its one line a row."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

import crbp
from crbp.gradients import GradientMethod
from crbp.models import PathfinderNet
from crbp.tasks import ContourTask, LipschitzPenalty

CHANNELS, KERNEL = 3, 5
WEIGHTS = 2 * CHANNELS**2 * KERNEL**2 + 2 * CHANNELS**2  # two kernels and two gates


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> Any:
    return load_script("benchmarks/pathfinder_cost.py")


def task(steps: int, gradient: GradientMethod | None = None, **settings: Any) -> ContourTask:
    cell = crbp.cells.HGRU(CHANNELS, KERNEL, norm="instance")
    evolve = crbp.Evolve(steps=steps, gradient=gradient or crbp.BPTT())
    return ContourTask(PathfinderNet(cell, evolve, norm="instance"), **settings)


def test_one_step_more_of_bptt_costs_its_convolutions_three_times(script: Any) -> None:
    once = 2 * WEIGHTS * script.COUNTED**2
    assert script.arithmetic(task(5)) - script.arithmetic(task(4)) == 3 * once


def test_every_penalty_is_counted_and_nothing_without_weight(script: Any) -> None:
    once = 2 * WEIGHTS * script.COUNTED**2  # of a step, or of a product with its Jacobian
    rbp = crbp.RBP(crbp.Neumann(terms=2))

    def counted(**weights: float) -> float:
        penalty = LipschitzPenalty(weight=1.0) if weights.pop("lipschitz", 0) else None
        given = {"residual_weight": 0.0, "spectral_weight": 0.0, "step_jitter": 0, **weights}
        found: float = script.arithmetic(task(4, rbp, penalty=penalty, **given))
        return found

    alone = counted()
    assert counted(lipschitz=1) - alone == 3 * once  # a product and its derivatives by weights and state
    assert counted(spectral_weight=0.2) - counted(lipschitz=1) == 2 * once  # two steps of power iteration before that
    assert counted(lipschitz=1, spectral_weight=0.2) - alone == 8 * once
    # Its gradient goes back through the last step alone, as that of the Lipschitz penalty does in passing.
    assert counted(lipschitz=1, residual_weight=1.0) == counted(lipschitz=1)


def test_what_is_kept_of_an_image_is_that_of_direct_convolutions_and_grows_with_its_pixels(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = script.direct(task(4))
    assert {module.method for module in made.net.modules() if hasattr(module, "method")} == {"direct"}
    kept = script.kept(made)
    assert kept < script.kept(script.direct(task(5)))
    monkeypatch.setattr(script, "COUNTED", 2 * script.COUNTED)
    assert script.kept(made) == pytest.approx(4 * kept, rel=0.01)


@pytest.mark.parametrize("step_jitter", [1, 3, 8])
def test_steps_that_are_drawn_are_counted_as_often_as_the_task_draws_them(
    script: Any, step_jitter: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, total, means = task(4, step_jitter=step_jitter), 400 * step_jitter, []
    given: list[int] = []
    monkeypatch.setattr(torch, "randint", lambda *_: torch.tensor(given.pop()))
    for t in range(total):
        monkeypatch.setattr(made, "_done", lambda t=t: t / total)
        reach = round(step_jitter * t / total)
        given[:] = range(-reach, reach + 1)  # each of what may be drawn, once
        means.append(statistics.mean(made._asked_of_net()["steps"] - 4 for _ in range(2 * reach + 1)))
    assert statistics.mean(means) == pytest.approx(script.drawn(step_jitter), abs=step_jitter / total)
    monkeypatch.undo()
    fixed = script.arithmetic(task(4))
    more = script.arithmetic(task(5)) - fixed
    assert script.arithmetic(made) == pytest.approx(fixed + script.drawn(step_jitter) * more)


@pytest.mark.slow
def test_a_row_is_measured_once(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = yaml.safe_load((script.CONFIGS / "mini_hgru_crbp.yaml").read_text())
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(script, "CONFIGS", tmp_path)
    arguments = ["pathfinder_cost.py", "tiny", "--out", str(tmp_path / "cost.csv"), "--threads", "1"]
    monkeypatch.setattr("sys.argv", arguments)
    script.main()
    first = (tmp_path / "cost.csv").read_text()
    (line,) = csv.DictReader(first.splitlines())
    assert (line["row"], line["steps"], line["images"]) == ("tiny", "8", "16000")
    assert float(line["seconds_per_image"]) > 0
    assert float(line["saved_mib_per_image"]) > 0
    script.main()  # the row is there already
    assert (tmp_path / "cost.csv").read_text() == first
