"""Further settings for each method, so that all have several tries: others than those of the configurations.

    python benchmarks/tuning.py small14_hgru_bptt small9_hgru_rbp      # a training for each; resumes what was cut off

C-RBP had seven sets on 14 dashes; with the one of the configuration all other methods of the hGRU and the
feed-forward net have as many there, BPTT with 3×3 kernels five. Writes `results/pathfinder/tuning.csv`, a
line for each set; one that the file has is left out.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from _kept import FOLDER
from _runs import ROOT, train
from pathfinder import CONFIGS, accuracy

from crbp.models import PathfinderNet
from crbp.tasks import load_net

COLUMNS = ("row", "set", "f1_at_n", "f1_at_4n", "f1_best", "f1_best_at", "seed", "seconds", "commit", "processor")
MODEL = "--model.init_args"
RATE, HORIZON = f"{MODEL}.learning_rate", f"{MODEL}.net.init_args.cell.init_args.horizon"


def rates(*values: float) -> dict[str, list[str]]:
    """Sets with another learning rate, of which the configurations have .01, or .005 with the ConvLSTM."""
    return {f"rate {value:g}": [RATE, str(value)] for value in values}


def gates(*horizons: int) -> dict[str, list[str]]:
    """Sets whose gates start with time constants up to another number of steps."""
    return {f"gates of {steps}": [HORIZON, str(steps)] for steps in horizons}


def settling(growth: float, beyond: float) -> list[str]:
    """Another weight of the penalty on growth, and steps drawn up to so many times N = 6 beyond that."""
    return [f"{MODEL}.spectral_weight", str(growth), f"{MODEL}.step_jitter", str(round(6 * beyond))]


def drawn(beyond: int) -> dict[str, list[str]]:
    """A set whose steps are drawn up to so many beyond N, as with the penalties."""
    return {f"up to {beyond} steps more": [f"{MODEL}.step_jitter", str(beyond)]}


def both(rate: float, horizon: int) -> dict[str, list[str]]:
    """A set with another rate and other gates."""
    return {f"rate {rate:g}, gates of {horizon}": [RATE, str(rate), HORIZON, str(horizon)]}


SIX_STEPS = rates(0.005, 0.02) | gates(3, 12)  # for rows whose gates have 6
FEEDFORWARD = rates(0.0025, 0.005, 0.02, 0.04)
LOWER = rates(0.000625, 0.00125)  # as its best is at the end of those
SETS: dict[str, dict[str, list[str]]] = {
    "small14_hgru_bptt_k3": SIX_STEPS,
    "small14_hgru_truncated": SIX_STEPS | gates(24) | both(0.02, 3),
    "small14_hgru_allsteps": SIX_STEPS | gates(24) | both(0.02, 3),
    "small14_hgru_cbptt": rates(0.005)
    | gates(12)
    # The settings of its configuration until a97a331, and with them the rate.
    | {"growth 1, up to 3N": settling(1, 2)}
    | {"growth 1, up to 3N, rate 0.005": [*settling(1, 2), RATE, "0.005"]}
    | {"growth 0.05": settling(0.05, 0.5)[:2]}  # as C-RBP's row has
    | {"growth 0.05, gates of 12": [*settling(0.05, 0.5)[:2], HORIZON, "12"]},
    "small14_hgru_rbp": rates(0.00125, 0.0025, 0.005, 0.02) | gates(24) | both(0.0025, 24),
    "small14_feedforward": FEEDFORWARD | LOWER,
    # With drawn steps, which C-BPTT and C-RBP have beside the penalties.
    "small9_hgru_bptt": rates(0.005, 0.02) | drawn(12),
    "small14_hgru_bptt": SIX_STEPS | gates(24) | both(0.02, 12) | drawn(3),
    "small9_hgru_cbptt": rates(0.005)
    | gates(12)
    | {"up to 1.5N": settling(0.2, 0.5)[2:]}
    | {"growth 1": settling(1, 2)[:2]},
    "small9_hgru_rbp": rates(0.0025, 0.005, 0.02) | gates(24),
    "small9_feedforward": FEEDFORWARD,
    # The ConvLSTM, whose configurations were found by these: at first rate and gates were the hGRU's, .01 and N or N/2.
    "small5_convlstm_bptt": rates(0.01),
    "small9_convlstm_bptt": rates(0.01, 0.02) | both(0.01, 3),
    "small14_convlstm_bptt": rates(0.01),
    "small5_convlstm_crbp": rates(0.01) | both(0.01, 8),
    "small9_convlstm_crbp": both(0.01, 12),
    "small14_convlstm_crbp": both(0.01, 12),
}


def analyse(name: str, run: Path) -> bool:
    """Measure F1 on the validation split after every step up to 4N."""
    f1 = accuracy(run / "weights" / "last.safetensors", name.split("_")[0])
    (run / "f1.json").write_text(json.dumps(f1))
    return True


def check(made: dict[str, Any], config: Path, settings: list[str]) -> None:
    """Raise SystemExit unless a run has these settings and otherwise those of the configuration, the data's apart."""
    wanted = yaml.safe_load(config.read_text())
    for option, value in zip(settings[::2], settings[1::2], strict=True):
        *path, last = option.removeprefix("--").split(".")
        place = wanted
        for key in path:
            place = place[key]
        place[last] = type(place[last])(value) if last in place else yaml.safe_load(value)
    if found := next(differing(wanted["model"], made["model"], "model"), None):
        raise SystemExit(
            f"a run of {config.stem} has another {found[0]} than is asked for; give another folder of runs"
        )


