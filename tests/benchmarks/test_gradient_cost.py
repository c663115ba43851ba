"""The page on choosing a gradient has what was measured."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

import crbp
from crbp.bench.memory import METHODS


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> Any:
    return load_script("benchmarks/gradient_cost.py")


def test_the_page_has_what_was_measured(script: Any) -> None:
    page = script.PAGE.read_text()
    assert script.with_tables(page, script.tables(script.RESULTS)) == page


def test_every_method_has_a_name_on_the_page(script: Any) -> None:
    assert set(script.CALLED) == set(METHODS)
    named = [title.strip("`").partition("(")[0] for title in script.CALLED.values()]
    assert all(hasattr(crbp, name) for name in named if name != "the same with `lipschitz_penalty")


def test_bytes_have_three_digits(script: Any) -> None:
    assert [script.mib(round(size * 2**20)) for size in (29.1999, 147.9, 3148.1)] == ["29.2", "148", "3 150"]
