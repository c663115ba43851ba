"""Train rows of contour tracing one after the other, and analyse what comes out.

    python benchmarks/pathfinder.py 'small*_hgru_*' --jobs 2      # resumes what was cut off
    python benchmarks/pathfinder_results.py 'small*'              # sets the table and draws the figures

A row is a file in `configs/pathfinder`; its run lies in ``runs/NAME/version_0``, whose last weights are what is
analysed: nothing is picked by its score.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from _runs import ROOT, crbp, train_all
from torch import Tensor

from crbp.analysis.trajectory import BATCH, follow
from crbp.models import PathfinderNet
from crbp.tasks import Generated, load_net
from crbp.tasks.sampling import stacked

CONFIGS = ROOT / "configs" / "pathfinder"
IMAGES = 256  # of every analysis
TASKS = ("small5", "small9", "small14")


def analyse(name: str, run: Path) -> bool:
    """Analyse one run, and trace the contours of the other tasks of its family with it; whether that succeeded."""
    weights, task = run / "weights" / "last.safetensors", name.split("_")[0]
    if "feedforward" not in name:
        settings = ["--out", run / "analysis", "--images", str(IMAGES)]
        if not crbp("analyze", weights, *settings, log=run / "log.txt"):
            return False
    found = {other: accuracy(weights, other) for other in TASKS if task in TASKS and other != task}
    (run / "others.json").write_text(json.dumps(found, indent=2))
    return True


def accuracy(weights: Path, preset: str, split: str = "val") -> list[float]:
    """F1 on the images of a task after every step up to 4N; of a feed-forward net, its one."""
    net, (image, mask) = load_net(weights), images(preset, split)
    if isinstance(net, PathfinderNet):
        return [float(f1) for f1 in follow(net, image, mask, steps=4 * net.evolve.steps).f1]
    with torch.no_grad():
        traced = torch.cat([net(some).logits.argmax(dim=1).bool() for some in torch.split(image, BATCH)])
    return [float(2 * (traced & mask).sum() / (traced.sum() + mask.sum()))]


@cache
def images(preset: str, split: str) -> tuple[Tensor, Tensor]:
    """Images and masks of a task; of the validation split the ones that `crbp analyze` takes."""
    return stacked(Generated(preset=preset).items(split, IMAGES, 0), IMAGES)


if __name__ == "__main__":
    train_all(__doc__, CONFIGS, analyse)
