"""Set the table of the rows of contour tracing that have been trained, and draw the figures.

    python benchmarks/pathfinder_results.py 'small*' --out results/pathfinder

Reads the runs of `pathfinder.py`; rows that are not finished are left out. What is known of each row is kept in
``rows/NAME.json`` and its weights beside that, so that rows may be trained on several machines, one after the other:
table, curves, figures and the tables in ``README.md`` are those of all rows that are kept. The memory of a training
step is counted anew for all of them, each time, so that all rows have it of the code at hand.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from _pathfinder_rows import LATE, METHODS, Curve, Line, Row, figures, of_middle_task
from _runs import ROOT, add_rows, label, rounded, wanted
from _tables import markdown, with_tables
from pathfinder import CONFIGS, TASKS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crbp import DivergenceWarning, activation_memory
from crbp.analysis.inputs import load, unfused
from crbp.analysis.measured import penalty_of
from crbp.data.pathfinder import PathfinderConfig
from crbp.models import FeedForwardNet, PathfinderNet
from crbp.tasks import load_net

VARIANTS = {
    "k3": "3×3 kernels", "k5": "5×5 kernels", "k9": "9×9 kernels", "gmres": "solved by GMRES",
    "evidential": "evidential loss", "batchnorm": "normalised by batch",
    "stronger": "five times the penalty on growth",
}  # fmt: skip
BATCH = 128  # images of the paper's training step
COLUMNS = (
    "row", "task", "cell", "method", "variant", "kernel", "steps", "parameters", "images", "seconds", "saved_mib",
    "shared_mib", "f1_at_n", "f1_at_4n", "f1_best", "f1_best_at", "residual_at_4n", "stable_share", "ks_statistic",
    "moved", "images_to_f1_0.9", "batch", "seed", "commit", "processor",
)  # fmt: skip
TAGS = ("val/f1", "val/residual", "val/spectral_radius", "val/spectral_radius_converged", "val/penalty")


def collect(run: Path) -> Row:
    """A run that is finished."""
    feedforward = "feedforward" in run.parent.name
    curves = {tag: found for tag in TAGS if (found := curve(run, tag))}
    return Row(line=line_of(run), f1=[] if feedforward else analysis(run)["f1"], curves=curves)


def line_of(run: Path) -> Line:
    """The line of the table."""
    made = json.loads((run / "made.json").read_text())
    config = yaml.safe_load((run / "config.yaml").read_text())
    net = config["model"]["init_args"]["net"]["init_args"]
    data = config["data"]["init_args"]
    task, batch = data["source"]["init_args"]["preset"], data["batch_size"]
    _, cell, *rest = run.parent.name.removesuffix(f"_seed{made['seed']}").split("_")
    if cell == "feedforward":
        cell, rest = "", [cell, *rest]
    weights = run / "weights" / "last.safetensors"
    loaded = load_net(weights)
    f1 = curve(run, "val/f1")
    line: Line = {
        "row": run.parent.name,
        "task": task,
        "cell": cell,
        "method": rest[0],
        "variant": "_".join(rest[1:]),
        "kernel": net.get("kernel_size") or net["cell"]["init_args"]["kernel_size"],
        "steps": net.get("evolve", {}).get("steps", ""),
        "parameters": sum(parameter.numel() for parameter in loaded.parameters()),
        "batch": batch,
        "images": data["train_size"] // batch * batch * config["trainer"]["max_epochs"],
        "images_to_f1_0.9": next(((step + 1) * batch for step, value in f1 if value >= 0.9), ""),
        **{key: made[key] for key in ("seconds", "seed", "commit", "processor")},
    }
    others = json.loads((run / "others.json").read_text())
    line |= {f"best_on_{other}": max(on_other) for other, on_other in others.items()}
    if isinstance(loaded, FeedForwardNet):
        return line | {"f1_at_n": f1[-1][1], f"best_on_{task}": f1[-1][1]}
    assert isinstance(loaded, PathfinderNet)
    found = analysis(run)
    line |= {
        **_saved_mib(weights, task),
        "f1_at_n": found["f1_at_n"],
        "f1_at_4n": found["f1_at_end"],
        "f1_best": found["f1_best"],
        "f1_best_at": found["f1_best_at"],
        "residual_at_4n": found["residual_at_end"],
        "stable_share": found["stable_share"],
        "ks_statistic": max(found["ks_statistic"]) if found["ks_statistic"] else "",
        "moved": statistics.median(found["moved"]) if found["moved"] else "",
    }
    return line | ({f"best_on_{task}": found["f1_best"]} if task in TASKS else {})


def analysis(run: Path) -> dict[str, Any]:
    """What `crbp analyze` found of a run on its own task."""
    found: dict[str, Any] = json.loads((run / "analysis" / "analysis.json").read_text())
    return found


def saved(weights: Path, task: str) -> tuple[int, int]:
    """Bytes that autograd saves for each training image of N steps, and those that all images of a batch share.

    All penalties of the row are counted, unfused. What is shared are spectra of the kernels.
    """
    net, origin = load(weights, trust=("crbp",))
    net, penalty = unfused(net), penalty_of(weights, origin, trust=("crbp",))
    size = PathfinderConfig.preset(task).image_size
    every_step = origin.run["model"]["init_args"].get("supervision") == "all"

    def of(images: int) -> int:
        image = torch.zeros(images, 1, size, size)
        with warnings.catch_warnings(), activation_memory(exclude=[*net.parameters(), image]) as memory:
            warnings.simplefilter("ignore", DivergenceWarning)
            prediction = net(image, every_step=every_step)
            if penalty is not None:
                penalty(prediction.run)
        return memory.bytes

    # Of two, four and not one: the transform of an odd number of images is of one more.
    two, four = of(2), of(4)
    if (shared := 2 * two - four) < 0:
        raise ValueError(f"two and four images of {weights.stem} are convolved otherwise: count with one thread")
    return (four - two) // 2, shared


def _saved_mib(weights: Path, task: str) -> Line:
    each, shared = saved(weights, task)
    return {"saved_mib": each / 2**20, "shared_mib": shared / 2**20}


def curve(run: Path, tag: str) -> Curve:
    """Optimiser step and value of what a run logged."""
    logged = events(run)
    return [(each.step, each.value) for each in logged.Scalars(tag)] if tag in logged.Tags()["scalars"] else []


@cache
def events(run: Path) -> EventAccumulator:
    """All that a run logged."""
    found = EventAccumulator(str(run), size_guidance={"scalars": 0})
    found.Reload()
    return found


def keep(runs: Iterable[Path], out: Path) -> None:
    """Keep what is known of the runs that are finished, and their weights."""
    for folder in (out / "rows", out / "weights"):
        folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        if not (run / "made.json").exists():
            continue
        name, row = run.parent.name, collect(run)
        kept = out / "rows" / f"{name}.json"
        if kept.exists() and (before := json.loads(kept.read_text())["line"]["commit"]) != row.line["commit"]:
            print(f"{name} of {row.line['commit']} takes the place of that of {before}")
        _write_row(kept, asdict(row))
        shutil.copyfile(run / "weights" / "last.safetensors", out / "weights" / f"{name}.safetensors")
        if of_middle_task(row) and row.line["method"] in ("crbp", "bptt"):
            shutil.copyfile(run / "analysis" / "state_space.png", out / f"states_{row.line['method']}.png")


def recount(out: Path) -> None:
    """Count the memory of every row that is kept anew; of a feed-forward net none is counted."""
    for file in sorted((out / "rows").glob("*.json")):
        row = json.loads(file.read_text())
        if (line := row["line"])["cell"]:
            line |= _saved_mib(out / "weights" / f"{file.stem}.safetensors", line["task"])
            _write_row(file, row)


def _write_row(file: Path, row: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(rounded(row), separators=(",", ":")) + "\n")


def write(out: Path) -> None:
    """The table and the curves as CSV files, and the figures, of the rows that are kept."""
    rows = [Row(**json.loads(file.read_text())) for file in sorted((out / "rows").glob("*.json"))]
    if not rows:
        raise SystemExit("no finished run was found; pathfinder.py trains them, --runs says where they are")
    with (out / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(
            file, [*COLUMNS, *(f"best_on_{task}" for task in TASKS)], restval="", extrasaction="ignore"
        )
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.line.items()})
    with (out / "curves.csv").open("w", newline="") as file:
        curves = csv.writer(file)
        curves.writerow(("row", "tag", "optimiser_step", "value"))
        for row in rows:
            for tag, found in row.curves.items():
                curves.writerows((row.line["row"], tag, step, f"{value:.5g}") for step, value in found)
    for name, figure in figures(rows).items():
        figure.savefig(out / f"{name}.png", dpi=140)
    if (page := out / "README.md").exists():
        page.write_text(with_tables(page.read_text(), tables(out)))
    print(f"{len(rows)} rows in {out}")


def csv_lines(file: Path) -> list[dict[str, str]]:
    """The lines of a file of `pathfinder_cost.py` or `tuning.py`; none where it was not run."""
    return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []


def tables(out: Path) -> dict[str, str]:
    """The tables of the page by name."""
    rows = [json.loads(file.read_text())["line"] for file in sorted((out / "rows").glob("*.json"))]
    late = [line for line in rows if line["variant"] in LATE]
    lines = [line for line in rows if line["variant"] not in LATE]
    many = out / "settled.json"
    return {
        "rows": measures_of(lines),
        "late": measures_of(late, digits=4),
        "settled": settled(rows, json.loads(many.read_text()) if many.exists() else []),
        "elsewhere": generalisation(lines),
        "tuning": tuning(rows, csv_lines(out / "tuning.csv")),
        "time": step_times(csv_lines(out / "small_cost.csv")),
        "paper": paper(csv_lines(out / "paper_cost.csv")),
    }


def measures_of(lines: Iterable[Line], *, digits: int = 3) -> str:
    """A table of what was measured, a line for each row, the values of its seeds side by side."""
    head = (
        "row",
        "N",
        "images to F1 .9",
        "F1 at N",
        "best F1",
        "at step",
        "F1 at 4N",
        "residual at 4N",
        "radius below 1",
    )
    body = []
    for title, seeds in _by_title(lines).items():
        cells = [
            [f"{line['steps']}" for line in seeds[:1]],
            [f"{line['images_to_f1_0.9'] or 'never'}" for line in seeds],
            [_share(line["f1_at_n"], digits) for line in seeds],
            [_share(line.get("f1_best", ""), digits) for line in seeds],
            [f"{line.get('f1_best_at', '')}" for line in seeds],
            [_share(line.get("f1_at_4n", ""), digits) for line in seeds],
            [f"{line['residual_at_4n']:.1e}" if "residual_at_4n" in line else "" for line in seeds],
            [f"{line['stable_share']:.0%}" if "stable_share" in line else "" for line in seeds],
        ]
        body.append([title, *(", ".join(cell) for cell in cells)])
    return markdown(head, body)


def generalisation(lines: Iterable[Line]) -> str:
    """A table of the best F1 on each task, a line for each row."""
    body = []
    for title, seeds in _by_title(lines).items():
        best = [", ".join(_share(line.get(f"best_on_{task}", "")) for line in seeds) for task in TASKS]
        body.append([title, f"{seeds[0]['parameters']:,}", _memory(seeds[0]), *best])
    shown = [f"best F1 on {task.removeprefix('small')} dashes" for task in TASKS]
    return markdown(("trained on", "parameters", "MiB an image", *shown), body)


def settled(lines: Iterable[Line], found: Iterable[Mapping[str, Any]]) -> str:
    """A table of what `settled.py` measured at 4N, a line for each row, the values of its seeds side by side."""
    of = {each["row"]: each for each in found}
    head = ("row", "seeds", "images", "F1 at N", "F1 at 4N", "residual at 4N", "radius below 1", "largest radius")
    body = []
    for title, seeds in _by_title(line for line in lines if line["row"] in of).items():
        every = [of[line["row"]] for line in seeds]
        cells = [
            [f"{line['seed']}" for line in seeds],
            [f"{each['images']}" for each in every],
            [_share(each["f1_at_n"], 4) for each in every],
            [_share(each["f1_at_4n"], 4) for each in every],
            [f"{each['residual_at_4n']:.1e}" for each in every],
            [f"{each['radius_below_1'] / each['images']:.1%}" for each in every],
            [f"{each['radius_largest']:.2f}" for each in every],
        ]
        body.append([title, *(", ".join(cell) for cell in cells)])
    return markdown(head, body)


def tuning(lines: Iterable[Line], tried: Sequence[Mapping[str, str]]) -> str:
    """F1 at N and at 4N with each set of settings, the one of the row's configuration first; the best at N in bold."""
    of = {line["row"]: line for line in lines}
    body = []
    for row in dict.fromkeys(each["row"] for each in tried):
        own = {"set": "as configured", **{key: f"{of[row].get(key, '')}" for key in ("f1_at_n", "f1_at_4n")}}
        sets = [own, *(each for each in tried if each["row"] == row)]
        best = max(float(each["f1_at_n"]) for each in sets)
        cells = []
        for each in sets:
            at = [_share(float(each[key])) for key in ("f1_at_n", "f1_at_4n") if each[key]]
            first = f"**{at[0]}**" if float(each["f1_at_n"]) == best else at[0]
            cells.append(f"{each['set']}: {' / '.join([first, *at[1:]])}")
        body.append((f"`{row}`", *cells))
    most = max((len(cells) for cells in body), default=1)
    head = ("row", *(f"set {number}" for number in range(1, most)))
    return markdown(head, [(*cells, *[""] * (most - len(cells))) for cells in body])


