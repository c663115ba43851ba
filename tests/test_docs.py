"""The reference of the site has every public name."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[1] / "docs" / "api"
MODULES = {
    "crbp": "core",
    "crbp.cells": "models",
    "crbp.models.panoptic": "models",
    "crbp.ops": "ops",
    "crbp.data.pathfinder": "pathfinder",
    "crbp.data.panoptic": "panoptic",
    "crbp.tasks": "tasks",
    "crbp.metrics": "metrics",
    "crbp.analysis": "analysis",
    "crbp.export": "sharing",
    "crbp.hub": "sharing",
}


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    module = import_module(name)
    public = {each for each in module.__all__ if name != "crbp" or each not in ("cells", "ops")}
    written = re.findall(rf"^::: {re.escape(name)}\.(\w+)$", (PAGES / f"{MODULES[name]}.md").read_text(), re.MULTILINE)
    assert set(written) == public
    assert len(written) == len(public)
