"""Set the table of the rows on shapes that have been trained, and draw quality against steps.

    python benchmarks/panoptic_results.py 'shapes_*' --seeds 0 1 --out results/panoptic
    python benchmarks/panoptic_results.py 'few*' --seeds 0 1 --out results/panoptic

Reads the runs of `panoptic.py`, and writes all that was measured of them to `table.csv` or `few.csv`, in place of
what is there of the same row and seed, and the weights of one of them, in half precision, to `weights`; rows that are
not finished are left out.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from _runs import ROOT, add_rows, label, started_from, wanted
from _tables import markdown, with_tables
from matplotlib.figure import Figure
from panoptic import CONFIGS, STEPS, measure

import crbp
from crbp.tasks import PanopticData, load_net, load_trained, save_net
from crbp.tasks.panoptic import QUALITIES
from crbp.tasks.weights import build

Line = dict[str, str]  # of the table of all that was measured
SHOWN = ("pq", "pq_things", "sq_things", "rq_things", "pq_stuff", "true_box_iou")
COLUMNS = (
    "row", "seed", "trained_steps", "parameters", "images", "steps", *QUALITIES, "true_box_iou", "seconds",
    "saved_mib", "commit", "true_box_pq_things",
)  # fmt: skip
FILES = ("mask_heads", "mask_heads_heaps", "overfit", "cost", "settling")
FEW_ROWS = ("few100", "few25", "few25b")
TABLES = {"shapes": "table.csv", **dict.fromkeys(FEW_ROWS, "few.csv")}  # by how names begin
FEW = 1000  # updates of a mask head trained alone
FEW_IMAGES, MORE_IMAGES = 200, 1000  # that it is measured on
TRAINED = 2000  # images that it is trained on, unless these are few
LEARNT = ("pq", "pq_things", "pq_stuff", "rq", "box_ap", "mask_ap")
NETS = ("Panoptic FPN", "R-FPN, N = 20")
SPREAD = ("median", "min", "max")
SHIPPED = "shapes_rfpn_crbp20"  # the row, with seed 0, whose weights are handed on
METHODS = {
    "fpn": ("Panoptic FPN", "#000000"), "rfpn_bptt1": ("R-FPN, BPTT, 1 step", "#E69F00"),
    "rfpn_bptt3": ("R-FPN, BPTT, 3 steps", "#D55E00"), "rfpn_crbp5": ("R-FPN, C-RBP, 5 steps", "#009E73"),
    "rfpn_crbp10": ("R-FPN, C-RBP, 10 steps", "#56B4E9"), "rfpn_crbp20": ("R-FPN, C-RBP, 20 steps", "#0072B2"),
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
        **{name: made[name] for name in ("seed", "commit")},
        "seconds": round(made["seconds"]),
        "saved_mib": saved_mib(run / "weights" / "last.safetensors", config),
    }
    return [line | each for each in found["quality"]]


def saved_mib(file: Path, config: dict[str, Any]) -> float:
    """MiB that autograd saves in a training step of a run, on its first batch."""
    net: Any = load_net(file)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(config["model"]["init_args"]["trained"])))
    batch = next(iter(build(PanopticData, config["data"], f"the data of {file}").train_dataloader()))
    torch.manual_seed(0)  # of the boxes that are drawn
    with crbp.activation_memory(exclude=[*net.train().parameters(), *batch.images]) as memory:
        losses = net(batch.images, batch.targets)
    del losses
    return memory.bytes / 2**20


def figure(lines: Iterable[Line]) -> Figure:
    """Panoptic quality against the steps of the mask head, a curve for each run; Panoptic FPN's is level."""
    drawn = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = drawn.subplots()
    named = set()
    for curve in runs(lines):
        name, colour = METHODS[method(curve[0])]
        shown = None if name in named else name
        named.add(name)
        quality = [100 * float(line["pq"]) for line in curve]
        if not curve[0]["steps"]:
            axes.axhline(quality[0], color=colour, linestyle="--", label=shown)
            continue
        axes.plot([int(line["steps"]) for line in curve], quality, color=colour, label=shown)
        axes.plot(int(at_end(curve)["steps"]), 100 * float(at_end(curve)["pq"]), "o", color=colour, markersize=5)
    axes.set(xlabel="steps of the mask head (dots: those trained for)", ylabel="PQ on held-out images")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return drawn


def table(lines: Iterable[Line], *, places: int = 1) -> str:
    """A row for each method, the values of its seeds side by side with so many digits behind the point."""
    found: dict[str, list[list[Line]]] = {name: [] for name in METHODS}
    for curve in runs(lines):
        found[method(curve[0])].append(curve)
    body = []
    for name, curves in found.items():
        if not curves:
            continue
        ends = [at_end(curve) for curve in curves]
        shown = [side_by_side((each[quality] for each in ends), places) for quality in SHOWN]
        last = side_by_side((curve[-1]["pq"] for curve in curves), places) if ends[0]["steps"] else ""
        spent = ", ".join(f"{float(each['seconds']) / 60:.0f}" for each in ends)
        parameters, saved = f"{int(ends[0]['parameters']):,}", f"{float(ends[0]['saved_mib']):.1f}"
        body.append([METHODS[name][0], parameters, saved, spent, *shown, last])
    return markdown(
        (
            "", "parameters", "MiB", "minutes", "PQ at N", "PQ things", "SQ things", "RQ things", "PQ stuff",
            "IoU in true boxes", f"PQ at {STEPS[-1]} steps",
        ),
        body,
    )  # fmt: skip


