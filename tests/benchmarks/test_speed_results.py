"""The tables of the page on speed are those of the files beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "results" / "speed"


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> Any:
    return load_script("benchmarks/speed_results.py")


def test_the_page_has_what_was_measured(script: Any) -> None:
    page, tables = (FOLDER / "README.md").read_text(), script.tables(script.read(FOLDER))
    assert all(f"<!-- table {name} -->" in page for name in tables)
    assert script.with_tables(page, tables) == page


def test_a_table_that_nothing_is_known_of_or_that_has_no_place_is_named(script: Any) -> None:
    with pytest.raises(KeyError, match="prices"):
        script.with_tables("<!-- table prices -->\n<!-- end -->\n", {})
    with pytest.raises(KeyError, match="no place for prices"):
        script.with_tables("", {"prices": ""})


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.1684, "0.17"),
        (6.1026, "6.10"),
        (9.996, "10.0"),
        (13.677, "13.7"),
        (99.96, "100"),
        (641.2, "641"),
        (999.6, "1 000"),
        (3139.7, "3 140"),
    ],
)
def test_three_digits_at_most_two_of_them_decimals(script: Any, value: float, shown: str) -> None:
    assert script._three(value) == shown
