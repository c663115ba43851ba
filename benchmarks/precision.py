"""Train a row in 32 bits and in bf16 from the same seed, and compare F1; 1 where they differ by more than 0.02.

python benchmarks/precision.py --out precision.json                   # the mini row, as it is configured
python benchmarks/precision.py --images 800 --out precision.json      # sooner, and further apart
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pathfinder import CONFIGS

from crbp._files import write_whole
from crbp.bench.measure import environment

PRECISIONS = ("32-true", "bf16-mixed")
ACCEPTED = 0.02


def train(config: Path, precision: str, images: int | None, seed: int) -> dict[str, Any]:
    """The last F1 of a run on the validation images, and what the run took."""
    with tempfile.TemporaryDirectory() as folder:
        logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": folder}}
        command = [
            *(sys.executable, "-m", "crbp.cli", "fit", "--config", str(config), "--seed_everything", str(seed)),
            *("--trainer.precision", precision, "--trainer.logger", json.dumps(logger)),
            *("--trainer.enable_progress_bar", "false", "--trainer.enable_checkpointing", "false"),
            *(("--data.train_size", str(images)) if images else ()),
        ]
        began = time.perf_counter()
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        seconds = time.perf_counter() - began
        (table,) = Path(folder).rglob("metrics.csv")
        with table.open() as file:
            f1 = [float(row["val/f1"]) for row in csv.DictReader(file) if row["val/f1"]]
    return {"precision": precision, "f1": f1[-1], "seconds": round(seconds, 1)}


def main() -> int:
    """Train both and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", default="mini_hgru_crbp", help="a name in configs/pathfinder")
    parser.add_argument("--images", type=int, help="of an epoch (default: the row's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    options = parser.parse_args()
    found = [train(CONFIGS / f"{options.row}.yaml", each, options.images, options.seed) for each in PRECISIONS]
    apart = abs(found[0]["f1"] - found[1]["f1"])
    asked = {"row": options.row, "images": options.images, "seed": options.seed}
    result = {**asked, "environment": environment(), "runs": found, "apart": apart, "accepted": ACCEPTED}
    write_whole(options.out, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(found), f"apart by {apart:.4f}")
    return int(apart > ACCEPTED)


if __name__ == "__main__":
    sys.exit(main())
