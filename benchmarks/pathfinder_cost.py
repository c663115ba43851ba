"""What a training step of each row costs on this machine: time, memory and arithmetic, from a few real steps.

    python benchmarks/pathfinder_cost.py 'pf*' --batch 1 --out results/pathfinder/paper_cost.csv

Every step is that of the row's own configuration and images at their full size; only the number of images in a batch
is another, and in what is timed numbers of steps are not drawn: all are of N. `saved_mib_per_image` is counted in these
steps; it contains the spectra of kernels, which all images of a batch share, and which there are not where convolutions
are done directly, as on a GPU: `direct_mib_per_image` is counted so, on an image of 16×16, and grows with the pixels.
So does the arithmetic, which is counted, not timed: that of the convolutions, done directly; where a row draws its
numbers of steps it is the mean over its training. `gpu_hours` is no measurement: it is the arithmetic of the whole run
at the rate of ``--gpu-tflops``.
"""

from __future__ import annotations

import argparse
import csv
import logging
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from _runs import rows
from pathfinder import CONFIGS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import crbp
from crbp.bench.measure import environment
from crbp.losses import focal_loss
from crbp.tasks import ContourData, ContourTask
from crbp.tasks.weights import build

COUNTED = 16  # side of the image on which the arithmetic is counted
COLUMNS = (
    "row", "steps", "images", "batch", "seconds_per_image", "saved_mib_per_image", "direct_mib_per_image",
    "gflop_per_image", "gpu_hours", "threads", "torch", "processor", "commit",
)  # fmt: skip


class Cost(pl.Callback):
    """Seconds of every training step but the last, and the bytes that autograd saves in the last."""

    def __init__(self, steps: int) -> None:
        self.steps, self.seconds, self.bytes = steps, [0.0] * steps, 0
        self._hooks = ExitStack()
        self._start = 0.0
        self._memory: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        """Start the clock, and in the last step the count of bytes."""
        self._start = time.perf_counter()
        if trainer.global_step == self.steps - 1:
            known = [*pl_module.parameters(), *batch.values()]
            self._memory = self._hooks.enter_context(crbp.activation_memory(exclude=known))

    def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        """End the count of bytes."""
        self._hooks.close()
        if self._memory is not None:
            self.bytes = self._memory.bytes

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop the clock."""
        self.seconds[trainer.global_step - 1] = time.perf_counter() - self._start


class Arithmetic(TorchDispatchMode):
    """Counts the floating-point operations of convolutions and matrix products, in backward passes too.

    PyTorch's own mode counts by module as well, which a gradient within the forward pass does not bear.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count it."""
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flop += count(*args, **(kwargs or {}), out_val=out)
        return out


