"""Puts the pages that lie beside this folder into the site, and makes the links between them those of the site.

So every page reads the same in the repository as on the site.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the front page, its neighbours, the examples and all of the results but the weights."""
    beside = [ROOT / name for name in (*PAGES, "CITATION.cff", "examples/README.md")]
    beside += sorted((ROOT / "examples").glob("*.py"))
    results = [path for path in sorted((ROOT / "results").rglob("*")) if path.is_file() and "weights" not in path.parts]
    for path in (*beside, *results):
        files.append(File.generated(config, _site(path.relative_to(ROOT).as_posix()), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn the links of a page round."""
    source = Path(page.file.abs_src_path)

    def turned(found: re.Match[str]) -> str:
        mark, text, target, anchor = found.groups()
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        path = (source.parent / target).resolve()
        uri = _site((path / "README.md" if path.is_dir() else path).relative_to(ROOT).as_posix())
        if path.exists() and files.get_file_from_path(uri) is None:
            return text  # of the repository, which the site does not have
        return f"{mark}[{text}]({os.path.relpath(uri, Path(page.file.src_uri).parent)}{anchor or ''})"

    return LINK.sub(turned, markdown)


def _site(path: str) -> str:
    return PAGES.get(path, path.removeprefix("docs/"))
