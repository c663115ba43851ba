"""The sets of settings that were tried: each is of a row that there is and changes it, and runs are what they say."""

from __future__ import annotations

import csv
from collections.abc import Callable
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
            for option, value in zip(options[::2], options[1::2], strict=True):
                *path, last = option.removeprefix("--").split(".")
                found = config
                for key in path:
                    found = found[key]
                assert (last in found) != (last == "step_jitter" and "penalty" not in found), (row, tried, option)
                assert found.get(last, 0) != float(value), (row, tried, option)


def test_every_line_that_is_kept_is_of_a_set(script: Any) -> None:
    lines = list(csv.DictReader((script.FOLDER / "tuning.csv").read_text().splitlines()))
    assert {(line["row"], line["set"]) for line in lines} <= {
        (row, tried) for row, sets in script.SETS.items() for tried in sets
    }
    assert all(0 < float(line["f1_at_n"]) <= 1 and len(line["commit"]) == 40 for line in lines)


def test_a_run_of_other_settings_is_refused(script: Any) -> None:
    config = script.CONFIGS / "small14_hgru_cbptt.yaml"
    made = yaml.safe_load(config.read_text())
    made["model"]["init_args"] |= {"learning_rate": 0.005, "predict_steps": False}
    script.check(made, config, script.SETS["small14_hgru_cbptt"]["rate 0.005"])
    made["model"]["init_args"]["spectral_weight"] = 1.0
    with pytest.raises(SystemExit, match=r"another model\.init_args\.spectral_weight than is asked for"):
        script.check(made, config, script.SETS["small14_hgru_cbptt"]["rate 0.005"])
