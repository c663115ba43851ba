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
# Captions of figures that several pages have.
MEMORY = "What autograd keeps for the backward pass of one image, against the steps of recurrence"
PENALTY = (
    "How far the columns of the step's Jacobian exceed 0.9, "
    "mean((1<sup>T</sup>J<sub>t</sub> − 0.9)<sub>+</sub><sup>2</sup>): "
    "0 where a change of the state dies out, as far as this can tell."
)
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
    first: str = "",
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
        first: HTML of what comes between the table and the figures.
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
        first=first,
        figures="\n".join(shown),
        notes="\n".join(f"<h2>{name}</h2>\n<p>{text}</p>" for name, text in notes.items()),
    )
    write_whole(file, page.encode())


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["<tr><td>" + "".join(f"<th>{cell}" for cell in head[1:])] if any(head) else []
    lines += [f"<tr><th>{row[0]}" + "".join(f"<td>{cell}" for cell in row[1:]) for row in body]
    text = re.sub(r"(\de)-(\d)", r"\1&#8209;\2", "\n".join(lines))  # a narrow page would break 1e-05 in two
    return f'<div class="wide"><table>{text}</table></div>'


_TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1, p {{ overflow-wrap: anywhere; }}
h1 {{ line-height: 1.2; }}
img {{ max-width: 100%; height: auto; }}
figure {{ margin: 2rem 0; }}
figcaption, .note, footer {{ color: #555; font-size: 0.9rem; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: 0.3rem 1rem 0.3rem 0; border-bottom: 1px solid #ddd; text-align: right; font-weight: normal; }}
th:first-child, td:first-child {{ text-align: left; }}
.wide {{ overflow-x: auto; }}
.views {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: 0.5rem 1rem; }}
.views img {{ width: 100%; image-rendering: pixelated; background: #18181c; }}
.views p {{ margin: 0; }}
.controls {{ display: flex; flex-wrap: wrap; align-items: center; gap: 0.3rem 1rem; margin: 0.7rem 0; }}
.controls[hidden] {{ display: none; }}
.controls button {{ font: inherit; min-width: 5rem; min-height: 2.75rem; cursor: pointer; }}
.controls label {{ flex: 1 1 14rem; position: relative; }}
.controls input {{ width: 100%; margin: 0; height: 2.75rem; accent-color: #0072b2; }}
.controls output {{ flex: 0 0 100%; font-variant-numeric: tabular-nums; }}
.hint {{ position: absolute; clip-path: inset(50%); }}
.marks {{ display: block; position: relative; font-size: 0.8rem; }}
.marks span {{ position: absolute; left: calc(0.5rem + var(--at) * (100% - 1rem)); padding-left: 0.3rem; }}
.marks span {{ border-left: 2px solid #0072b2; line-height: 1; white-space: nowrap; }}
.marks span:nth-child(2) {{ top: 1.4em; }}
.marks span:nth-child(n + 3) {{ top: 2.8em; }}
details summary {{ cursor: pointer; padding: 0.5rem 0; }}
</style>
<h1>{heading}</h1>
{lead}
{table}
{first}
{figures}
{notes}
<footer>The algorithm: Linsley et al., Stable and expressive recurrent vision models, NeurIPS 2020.</footer>
</html>
"""