def differing(wanted: Any, made: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Where a run has another value than a configuration, and which: None for what the run does not name."""
    if isinstance(wanted, dict) and isinstance(made, dict):
        for key, value in wanted.items():
            yield from differing(value, made.get(key), f"{where}.{key}")
    elif isinstance(wanted, list) and isinstance(made, list) and len(wanted) == len(made):
        for place, value in enumerate(wanted):
            yield from differing(value, made[place], f"{where}.{place}")
    elif wanted != made:
        yield where, made


def line_of(row: str, tried: str, run: Path) -> dict[str, str]:
    """The line of one set."""
    f1, made = (json.loads((run / name).read_text()) for name in ("f1.json", "made.json"))
    net = load_net(run / "weights" / "last.safetensors")
    n = net.evolve.steps if isinstance(net, PathfinderNet) else 1
    best = max(range(len(f1)), key=f1.__getitem__)
    beyond = {"f1_at_4n": f"{f1[-1]:.4g}", "f1_best": f"{f1[best]:.4g}", "f1_best_at": best + 1} if len(f1) > 1 else {}
    kept = {key: made[key] for key in ("seed", "seconds", "commit", "processor")}
    line = {"row": row, "set": tried, "f1_at_n": f"{f1[n - 1]:.4g}", **beyond, **kept}
    return {key: str(line.get(key, "")) for key in COLUMNS}


def main() -> None:
    """Train the sets that are missing, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", choices=SETS, metavar="ROW", help=f"of {', '.join(SETS)}")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=FOLDER / "tuning.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = {}
    if options.out.exists():
        lines = {(each["row"], each["set"]): each for each in csv.DictReader(options.out.read_text().splitlines())}
    for row in options.rows:
        for tried, settings in SETS[row].items():
            if (row, tried) in lines:
                continue
            name = f"{row}_{tried.replace(', ', '_').replace(' ', '_')}"
            train(CONFIGS / f"{row}.yaml", 0, options.runs.resolve(), analyse, name=name, settings=settings)
            run = options.runs / name / "version_0"
            if not (run / "made.json").exists():
                continue
            check(yaml.safe_load((run / "config.yaml").read_text()), CONFIGS / f"{row}.yaml", settings)
            line = line_of(row, tried, run)
            lines[line["row"], tried] = line
            with options.out.open("w", newline="") as out:
                writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(lines[key] for key in sorted(lines))
            print(line, flush=True)


if __name__ == "__main__":
    main()
