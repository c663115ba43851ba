"""Learn two images by heart: if targets, losses, merge and metric agree, panoptic quality on them comes near 1.

    python benchmarks/panoptic_overfit.py IMAGES PANOPTIC.json CATEGORIES.json --model rfpn

Small versions of the models (`crbp.models.panoptic.mini_settings`), trained from scratch on one CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import crbp
from crbp.bench.measure import environment
from crbp.models import RFPN, PanopticFPN
from crbp.models.panoptic import mini_settings
from crbp.tasks import CocoFiles, CocoSource, LipschitzPenalty, PanopticData, PanopticTask

STEPS, TERMS = 10, 10  # of the recurrent mask head


class Progress(pl.Callback):
    """Says how far training has come."""

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Print the loss and panoptic quality."""
        shown = {name: round(float(trainer.callback_metrics[name]), 4) for name in ("train/loss", "val/pq")}
        print(trainer.global_step, shown, flush=True)


def network(model: str, things: int, stuff: int, size: int) -> PanopticFPN:
    """A small model from scratch."""
    torch.manual_seed(0)
    settings: dict[str, Any] = mini_settings(size)
    settings["merge"] = replace(settings["merge"], stuff_area=200)
    if model == "fpn":
        return PanopticFPN(things=things, stuff=stuff, **settings)
    rbp = crbp.RBP(crbp.Neumann(terms=TERMS), on_divergence="fallback")
    penalty = LipschitzPenalty(weight=1e-3, bound=0.95, reduction="sum_square")
    evolve = crbp.Evolve(steps=STEPS, gradient=rbp)
    return RFPN(things=things, stuff=stuff, evolve=evolve, penalty=penalty, **settings)


def add(line: dict[str, Any], file: Path) -> None:
    """Put a line into a list of them, in place of that of the same model."""
    lines = json.loads(file.read_text()) if file.exists() else []
    kept = [each for each in lines if each["model"] != line["model"]]
    file.write_text(json.dumps([*kept, line], indent=2) + "\n")


def main() -> None:
    """Train and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("images", "panoptic", "categories"):
        parser.add_argument(name)
    parser.add_argument("--model", choices=("fpn", "rfpn"), default="rfpn")
    parser.add_argument("--size", type=int, default=256, help="shorter side of the images")
    parser.add_argument("--steps", type=int, default=500, help="optimiser steps")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--out", type=Path, default=None, help="JSON to add the result to, in place of the model's last"
    )
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    files = CocoFiles(images=options.images, panoptic=options.panoptic, categories=options.categories)
    data = PanopticData(
        CocoSource(train=files, val=files),
        batch_size=2,
        shortest=(options.size,),
        shortest_test=options.size,
        flips=False,
    )
    things, stuff = len(data.categories.things), len(data.categories.stuff)
    net = network(options.model, things, stuff, options.size)
    task = PanopticTask(
        net,
        optimizer="adamw",
        learning_rate=options.learning_rate,
        reference_batch=2,
        warmup_steps=20,
        milestones=(0.8,),
    )
    trainer = pl.Trainer(
        max_steps=options.steps, accelerator="cpu", callbacks=[Progress()], check_val_every_n_epoch=100,
        gradient_clip_val=1.0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(task, data)
    seconds = time.perf_counter() - start
    (found,) = trainer.test(task, data, verbose=False)
    line = {
        "model": options.model,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "optimiser_steps": options.steps,
        "side": options.size,
        "seconds": round(seconds, 1),
        **{name.removeprefix("test/"): round(value, 4) for name, value in found.items()},
        **environment(),
    }
    print(json.dumps(line, indent=2))
    if options.out is not None:
        add(line, options.out)


if __name__ == "__main__":
    main()