def measure(name: str, *, batch: int, steps: int, gpu_tflops: float) -> dict[str, Any]:
    """One line of the table."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    settings = config["data"]["init_args"]
    images = settings["train_size"] * config["trainer"]["max_epochs"]
    few = {"batch_size": batch, "train_size": max(batch * steps, settings.get("lead_in_size", 0)), "val_size": batch}
    data = build(ContourData, {**config["data"], "init_args": {**settings, **few}}, f"the data of {name}")
    torch.manual_seed(config["seed_everything"])
    task = build(ContourTask, config["model"], f"the model of {name}")
    task.step_jitter = 0
    cost = Cost(steps)
    trainer = pl.Trainer(
        **{**config["trainer"], "max_steps": steps, "val_check_interval": None},
        limit_val_batches=0, accelerator="cpu", callbacks=[cost], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, data)
    size = next(iter(data.train_dataloader()))["image"].shape[-1]
    plain = direct(build(ContourTask, config["model"], f"the model of {name}"))
    larger = (size / COUNTED) ** 2
    flop = arithmetic(plain) * larger
    evolve = getattr(task.net, "evolve", None)
    return {
        "row": name,
        "steps": evolve.steps if evolve is not None else "",
        "images": images,
        "batch": batch,
        "seconds_per_image": f"{min(cost.seconds[1:-1]) / batch:.3g}",  # the first one compiles and fills the caches
        "saved_mib_per_image": f"{cost.bytes / batch / 2**20:.4g}",
        "direct_mib_per_image": f"{kept(plain) * larger / 2**20:.4g}",
        "gflop_per_image": f"{flop / 1e9:.4g}",
        "gpu_hours": f"{flop * images / (gpu_tflops * 1e12) / 3600:.3g}",
    }


def direct(task: ContourTask) -> ContourTask:
    """The task, changed in place to plain PyTorch inside: convolutions by the direct method, nothing fused."""
    for module in task.net.modules():
        if hasattr(module, "method"):
            module.method = "direct"
        if hasattr(module, "fused"):
            module.fused = False
    return task


def kept(task: ContourTask) -> int:
    """Bytes that autograd saves for an image of 16×16 in a training step of N steps; of a task made `direct`."""
    image, mask = _counted_on()
    known = [*task.net.parameters(), image, mask]
    with crbp.activation_memory(exclude=known) as memory:
        _loss(task, image, mask)
    return memory.bytes


def arithmetic(task: ContourTask) -> float:
    """Floating-point operations of the convolutions in a training step on one image of 16×16, the mean of a training.

    Of a task made `direct`. All its penalties are counted. Every step of recurrence costs the same, so that of the
    steps that are drawn only their mean matters.
    """
    at_n = _counted(task)
    if not task.step_jitter:
        return at_n
    evolve = task.net.evolve
    assert isinstance(evolve, crbp.Evolve)  # the task has seen that
    return at_n + drawn(task.step_jitter) * (_counted(task, steps=evolve.steps + 1) - at_n)


def drawn(step_jitter: int) -> float:
    """Steps beyond N of a training step, the mean over a training of many steps.

    Where the task draws ``max(0, U{-r … r})`` they are ``r (r + 1) / (2 (2 r + 1))`` on average, and the r of all
    optimiser steps are 0 to ``step_jitter``, the two at the ends half as often as the others.
    """
    means = [reach * (reach + 1) / (2 * (2 * reach + 1)) for reach in range(step_jitter + 1)]
    return (sum(means) - means[-1] / 2) / step_jitter


def _counted_on() -> tuple[Tensor, Tensor]:
    return torch.rand(1, 1, COUNTED, COUNTED), torch.zeros(1, COUNTED, COUNTED, dtype=torch.bool)


def _counted(task: ContourTask, **asked: Any) -> float:
    with Arithmetic() as counted:
        _loss(task, *_counted_on(), **asked).backward()
    return counted.flop


def _loss(task: ContourTask, image: Tensor, mask: Tensor, **asked: Any) -> Tensor:
    if task.supervision == "all":
        asked["every_step"] = True
    prediction = task.net(image, **asked)
    loss = focal_loss(prediction.logits, mask)
    if task.penalty is not None:
        loss = loss + task.penalty(prediction.run)
    if task.residual_weight:
        loss = loss + crbp.residual_penalty(prediction.run)
    if task.spectral_weight:
        loss = loss + crbp.spectral_penalty(prediction.run)
    return loss


def main() -> None:
    """Measure the rows asked for; a row that is in the file already is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="+", help="of the rows, such as 'pf14_*'")
    parser.add_argument("--batch", type=int, default=1, help="images of a step")
    parser.add_argument(
        "--steps", type=int, default=4, help="training steps, of which those between the ends are timed"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--gpu-tflops", type=float, default=100.0, help="rate at which the projection reckons")
    parser.add_argument("--out", type=Path, default=Path("cost.csv"))
    options = parser.parse_args()
    if options.steps < 3:
        raise SystemExit(f"--steps must be at least 3, not {options.steps}")
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    made = {key: value for key, value in environment().items() if key in COLUMNS}
    known = set()
    if options.out.exists():
        known = {line["row"] for line in csv.DictReader(options.out.read_text().splitlines())}
    else:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(",".join(COLUMNS) + "\n")
    for name in dict.fromkeys(name for pattern in options.patterns for name in rows(CONFIGS, pattern)):
        if name in known:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of untrained dynamics, and of Lightning about a run of a few steps
            line = measure(name, batch=options.batch, steps=options.steps, gpu_tflops=options.gpu_tflops)
        with options.out.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(line | made)
        print(line, flush=True)


if __name__ == "__main__":
    main()
