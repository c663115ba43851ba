"""The sets of settings that were tried: each is of a row that there is, changes it, and is told by its name."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> Any:
    return load_script("benchmarks/tuning.py")


def test_every_set_changes_a_setting_that_its_row_has(script: Any) -> None:
    for row, sets in script.SETS.items():
        config = yaml.safe_load((script.CONFIGS / f"{row}.yaml").read_text())
        for tried, options in sets.items():
            changed = False
            for option, value in zip(options[::2], options[1::2], strict=True):
                *path, last = option.removeprefix("--").split(".")
                found = config
                for key in path:
                    found = found[key]
                changed |= found[last] != float(value)
            assert changed, (row, tried)


def test_every_line_that_is_kept_is_of_a_set(script: Any) -> None:
    lines = list(csv.DictReader(Path(script.FOLDER / "tuning.csv").read_text().splitlines()))
    assert {(line["row"], line["set"]) for line in lines} <= {
        (row, tried) for row, sets in script.SETS.items() for tried in sets
    }
    assert all(0 < float(line["f1_at_n"]) <= 1 and len(line["commit"]) == 40 for line in lines)