def paper(cost: Iterable[Mapping[str, str]]) -> str:
    """What a training step of the paper's size costs, and the whole run on a GPU as projected."""
    head = ("row", "N", "s an image", "MiB an image", f"GiB at {BATCH} images", "GFLOP an image", "projected hours")
    body = []
    for line in sorted(cost, key=lambda line: (len(line["row"].split("_")[0]), line["row"])):  # pf9 before pf14
        saved = float(line["direct_mib_per_image"])
        memory = f"{saved:.0f}", f"{saved * BATCH / 1024:.1f}"
        arithmetic = f"{float(line['gflop_per_image']):.0f}", line["gpu_hours"]
        body.append((f"`{line['row']}`", line["steps"], line["seconds_per_image"], *memory, *arithmetic))
    return markdown(head, body)


def step_times(cost: Sequence[Mapping[str, str]]) -> str:
    """What a training step takes beside that of the hGRU by BPTT, the quickest first."""
    seconds = {line["row"]: float(line["seconds_per_image"]) for line in cost}
    steps = {line["row"]: line["steps"] for line in cost}
    bptt = next((value for row, value in seconds.items() if row.endswith("_hgru_bptt")), math.nan)
    head = ("row", "N", "ms an image", "beside BPTT")
    body = [
        (f"`{row}`", steps[row], f"{1000 * seconds[row]:.1f}", f"{seconds[row] / bptt:.2f}×")
        for row in sorted(seconds, key=lambda row: seconds[row])
    ]
    return markdown(head, body)


