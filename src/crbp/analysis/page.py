"""A report as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from crbp._files import write_whole

DPI = 140
# The caption of a residual.
RESIDUAL = "How much the state still moves, ‖h<sub>t</sub> − h<sub>t−1</sub>‖ / ‖h<sub>t</sub>‖, mean over images."


def write_page(
    file: Path,
    *,
    title: str,
    heading: str,
    lead: str,
    table: Sequence[Sequence[str]],
    figures: Mapping[str, tuple[Figure, str]],
    notes: Mapping[str, str],
) -> None:
    """Write the page, and each figure as a PNG file beside it.

    Args:
        file: of the page.
        title: of the window.
        heading: of the page.
        lead: HTML of what comes first.
        table: rows of HTML cells, the first row and the first cell of each being headings.
        figures: name → figure and HTML of its caption.
        notes: heading → HTML of what comes last.
    """
    shown = []
    for name, (figure, caption) in figures.items():
        picture = io.BytesIO()
        figure.savefig(picture, dpi=DPI)
        write_whole(file.with_name(f"{name}.png"), picture.getvalue())
        source = base64.b64encode(picture.getvalue()).decode()
        text = html.escape(re.sub("<[^>]*>", "", caption))
        shown.append(
            f'<figure id="{name}"><img alt="{text}" src="data:image/png;base64,{source}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    page = _TEMPLATE.format(
        title=html.escape(title),
        heading=heading,
        lead=lead,
        table=_table(table),
        figures="\n".join(shown),
        notes="\n".join(f"<h2>{name}</h2>\n<p>{text}</p>" for name, text in notes.items()),
    )
    write_whole(file, page.encode())


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["<tr><td>" + "".join(f"<th>{cell}" for cell in head[1:])] if any(head) else []
    lines += [f"<tr><th>{row[0]}" + "".join(f"<td>{cell}" for cell in row[1:]) for row in body]
    return "<table>" + "\n".join(lines) + "</table>"


_TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1 {{ line-height: 1.2; }}
img {{ max-width: 100%; height: auto; }}
figure {{ margin: 2rem 0; }}
figcaption, .note, footer {{ color: #555; font-size: 0.9rem; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: 0.3rem 1rem 0.3rem 0; border-bottom: 1px solid #ddd; text-align: right; font-weight: normal; }}
th:first-child, td:first-child {{ text-align: left; }}
</style>
<h1>{heading}</h1>
{lead}
{table}
{figures}
{notes}
<footer>The algorithm: Linsley et al., Stable and expressive recurrent vision models, NeurIPS 2020.</footer>
</html>
"""
