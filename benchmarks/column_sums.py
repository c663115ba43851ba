"""What the column sums of the Jacobian, which the Lipschitz penalty bounds, say of its spectral radius.

    python benchmarks/column_sums.py 'small5_hgru_crbp_*'      # half a minute of one core for each network

Of each network, at the state after N steps on validation images: the least and the largest column sum, on how many
images the radius is above 1, and on how many of these every column sum lies between -1 and 1, so that no bound on them,
from one side or from both, would tell. Each is written when it is measured, in the place of what the file has of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from _kept import FOLDER, kept, put

import crbp
from crbp.analysis.inputs import images_of, load, trained_on
from crbp.bench.measure import environment


def measured(file: Path, images: int) -> dict[str, Any]:
    """The numbers of one network."""
    net, origin = load(file, trust=("crbp",))
    source, seed = trained_on(file, origin, trust=("crbp",))
    least, largest, radius, converged = [], [], [], []
    for image in torch.split(images_of(source, images, seed=seed).image, 16):
        run = net(image).run
        state, vjp = run.linearized(at_end=True)
        columns = torch.cat([each.flatten(1) for each in vjp(tuple(torch.ones_like(leaf) for leaf in state))], dim=1)
        found = crbp.spectral_radius(run, per_sample=True, generator=torch.Generator().manual_seed(0))
        least.append(columns.amin(dim=1).detach())
        largest.append(columns.amax(dim=1).detach())
        radius.append(found.radius)
        converged.append(found.converged)
    low, high, rho = torch.cat(least), torch.cat(largest), torch.cat(radius)
    unstable = rho > 1
    return {
        "row": file.stem,
        "images": images,
        "column_least": float(low.min()),
        "column_largest": float(high.max()),
        "radius_largest": float(rho.max()),
        "radius_above_1": int(unstable.sum()),
        "of_these_no_column_beyond_1": int((unstable & (low > -1) & (high < 1)).sum()),
        "radius_not_converged": int((~torch.cat(converged)).sum()),
        **environment(),
    }


def main() -> None:
    """Measure networks and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="names of kept rows, or patterns such as 'small5_hgru_crbp_*'")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--out", type=Path, default=FOLDER / "column_sums.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for file in kept(options.rows):
        if "feedforward" not in file.stem:
            put(measured(file, options.images), options.out)


if __name__ == "__main__":
    main()
