"""What the uncertainty of a network trained with the evidential loss says, beside one trained without.

python benchmarks/evidence.py --out results/pathfinder/evidence.json     # a minute of one core
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from _runs import ROOT, rounded
from torch import Tensor

from crbp.analysis import evidential_uncertainty, reaction_time
from crbp.analysis.inputs import unfused
from crbp.analysis.trajectory import arrival_steps, states_of
from crbp.bench.measure import environment
from crbp.hub import shipped
from crbp.models import PathfinderNet
from crbp.tasks import Generated, load_net
from crbp.tasks.sampling import stacked

NETS = ("small9_hgru_crbp_evidential", "small9_hgru_crbp")
STEPS = 48


@torch.no_grad()
def measure(net: PathfinderNet, image: Tensor, mask: Tensor) -> dict[str, float]:
    """Mean uncertainty of right and of wrong pixels at the end, and how ξ goes with when a pixel is traced."""
    logits = torch.stack([net.read(state) for _, state in states_of(unfused(net), image, steps=STEPS)])
    uncertainty, arrived = evidential_uncertainty(logits, dim=2), arrival_steps(logits.softmax(dim=2)[:, :, 1])
    wrong, reached = (arrived > 0) != mask, mask & (arrived > 0)
    together = torch.corrcoef(torch.stack([arrived[reached].float(), reaction_time(uncertainty)[reached]]))
    return {
        "uncertainty_where_right": float(uncertainty[-1][~wrong].mean()),
        "uncertainty_where_wrong": float(uncertainty[-1][wrong].mean()),
        "wrong_pixels": int(wrong.sum()),
        "correlation_of_reaction_time_with_arrival": float(together[0, 1]),
    }


def main() -> None:
    """Measure both and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "pathfinder" / "evidence.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    image, mask = stacked(Generated(preset="small9").items("val", options.images, 0), options.images)
    found = {}
    for name in NETS:
        net = load_net(shipped()[name])
        assert isinstance(net, PathfinderNet)
        found[name] = rounded(measure(net, image, mask))
    made = {**environment(), "images": options.images, "seed": 0, "steps": STEPS}
    options.out.write_text(json.dumps({**made, "networks": found}, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
