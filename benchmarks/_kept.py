"""The networks that `results/pathfinder` keeps, and lists of what was measured of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from _runs import ROOT

FOLDER = ROOT / "results" / "pathfinder"


def kept(patterns: Sequence[str]) -> list[Path]:
    """Weights of the rows whose names fit one of the patterns."""
    files = sorted((FOLDER / "weights").glob("*.safetensors"))
    if not (found := [file for file in files if any(fnmatch(file.stem, pattern) for pattern in patterns)]):
        raise SystemExit(f"no kept row is called {' or '.join(patterns)}; {FOLDER / 'weights'} has them")
    return found


def put(new: dict[str, Any], file: Path) -> None:
    """Put what was measured of a row into a list, in the place of what it has of that row, and show it."""
    old: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    rows = sorted([*(row for row in old if row["row"] != new["row"]), new], key=lambda row: str(row["row"]))
    file.write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(new), flush=True)
