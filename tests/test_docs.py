"""The reference of the site has every public name."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "api"
MODULES = {
    "crbp": "core",
    "crbp.cells": "models",
    "crbp.models": "models",
    "crbp.models.panoptic": "models",
    "crbp.ops": "ops",
    "crbp.data.pathfinder": "pathfinder",
    "crbp.data.panoptic": "panoptic",
    "crbp.tasks": "tasks",
    "crbp.losses": "tasks",
    "crbp.metrics": "metrics",
    "crbp.analysis": "analysis",
    "crbp.export": "sharing",
    "crbp.hub": "sharing",
}
ELSEWHERE = {"crbp": {"cells", "ops"}, "crbp.models": {"RFPN", "PanopticFPN", "PanopticResult"}}  # in modules of above


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    module = import_module(name)
    public = set(module.__all__) - ELSEWHERE.get(name, set())
    written = re.findall(rf"^::: {re.escape(name)}\.(\w+)$", (PAGES / f"{MODULES[name]}.md").read_text(), re.MULTILINE)
    assert set(written) == public
    assert len(written) == len(public)


def test_badges_state_what_is_so(load_script: Callable[[str], ModuleType]) -> None:
    script = load_script("docs/_badges.py")
    drawn = {file.name: file.read_text(encoding="utf-8") for file in script.FOLDER.glob("badge_*.svg")}
    assert drawn == script.badges()  # else run docs/_badges.py
    project = tomllib.loads((script.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["mypy"]["strict"] is True
    named = [each.rpartition(" ")[2] for each in project["project"]["classifiers"] if "Python :: 3" in each]
    assert script.stated()["core tested with Python"] == " | ".join(named)
    front = (script.ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"docs/images/(badge_\w+\.svg)", front)) == set(drawn)


def test_the_page_of_a_package_index_points_at_nothing_that_it_lacks() -> None:
    hook = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["metadata"]["hooks"]
    (fragment,) = hook["fancy-pypi-readme"]["fragments"]
    front = page = (ROOT / fragment["path"]).read_text(encoding="utf-8")
    for each in hook["fancy-pypi-readme"]["substitutions"]:
        page = re.sub(each["pattern"], each["replacement"], page)
    assert all(link.startswith("https://") for link in re.findall(r"\]\((.*?)\)", page))
    assert "![" not in page
    assert len(page) < len(front)
    heading = re.compile("^#+ .*$", re.MULTILINE)
    assert heading.findall(page) == heading.findall(front)
