"""Whether kept networks are settled at 4N, on more images than the 64 that the radius of each row was measured on.

    python benchmarks/settled.py 'small5_hgru_crbp_long*' --images 500

Of each network: F1 at N and 4N, the mean relative residual at 4N, and on how many images the spectral radius there is
below 1. Each is written when it is measured, in the place of what the file has of it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from _kept import FOLDER, kept, put
from _tables import with_tables
from pathfinder_results import tables

from crbp.analysis import follow, late_radius
from crbp.analysis.inputs import images_of, load, trained_on
from crbp.bench.measure import environment


def measured(file: Path, images: int) -> dict[str, Any]:
    """The numbers of one network."""
    start = time.process_time()
    net, origin = load(file, trust=("crbp",))
    source, seed = trained_on(file, origin, trust=("crbp",))
    seen = images_of(source, images, seed=seed)
    steps = 4 * net.evolve.steps
    found = follow(net, seen.image, seen.mask, steps=steps)
    radius, converged = late_radius(net, seen.image, steps=steps)
    return {
        "row": file.stem,
        "images": images,
        "f1_at_n": float(found.f1[net.evolve.steps - 1]),
        "f1_at_4n": float(found.f1[-1]),
        "residual_at_4n": float(found.residual[-1]),
        "radius_below_1": int((radius < 1).sum()),
        "radius_largest": float(radius.max()),
        "radius_not_converged": int((~converged).sum()),
        "seconds": round(time.process_time() - start),
        **environment(),
    }


def main() -> None:
    """Measure networks, write the file and the table of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="names of kept rows, or patterns such as 'small*_crbp*'")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--out", type=Path, default=FOLDER / "settled.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for file in kept(options.rows):
        if "feedforward" not in file.stem:
            put(measured(file, options.images), options.out)
    if options.out == FOLDER / "settled.json":
        page = FOLDER / "README.md"
        page.write_text(with_tables(page.read_text(), tables(FOLDER)))


if __name__ == "__main__":
    main()
