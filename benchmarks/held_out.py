"""F1 of the kept networks on images of the test split, by which no setting was ever chosen.

    python benchmarks/held_out.py 'small*'      # a quarter of an hour of one core

Those of the validation split, of which all other measures are, were looked at while settings were chosen. Writes
`results/pathfinder/held_out.csv`; a row that it has already is measured anew.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from _kept import FOLDER, kept
from pathfinder import IMAGES, accuracy

from crbp.bench.measure import environment
from crbp.models import PathfinderNet
from crbp.tasks import load_net

COLUMNS = ("row", "images", "test_f1_at_n", "test_f1_at_4n", "commit", "processor")


def measured(file: Path) -> dict[str, object]:
    """The line of one network; a feed-forward net has no 4N."""
    net, preset = load_net(file), file.stem.split("_")[0]
    n = net.evolve.steps if isinstance(net, PathfinderNet) else 1
    f1 = accuracy(file, preset, "test")
    line = {"test_f1_at_n": f"{f1[n - 1]:.5f}", "test_f1_at_4n": f"{f1[-1]:.5f}" if len(f1) > 1 else ""}
    made = environment()
    return {"row": file.stem, "images": IMAGES, **line, "commit": made["commit"], "processor": made["processor"]}


def apart(measured: Path) -> dict[str, float]:
    """F1 on the test split minus that of the table of rows, at N and at 4N: mean, least and largest."""
    test, val = (
        {line["row"]: line for line in csv.DictReader(file.read_text().splitlines())}
        for file in (measured, FOLDER / "table.csv")
    )
    found = {}
    for at in ("n", "4n"):
        differences = [
            float(line[f"test_f1_at_{at}"]) - float(val[row][f"f1_at_{at}"])
            for row, line in test.items()
            if line[f"test_f1_at_{at}"]
        ]
        if not differences:
            continue
        found |= {
            f"mean_at_{at}": sum(differences) / len(differences),
            f"least_at_{at}": min(differences),
            f"largest_at_{at}": max(differences),
        }
    return found


def main() -> None:
    """Measure networks and say how far the two splits are apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="names of kept rows, or patterns such as 'small*_crbp*'")
    parser.add_argument("--out", type=Path, default=FOLDER / "held_out.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = {}
    if options.out.exists():
        lines = {line["row"]: line for line in csv.DictReader(options.out.read_text().splitlines())}
    for file in kept(options.rows):
        lines[file.stem] = {key: str(value) for key, value in measured(file).items()}
        with options.out.open("w", newline="") as out:
            writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines[name] for name in sorted(lines))
        print(lines[file.stem], flush=True)
    print(apart(options.out))


if __name__ == "__main__":
    main()
