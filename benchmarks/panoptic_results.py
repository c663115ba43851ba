"""Set the table of the rows of panoptic segmentation that have been trained, and draw quality against steps.

    python benchmarks/panoptic_results.py 'shapes_*' --seeds 0 1 --out results/panoptic

Reads the runs of `panoptic.py`; rows that are not finished are left out.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from _runs import ROOT, add_rows, label, wanted
from matplotlib.figure import Figure
from panoptic import CONFIGS

QUALITIES = ("pq", "sq", "rq", "pq_things", "pq_stuff", "box_ap", "mask_ap")
COLUMNS = ("row", "seed", "trained_steps", "parameters", "images", "steps", *QUALITIES, "seconds", "commit")
METHODS = {
    "fpn": ("Panoptic FPN", "#000000"), "rfpn_bptt1": ("R-FPN, BPTT, 1 step", "#E69F00"),
    "rfpn_bptt3": ("R-FPN, BPTT, 3 steps", "#D55E00"), "rfpn_crbp10": ("R-FPN, C-RBP, 10 steps", "#56B4E9"),
    "rfpn_crbp20": ("R-FPN, C-RBP, 20 steps", "#0072B2"),
}  # fmt: skip


def collect(run: Path) -> list[dict[str, Any]]:
    """The lines of one run, one for each number of steps it was measured at; none if it is not finished."""
    if not (run / "made.json").exists():
        return []
    made, found = (json.loads((run / name).read_text()) for name in ("made.json", "analysis.json"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    source = config["data"]["init_args"]["source"]["init_args"]
    line = {
        "row": run.parent.name.removesuffix(f"_seed{made['seed']}"),
        "trained_steps": found["steps"],
        "parameters": found["parameters"],
        "images": source["train"] * config["trainer"]["max_epochs"],
        **{name: made[name] for name in ("seed", "seconds", "commit")},
    }
    return [line | each for each in found["quality"]]


def figure(lines: Iterable[dict[str, Any]]) -> Figure:
    """Panoptic quality against the steps of the mask head, a curve for each run; Panoptic FPN's is level."""
    drawn = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = drawn.subplots()
    curves: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in lines:
        curves.setdefault((line["row"].split("_", 1)[1], line["seed"]), []).append(line)
    for (method, seed), curve in curves.items():
        name, colour = METHODS[method]
        shown = name if seed == min(seed for other, seed in curves if other == method) else None
        if curve[0]["steps"] is None:
            axes.axhline(curve[0]["pq"], color=colour, linestyle="--", label=shown)
            continue
        axes.plot([line["steps"] for line in curve], [line["pq"] for line in curve], color=colour, label=shown)
        (at_n,) = (line for line in curve if line["steps"] == line["trained_steps"])
        axes.plot(at_n["steps"], at_n["pq"], "o", color=colour, markersize=5)
    axes.set(xlabel="steps of the mask head (dots: those trained for)", ylabel="PQ on held-out images")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return drawn


def main() -> None:
    """Set the table of the rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_rows(parser)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "panoptic")
    options = parser.parse_args()
    runs = (options.runs.resolve() / label(*row) / "version_0" for row in wanted(CONFIGS, options))
    lines = [line for run in runs for line in collect(run)]
    if not lines:
        raise SystemExit("no finished run was found; panoptic.py trains them, --runs says where they are")
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "shapes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in line.items()} for line in lines)
    figure(lines).savefig(options.out / "steps.png", dpi=140)
    print(f"{len(lines)} lines in {options.out}")


if __name__ == "__main__":
    main()
