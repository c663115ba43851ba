"""What the parts of the benchmark share: the two codes side by side, timing in turns, and the machine they ran on."""

from __future__ import annotations

import copy
import datetime
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import crbp
from crbp.cells import hgru
from crbp.errors import CrbpError
from crbp.gradients import GradientMethod
from crbp.losses import focal_loss
from crbp.models import PathfinderNet

Numbers = dict[str, Any]
Gradients = dict[str, Tensor]

CHECKOUT = Path(crbp.__file__).resolve().parents[2]
WEIGHT = 10.0  # of the penalty, as the paper's code has it


@cache
def textbook() -> Any:
    """The module `benchmarks/textbook.py`.

    Raises:
        CrbpError: where crbp is installed without its checkout.
    """
    path = CHECKOUT / "benchmarks" / "textbook.py"
    if not path.is_file():
        raise CrbpError("crbp bench needs benchmarks/textbook.py, which only a checkout of crbp has; run it in one")
    spec = importlib.util.spec_from_file_location("crbp_textbook", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model, a batch and how it is trained; the paper's contour tracing but for the batch.

    Attributes:
        channels: C.
        kernel_size: side of the cell's kernels.
        image: height and width in pixels.
        batch: images.
        steps: N.
        terms: K of the Neumann series.
        fused: how the cell's element-wise stages run, as `crbp.cells.HGRU` takes it.
        device: where all of it is.
    """

    channels: int = 25
    kernel_size: int = 15
    image: int = 150
    batch: int = 2
    steps: int = 20
    terms: int = 15
    fused: hgru.Fusion = True
    device: str = "cpu"

    def net(self, gradient: GradientMethod | None = None) -> PathfinderNet:
        """The model of crbp, with RBP unless another gradient is given."""
        if gradient is None:
            gradient = rbp(self.terms)
        cell = make_cell(self.channels, self.kernel_size, fused=self.fused)
        return PathfinderNet(cell, crbp.Evolve(steps=self.steps, gradient=gradient)).to(self.device)

    def data(self) -> tuple[Tensor, Tensor]:
        """Random images ``(B, 1, H, W)``, a tenth of whose pixels are set, and masks ``(B, H, W)`` of half of those."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(self.batch, 1, self.image, self.image, generator=generator).to(self.device)
        return (noise > 0.9).float(), (noise > 0.95)[:, 0]


def make_cell(channels: int, kernel_size: int, *, fused: hgru.Fusion, horizon: int = 20) -> crbp.cells.HGRU:
    """An hGRU, its element-wise stages fused as asked for."""
    return crbp.cells.HGRU(channels, kernel_size, horizon=horizon, fused=fused)


def forget_compiled() -> None:
    """Let the stages of cells compile anew: Inductor's cache on disk remains."""
    hgru.compiled_stages.cache_clear()


def rbp(terms: int) -> crbp.RBP:
    """RBP that takes every term whatever becomes of the series, as the textbook does."""
    return crbp.RBP(crbp.Neumann(terms=terms), max_residual=float("inf"))


def training_step(
    net: PathfinderNet, image: Tensor, mask: Tensor, *, weight: float, steps: int | None = None, gamma: float = 2.0
) -> tuple[Tensor, Gradients]:
    """Loss and gradients with crbp: what the textbook's function of this name computes."""
    net.zero_grad()
    prediction = net(image, steps=steps)
    assert prediction.run is not None
    loss = focal_loss(prediction.logits, mask, gamma)
    if weight:
        loss = loss + weight * crbp.lipschitz_penalty(prediction.run, reduction="mean_square")
    torch.autograd.backward(loss)
    return loss.detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@dataclass(frozen=True)
class Pair:
    """The training step of both codes on equal weights and data."""

    ours: Callable[[], tuple[Tensor, Gradients]]
    theirs: Callable[[], tuple[Tensor, Gradients]]
    in_float64: Callable[[], tuple[Tensor, Gradients]]

    @classmethod
    def of(cls, size: Size) -> Pair:
        """Both codes at one size; what was compiled for another is forgotten, so that compiling counts in full."""
        if size.fused is True:
            forget_compiled()
        torch.manual_seed(0)
        net, other = size.net(), textbook().TextbookNet(size.channels, size.kernel_size).to(size.device)
        other.load_state_dict(net.state_dict())
        image, mask = size.data()

        def theirs(model: Any, images: Tensor) -> Any:
            return textbook().training_step(model, images, mask, steps=size.steps, terms=size.terms, weight=WEIGHT)

        return cls(
            ours=lambda: training_step(net, image, mask, weight=WEIGHT),
            theirs=lambda: theirs(other, image),
            in_float64=lambda: theirs(copy.deepcopy(other).double(), image.double()),
        )

    def compare(self, repeats: int) -> Numbers:
        """Seconds of both, ``speedup`` = textbook / crbp, and how far the gradients are apart.

        ``compile_seconds`` is what the first call took beyond a usual one; the compiler's cache on disk shortens it.
        """
        (ours, first), (theirs, other_first) = timed(self.ours), timed(self.theirs)
        differences = {name: relative(ours[1][name], wanted) for name, wanted in theirs[1].items()}
        seconds = in_turns({"crbp": self.ours, "textbook": self.theirs}, repeats)
        usual = statistics.median(seconds["crbp"])
        return {
            **{name: spread(found) for name, found in seconds.items()},
            "speedup": spread([b / a for a, b in zip(seconds["crbp"], seconds["textbook"], strict=True)]),
            "first_seconds": {"crbp": first, "textbook": other_first},
            "compile_seconds": max(first - usual, 0.0),
            "loss_difference": abs(float(ours[0] - theirs[0])) / abs(float(theirs[0])),
            "gradient_difference_overall": relative(flat(ours[1], theirs[1]), flat(theirs[1], theirs[1])),
            "gradient_difference": max(differences.values()),
            "gradient_difference_at": max(differences, key=lambda name: differences[name]),
        }


def flat(gradients: Gradients, order: Gradients) -> Tensor:
    """All gradients as one vector, in the order of the second."""
    return torch.cat([gradients[name].flatten() for name in order])


def relative(got: Tensor, wanted: Tensor) -> float:
    """``‖got − wanted‖ / ‖wanted‖``."""
    return float((got - wanted).double().norm() / wanted.double().norm())


def timed(job: Callable[[], Any]) -> tuple[Any, float]:
    """What a job returns and the seconds it takes, until all is done that it started on another device."""
    _wait()
    start = time.perf_counter()
    result = job()
    _wait()
    return result, time.perf_counter() - start


def _wait() -> None:
    # One that was not asked for anything yet would start, which takes time and memory.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def in_turns(jobs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each job in every round; the jobs take turns, so that a slow spell of the machine meets all."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            seconds[name].append(timed(job)[1])
    return seconds


def spread(values: list[float]) -> Numbers:
    """Median, least and largest of some repeats."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": len(values)}


def in_process(module: str, job: Numbers, *, what: str, variables: dict[str, str] | None = None) -> Any:
    """What a module, run by itself with as many threads, prints of a job.

    Raises:
        CrbpError: if it fails, with ``what`` it was to do.
    """
    command = [sys.executable, "-m", module, json.dumps({**job, "threads": torch.get_num_threads()})]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **(variables or {})})
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CrbpError(f"{what} ended with status {done.returncode}: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def environment() -> Numbers:
    """What the numbers of a run depend on beside the code's settings."""
    return {
        "crbp": crbp.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": (_git("status", "--porcelain", "--untracked-files=no") or "").count("\n"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": _instructions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str | None:
    """What git says of the checkout; None where there is no git, or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout if arguments[0] == "status" else done.stdout.strip()


def _instructions() -> str:
    """The widest vectors that PyTorch uses on this processor, and whether it has matrix units."""
    amx = Path("/proc/cpuinfo").exists() and " amx_tile" in Path("/proc/cpuinfo").read_text()
    return torch.backends.cpu.get_cpu_capability() + (", AMX" if amx else "")


def _processor() -> str:
    """The processor's name."""
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
