"""Which code made a run is known where git knows it, and nothing fails where it does not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import crbp
from crbp import _code
from crbp._code import code, commit


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of somebody's, which is the working directory."""
    folder = tmp_path / "project"
    folder.mkdir()
    git(folder, "init")
    (folder / "a").write_text("1")
    git(folder, "add", "a")
    git(folder, "commit", "-m", "a")
    git(folder, "tag", "v1")
    monkeypatch.chdir(folder)
    return folder


def test_the_commit_of_the_working_directory_is_told(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = git(project, "rev-parse", "HEAD")
    assert code()["project commit"] == head
    assert code()["crbp"] == crbp.__version__
    (project / "sub").mkdir()
    assert commit(project / "sub") == head  # an untracked folder changes nothing
    assert commit(project, changes=True) == head
    (project / "a").write_text("2")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as within a hook
    assert code()["project commit"] == head
    assert commit(project, changes=True) == f"{head}-dirty"


def test_a_repository_of_somebody_runs_nothing_of_its_own(project: Path) -> None:
    trap = project / "trap"
    trap.write_text("#!/bin/sh\ntouch sprung\ncat\n")
    trap.chmod(0o755)
    (project / ".gitattributes").write_text("a filter=x\n")
    git(project, "config", "core.fsmonitor", str(trap))
    git(project, "config", "filter.x.clean", str(trap))
    (project / "a").write_text("2")
    (project / "sprung").unlink(missing_ok=True)
    assert "project commit" in code()
    assert not (project / "sprung").exists()
    git(project, "status")
    assert (project / "sprung").exists()  # so the trap is one


def test_a_run_from_a_checkout_of_crbp_has_its_commit_once(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "pyproject.toml").touch()
    monkeypatch.setattr(_code, "_CHECKOUT", project)
    assert code() == {"crbp": crbp.__version__, "commit": git(project, "rev-parse", "HEAD")}


def test_a_package_installed_below_a_repository_is_not_of_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = project / "lib" / "python3"
    installed.mkdir(parents=True)
    monkeypatch.setattr(_code, "_CHECKOUT", installed)
    monkeypatch.chdir(project.parent)
    assert code() == {"crbp": crbp.__version__}


def test_nothing_fails_without_git_or_a_commit(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert commit(empty) is None
    git(empty, "init")
    assert commit(empty) is None  # no commit yet
    monkeypatch.setenv("PATH", str(empty))
    assert commit(project) is None
    assert code() == {"crbp": crbp.__version__}
