"""The script that says what a training step costs: the arithmetic it counts, and its one line a row."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import crbp
from crbp.models import PathfinderNet
from crbp.tasks import ContourTask

CHANNELS, KERNEL = 3, 5


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> Any:
    return load_script("benchmarks/pathfinder_cost.py")


def task(steps: int) -> ContourTask:
    cell = crbp.cells.HGRU(CHANNELS, KERNEL, norm="instance")
    return ContourTask(PathfinderNet(cell, crbp.Evolve(steps=steps, gradient=crbp.BPTT()), norm="instance"))


def test_one_step_more_of_bptt_costs_its_convolutions_three_times(script: Any) -> None:
    weights = 2 * CHANNELS**2 * KERNEL**2 + 2 * CHANNELS**2  # two kernels and two gates
    once = 2 * weights * script.COUNTED**2
    assert script.arithmetic(task(5)) - script.arithmetic(task(4)) == 3 * once


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
