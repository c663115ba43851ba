"""Draws the badges of the front page from what they state, so that they are true: a test compares.

    python docs/_badges.py

They are files of the repository, since a badge that is fetched from elsewhere tells someone who reads the page.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "images"
WIDTH = 7  # pixels of a letter, more or less
SVG = """<svg xmlns="http://www.w3.org/2000/svg" width="{whole}" height="20" role="img" aria-label="{name}: {value}">
<title>{name}: {value}</title>
<rect width="{whole}" height="20" rx="3" fill="#3f51b5"/>
<path d="M3 0h{inner}v20h-{inner}a3 3 0 0 1-3-3v-14a3 3 0 0 1 3-3z" fill="#444"/>
<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle">
<text x="{middle}" y="14">{name}</text>
<text x="{other}" y="14">{value}</text>
</g>
</svg>
"""


def stated() -> dict[str, str]:
    """What the badges say: of the package, and of what it was tested with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tested = json.loads((ROOT / "results" / "reliability" / "compatibility.json").read_text(encoding="utf-8"))
    passed = [key.split(":") for key, row in tested.items() if row["outcome"] == "passed"]
    found = {}
    for place, name in enumerate(("Python", "torch")):
        versions = sorted({tuple(map(int, key[place].split(".")[:2])) for key in passed})
        found[f"core tested with {name}"] = " | ".join(".".join(map(str, version)) for version in versions)
    return {**found, "licence": project["license"], "typed": "mypy --strict"}


def badges() -> dict[str, str]:
    """Name and content of every file."""
    return {f"badge_{name.split()[-1].lower()}.svg": badge(name, value) for name, value in stated().items()}


def badge(name: str, value: str) -> str:
    """One badge: a name and what it is."""
    left, right = (WIDTH * len(text) + 10 for text in (name, value))
    return SVG.format(
        name=name, value=value, whole=left + right, inner=left - 3, middle=left / 2, other=left + right / 2
    )


if __name__ == "__main__":
    for file, content in badges().items():
        (FOLDER / file).write_text(content, encoding="utf-8")