def heads_table(rows: Iterable[dict[str, Any]]) -> str:
    """A row for each mask head trained alone, its seeds side by side; see `mask_heads.py`.

    By number of images trained on and of updates, told where there are several.
    """
    found: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["trained"], row["updates"])):
        found.setdefault((row["trained"], row["updates"], row["head"]), []).append(row)
    columns = {"loss": ("loss", ".3f"), "iou": ("IoU", ".1f")}
    optional = {
        "iou_low": ("a tenth is below", ".1f"),
        "iou_high": ("a tenth is above", ".1f"),
        "true_box_pq_things": ("PQ things, true boxes", ".2f"),
        "pq": ("PQ at N", ".2f"),
        "pq_things": ("PQ things", ".1f"),
        "pq_at_30": ("PQ at 30 steps", ".2f"),
    }
    known = {key for seeds in found.values() for row in seeds for key in row}
    columns |= {key: column for key, column in optional.items() if key in known}
    leading = {
        title: place
        for place, title in enumerate(("images", "updates"))
        if len({numbers[place] for numbers in found}) > 1
    }
    body = [
        [
            key[-1],
            *(f"{key[place]:,}" for place in leading.values()),
            f"{seeds[0]['parameters']:,}",
            *(", ".join(f"{row[name]:{form}}" for row in seeds if name in row) for name, (_, form) in columns.items()),
            ", ".join(f"{row['seconds'] / 60:.0f}" for row in seeds),
        ]
        for key, seeds in found.items()
    ]
    return markdown(("mask head", *leading, "parameters", *(title for title, _ in columns.values()), "minutes"), body)


def overfit_table(rows: Iterable[dict[str, Any]]) -> str:
    """A row for each model that has learnt two images by heart; see `panoptic_overfit.py`."""
    found = {row["model"]: row for row in rows}
    names = {"fpn": METHODS["fpn"][0], "rfpn": METHODS["rfpn_crbp10"][0]}
    body = [
        [name, *(_digits(100 * found[model][quality]) for quality in LEARNT), "PQ ≥ 80"]
        for model, name in names.items()
        if model in found
    ]
    return markdown(("", "PQ", "PQ things", "PQ stuff", "RQ", "box AP", "mask AP", "wanted"), body)


def memory_table(found: dict[str, Any]) -> str:
    """MiB of each method by number of steps; see `panoptic_cost.py`."""
    steps = list(found["BPTT"])
    body = [[f"R-FPN, {name}", *(_digits(found[name][each] / 2**20) for each in steps)] for name in ("C-RBP", "BPTT")]
    level = ["Panoptic FPN", _digits(found["Panoptic FPN"] / 2**20), *("" for _ in steps[1:])]
    return markdown(("N", *steps), [*body, level])


def time_table(found: dict[str, Any]) -> str:
    """Seconds of both networks, and their ratio in each turn: median, least and most; see `panoptic_cost.py`."""
    full, small, training = found["full_size"], found["small"], found["full_size_training"]
    rows = {
        "inference, ResNet-50, one image of 800×1088, 10 instances": full["10 instances"],
        "the same, 100 instances": full["100 instances"],
        "inference, small, one image of 192×192, 50 instances": small["inference"],
        f"training step, ResNet-50, one image of 800×800, {training['masks']} masks": training,
        "training step, small, two such images": small["training"],
    }
    body = []
    for name, row in rows.items():
        seconds = [[_digits(row[net][key]) for key in SPREAD] for net in NETS]
        ratio = [f"{row['ratio'][key]:.2f}" for key in SPREAD]
        shown = [f"{median} s ({least} to {most})" for median, least, most in seconds]
        body.append([name, *shown, f"{ratio[0]}× ({ratio[1]} to {ratio[2]})"])
    return markdown(("", *NETS, "ratio"), body)


def settling_table(found: dict[str, Any]) -> str:
    """Steps, quality and time beside Panoptic FPN, by tolerance; see `panoptic_settling.py`."""
    body = []
    for row in found["rows"]:
        ratios = [each[row["name"]]["ratio"] for each in (found["small"], *found["full_size"].values())]
        shown = [f"{ratio['median']:.2f}× ({ratio['min']:.2f} to {ratio['max']:.2f})" for ratio in ratios]
        body.append([row["name"], f"{row['steps']:.1f}", f"{100 * row['pq']:.2f}", *shown])
    large = [f"ResNet-50, {instances}, so many steps" for instances in found["full_size"]]
    return markdown(("", "steps", "PQ", "time, this network", *large), body)


def as_in_training(row: dict[str, Any]) -> bool:
    """Whether a mask head was trained in what the network proposes, and measured on many images."""
    return bool(row["images"] == MORE_IMAGES and row["boxes"] == "proposed")


