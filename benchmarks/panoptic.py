"""Train rows of panoptic segmentation one after the other, and measure them at several numbers of steps.

    python benchmarks/panoptic.py 'shapes_*' --seeds 0 1 --jobs 2     # resumes what was cut off
    python benchmarks/panoptic_results.py 'shapes_*' --seeds 0 1      # sets the table and draws the figure

A row is a file in `configs/panoptic`; its run lies in ``runs/NAME/version_0``, whose last weights are what is
measured, on the whole validation split: nothing is picked by its score.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from _runs import ROOT, train_all

from crbp.models import RFPN
from crbp.tasks import PanopticData, PanopticTask, load_net
from crbp.tasks.weights import build

CONFIGS = ROOT / "configs" / "panoptic"
STEPS = (1, 2, 3, 5, 7, 10, 15, 20, 25, 30)  # of the mask head, at which a recurrent network is measured


def analyse(name: str, run: Path) -> bool:
    """Measure one run and write ``analysis.json`` beside it; an error ends the script."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    net = load_net(run / "weights" / "last.safetensors")
    data = build(PanopticData, config["data"], f"the data of {name}")
    counts = sorted({*STEPS, net.steps}) if isinstance(net, RFPN) else [None]
    found = {
        "parameters": sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad),
        "steps": net.steps if isinstance(net, RFPN) else None,
        "quality": [{"steps": steps, **quality(net, data, steps)} for steps in counts],
    }
    (run / "analysis.json").write_text(json.dumps(found, indent=2) + "\n")
    return True


def quality(net: Any, data: PanopticData, steps: int | None) -> dict[str, float]:
    """Panoptic quality and average precision on the validation split."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, inference_mode=True
    )
    (found,) = trainer.validate(PanopticTask(net, steps=steps), data, verbose=False)
    return {name.removeprefix("val/"): round(value, 5) for name, value in found.items()}


if __name__ == "__main__":
    train_all(__doc__, CONFIGS, analyse)
