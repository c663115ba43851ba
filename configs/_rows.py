"""What the scripts that write the configurations share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml


def thing(name: str, **settings: Any) -> dict[str, Any]:
    """One class of crbp and its settings."""
    return {"class_path": f"crbp.{name}", **({"init_args": settings} if settings else {})}


def text(comments: Iterable[str], content: dict[str, Any]) -> str:
    """One file: comments, and what they are of."""
    return "".join(f"# {line}\n" for line in comments) + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def write(folder: Path, files: dict[str, str]) -> None:
    """Write all files of a folder anew, and remove those that are no longer wanted."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    for path in folder.glob("*.yaml"):
        if path.name not in files:
            path.unlink()