def _by_title(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """The seeds of each row, contours of fewer dashes first."""
    found: dict[str, list[Line]] = {}
    for line in sorted(lines, key=_place):
        cell = "ConvLSTM, " if line["cell"] == "convlstm" else ""
        variant = {**VARIANTS, **LATE}.get(line["variant"], line["variant"])
        title = f"{line['task'].removeprefix('small')} dashes, {cell}{METHODS[line['method']]}"
        found.setdefault(title + (f", {variant}" if variant else ""), []).append(line)
    return found


def _place(line: Line) -> tuple[Any, ...]:
    place = TASKS.index(line["task"]) if line["task"] in TASKS else len(TASKS)
    return place, line["task"], line["cell"] != "hgru", line["row"].removesuffix(f"_seed{line['seed']}"), line["seed"]


def _share(value: float | str, digits: int = 3) -> str:
    return value if isinstance(value, str) else f"{value:.{digits}f}".removeprefix("0")


def _memory(line: Line) -> str:
    return f"{line['saved_mib']:.1f}" if line.get("saved_mib") else ""


def main() -> None:
    """Set the table of the rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_rows(parser)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "pathfinder")
    options = parser.parse_args()
    runs = (options.runs.resolve() / label(*row) / "version_0" for row in wanted(CONFIGS, options))
    torch.set_num_threads(1)  # the plane of a convolution by FFT, and with it the memory, goes by the threads
    keep(runs, options.out)
    recount(options.out)
    write(options.out)


if __name__ == "__main__":
    main()
