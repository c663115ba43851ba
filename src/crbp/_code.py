"""Which code a run was made by: the version of crbp, its commit, and that of the project it is used in."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import crbp

_CHECKOUT = Path(__file__).parents[2]


def code() -> dict[str, str]:
    """What is known of the code that runs.

    Returns:
        ``"crbp"``, its version; ``"commit"``, where crbp runs from its own checkout; ``"project commit"``, where the
        working directory is in a checkout of something else. That of crbp ends on ``-dirty`` where files that git
        knows were changed since. What cannot be known is left out.
    """
    found = {"crbp": crbp.__version__}
    # A package installed below somebody's repository is not of that repository.
    own = (
        commit(_CHECKOUT, changes=True)
        if (_CHECKOUT / ".git").exists() and (_CHECKOUT / "pyproject.toml").exists()
        else None
    )
    other = commit(Path.cwd())
    if own is not None:
        found["commit"] = own
    if other is not None and other != (own or "").removesuffix("-dirty"):
        found["project commit"] = other
    return found


def commit(folder: Path, *, changes: bool = False) -> str | None:
    """The commit that a folder is at; None without git, a repository or a commit in it.

    To see changes, git reads the files and may run what the repository's configuration names: not in one of others.
    """
    # Within a hook of git, its variables name the repository of that.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    words = ["describe", "--always", "--abbrev=40", "--exclude=*", *(["--dirty"] if changes else [])]
    asked = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(folder), *words]
    try:
        done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return done.stdout.strip() or None
