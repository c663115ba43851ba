"""The model card: what is known of a network and of the run that trained it, for a reader who has only its folder."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from crbp._logs import scalars
from crbp.tasks import Origin

_CARD = """---
library_name: crbp
license: {licence}
pipeline_tag: image-segmentation
tags: [crbp, recurrent, {kind}]
---

# {name}

A `{kind}` of {parameters:,} parameters, trained with [crbp](https://arxiv.org/abs/2005.11362){version}.

```python
import crbp.hub

net = crbp.hub.from_pretrained("FOLDER or OWNER/NAME")  # pip install 'crbp[hub]'
```

Nothing is unpickled. Classes of packages other than `crbp` are imported only where `trust=` names them.

## What was measured

{numbers}

## What it was trained on

{data}

## Configuration

{net}
"""


def written_card(checkpoint: Path, net: nn.Module, origin: Origin, *, numbers: Mapping[str, Any], licence: str) -> str:
    """The card as Markdown.

    Args:
        checkpoint: where the network was saved; what is beside it is looked at.
        net: the network.
        origin: where it came from.
        numbers: further ones, by name.
        licence: of the weights.
    """
    version = origin.code.get("crbp")
    code = {name: origin.code[name] for name in ("commit", "project commit") if name in origin.code}
    known = {**code, **_of_table(checkpoint), **_of_run(checkpoint), **numbers}
    known = {name: value for name, value in known.items() if value not in ("", None)}
    rows = [f"| {_line(name)} | {_short(value)} |" for name, value in known.items()]
    table = "\n".join(["| | |", "|---|---|", *rows]) if rows else "Nothing is recorded beside the weights."
    return _CARD.format(
        name=_line(origin.name or checkpoint.stem),
        kind=type(net).__name__,
        parameters=sum(parameter.numel() for parameter in net.parameters()),
        version=f" {_line(version)}" if version else ", in a version that is not known",
        licence=json.dumps(licence),
        numbers=table if "commit" in known else f"{table}\n\nThe commit of crbp is not known.",
        data=_block(origin.run["data"]) if "data" in origin.run else "It is not recorded.",
        net=_block(origin.run.get("model", origin.net)),
    )


def _of_table(checkpoint: Path) -> dict[str, Any]:
    """The row of this network in the table beside the folder of the weights, at the steps that it was trained for."""
    table = checkpoint.absolute().parent.parent / "table.csv"
    with contextlib.suppress(OSError, ValueError, csv.Error):
        rows = csv.DictReader(table.read_text(encoding="utf-8").splitlines())
        own = (row for row in rows if row.get("row") == checkpoint.stem)
        found = next((row for row in own if "trained_steps" not in row or row.get("steps") == row["trained_steps"]), {})
        return {name: value for name, value in found.items() if isinstance(name, str)}
    return {}


def _of_run(checkpoint: Path) -> dict[str, Any]:
    """What the folder of a run has: its logs, `crbp analyze` of this very file, seed and commit where noted."""
    run = checkpoint.absolute().parent.parent
    found = _of_logs(run, checkpoint.stem)
    analysis, made = _json(run / "analysis" / "analysis.json"), _json(run / "made.json")
    same = Path(str(analysis.get("checkpoint"))).name == checkpoint.name
    if same and (run / "analysis" / "analysis.json").stat().st_mtime >= checkpoint.stat().st_mtime:
        found |= {name: value for name, value in analysis.items() if isinstance(value, int | float)}
    return {**found, **{name: made[name] for name in ("seed", "seconds", "commit") if name in made}}


def _of_logs(run: Path, which: str) -> dict[str, float]:
    """What was validated when the best weights were kept; the last may have been trained on since."""
    curves = scalars(run, tags=("val/",)) if which == "best" else {}
    judged = curves.get("val/f1", [])
    if not judged:
        return {}
    step = max(judged, key=lambda each: each[1])[0]
    values = {tag: value for tag, curve in curves.items() for at, value in curve if at == step}
    return {"training steps": step + 1, **values}


def _json(file: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _line(value)


def _line(value: Any) -> str:
    """A text as one cell of a table, whatever it has in it."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("`", "'")


def _block(config: Any) -> str:
    plain = json.loads(json.dumps(config))  # mappings of any kind become plain ones
    return f"```yaml\n{yaml.safe_dump(plain, sort_keys=False)}```"