def tables(folder: Path) -> dict[str, str]:
    """The tables of the page in a folder, from the files beside it."""
    heads, heaps, overfit, cost, settling = (json.loads((folder / f"{name}.json").read_text()) for name in FILES)
    many, few = [row for row in heads if row["trained"] == TRAINED], [row for row in heads if row["trained"] < TRAINED]
    briefly = [row for row in many if row["images"] == FEW_IMAGES and row["boxes"] == "moved"]
    moved = [row for row in many if row["images"] == MORE_IMAGES and row["boxes"] == "moved"]
    proposed, few, heaps = ([row for row in rows if as_in_training(row)] for rows in (many, few, heaps))
    return {
        "settling": settling_table(settling),
        "overfit": overfit_table(overfit),
        "memory": memory_table(cost["memory"]),
        "time": time_table(cost),
        "shapes": table(read(folder / TABLES["shapes"])),
        **{kind: table(of_kind(kind, read(folder / TABLES[kind])), places=2) for kind in FEW_ROWS},
        "heads": heads_table(row for row in briefly if row["updates"] <= FEW),
        "heads_long": heads_table(row for row in briefly if row["updates"] > FEW),
        "heads_more": heads_table(moved),
        "heads_proposed": heads_table(proposed),
        "heads_heaps": heads_table(row for row in heaps if row["trained"] == TRAINED),
        "heads_few": heads_table(few),
        "heads_heaps_few": heads_table(row for row in heaps if row["trained"] < TRAINED),
    }


def runs(lines: Iterable[Line]) -> list[list[Line]]:
    """The lines of each run, by rising number of steps."""
    found: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        found.setdefault((line["row"], line["seed"]), []).append(line)
    return [sorted(curve, key=lambda line: int(line["steps"] or 0)) for curve in found.values()]


def of_kind(kind: str, lines: Iterable[Line]) -> list[Line]:
    """Those whose row's name begins so."""
    return [line for line in lines if line["row"].startswith(f"{kind}_")]


def method(line: Line) -> str:
    """What a run was trained by: the row's name without the task."""
    return line["row"].split("_", 1)[1]


def at_end(curve: Sequence[Line]) -> Line:
    """What was measured with the number of steps that a run was trained for."""
    (found,) = (line for line in curve if line["steps"] == line["trained_steps"])
    return found


def _digits(value: float) -> str:
    """Three digits, or all before the point."""
    places = sum(value < least for least in (1, 10, 100))
    return f"{value:,.{places}f}".replace(",", " ")


def side_by_side(values: Iterable[str], places: int) -> str:
    """Percentages of several seeds."""
    return ", ".join(f"{100 * float(value):.{places}f}" for value in values)


def hand_on(run: Path, file: Path) -> None:
    """Keep the last weights of a run in half precision, and beside them what is measured with them."""
    net, origin = load_trained(run / "weights" / "last.safetensors")
    half = {name: value.half() if value.is_floating_point() else value for name, value in net.state_dict().items()}
    described = json.loads(json.dumps(origin.run))
    described["model"]["init_args"]["weights"] = str(started_from(CONFIGS / f"{SHIPPED}.yaml"))  # not of this machine
    save_net(half, file, replace(origin, run=described))
    net = load_net(file)
    (found,) = measure(net, build(PanopticData, described["data"], f"the data of {file}"), [net.steps])
    file.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")


def read(file: Path) -> list[Line]:
    """The lines of a table that has been written."""
    with file.open(newline="") as rows:
        return list(csv.DictReader(rows))


def write(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write lines to a table in place of those of the same row and seed."""
    new = [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in line.items()} for line in lines]
    made = {(line["row"], str(line["seed"])) for line in new}
    kept = [line for line in read(file) if (line["row"], line["seed"]) not in made] if file.exists() else []
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*kept, *new], key=lambda line: (line["row"], int(line["seed"]))))


def main() -> None:
    """Set the table of the rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_rows(parser)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "panoptic")
    options = parser.parse_args()
    folders = [options.runs.resolve() / label(*row) / "version_0" for row in wanted(CONFIGS, options)]
    lines = [line for run in folders for line in collect(run)]
    if not lines:
        raise SystemExit("no finished run was found; panoptic.py trains them, --runs says where they are")
    files = {TABLES.get(line["row"].split("_")[0]) for line in lines}
    if len(files) > 1 or None in files:
        raise SystemExit(
            f"a table is of the rows shapes_* or few*, not of {', '.join(sorted({row['row'] for row in lines}))}"
        )
    (name,) = files
    options.out.mkdir(parents=True, exist_ok=True)
    write(options.out / name, lines)
    page = options.out / "README.md"
    if name == TABLES["shapes"]:
        figure(read(options.out / name)).savefig(options.out / "steps.png", dpi=140)
    page.write_text(with_tables(page.read_text(), tables(options.out)))
    for run in folders:
        if run.parent.name == SHIPPED and (run / "made.json").exists():
            hand_on(run, options.out / "weights" / f"{SHIPPED}.safetensors")
    print(f"{len(lines)} lines in {options.out}")


if __name__ == "__main__":
    main()
