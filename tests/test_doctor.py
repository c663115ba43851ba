"""`crbp doctor` tells the truth about this installation and about ones in which something is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from crbp import doctor
from crbp.cli import main

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
SRC = PROJECT.parent / "src"


def test_every_package_that_the_project_asks_for_can_be_read() -> None:
    extras = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for extra, lines in extras.items():
        for line in lines:
            asked = doctor._REQUIREMENT.match(f"{line}; extra == '{extra}'")
            assert line.startswith("crbp[") or (asked is not None and asked[3] == extra), line


def test_packages_belong_to_the_smallest_extra_that_has_them() -> None:
    extras = {each.name: each.extra for each in doctor.requirements()}
    assert extras["torch"] == ""
    assert (extras["numba"], extras["lightning"], extras["torchvision"]) == ("data", "train", "panoptic")
    assert "all" not in extras.values()


def test_here_training_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    versions = {each["name"]: each["version"] for each in found["packages"]}
    assert versions["torch"] == metadata.version("torch")
    assert found["works"]
    assert found["faults"] == {}
    assert found["threads"] == torch.get_num_threads()
    assert Path(found["native"]["library"]).is_file()
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("Training works.\n")


def test_devices_are_listed_by_name_and_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [139, 80]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda k: SimpleNamespace(name=f"GPU {k}", total_memory=sizes[k] * 2**30)
    )
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    listed = ["cpu", "cuda:0 GPU 0, 139.0 GiB", "cuda:1 GPU 1, 80.0 GiB", "mps"]
    main(["doctor", "--json"])
    assert json.loads(capsys.readouterr().out)["devices"] == listed
    main(["doctor"])
    assert f"  devices           {'; '.join(listed)}\n" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert doctor.examine()["devices"] == ["cpu"]


BARE = """
import importlib.metadata, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}")
version = importlib.metadata.version
def installed(name):
    if name in HIDDEN:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
HIDDEN = {"lightning", "numpy", "rich", "safetensors", "yaml", "PIL", "pillow", "numba", "jsonargparse", "torchvision"}
sys.meta_path.insert(0, Hidden())
importlib.metadata.version = installed
from crbp.cli import main
sys.exit(main(["doctor"]))
"""


def test_with_torch_alone_it_says_what_to_install_and_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    broken = {"PYTHONPATH": str(SRC), "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path / "file")}
    command, environment = [sys.executable, "-W", "ignore", "-c", BARE], {**os.environ, **broken}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1, done.stderr
    assert "lightning         missing           train     at least 2.6 is needed; run: pip install 'crbp[train]'" in (
        done.stdout
    )
    assert "run: pip install 'crbp[panoptic]'" in done.stdout
    assert "native code       cannot be built: " in done.stdout
    assert "cache             cannot be written: " in done.stdout
    assert done.stdout.splitlines()[-1].startswith("Training does not work: ")
    assert done.stdout.endswith("missing or too old; run: pip install 'crbp[train]'\n")


def test_a_version_below_the_lowest_is_not_enough() -> None:
    assert doctor._package(doctor.Requirement("torch", "2.11", ""))["remedy"] is None
    assert doctor._package(doctor.Requirement("torch", "999.1", ""))["remedy"] == "pip install 'torch>=999.1'"
    assert doctor._numbers("2.9.1+cu130") < doctor._numbers("2.11")


def test_a_package_that_cannot_be_imported_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "crbp.tasks", None)
    found = doctor.examine()
    assert not found["works"]
    assert "crbp.tasks" in found["faults"]["train"]
    assert doctor._told(found).endswith(f"Training does not work: {found['faults']['train']}")
