"""What to choose on a device, above all on a GPU: how to convolve, in which layout and precision, how to run a cell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from crbp.bench.measure import Numbers, in_turns, make_cell, relative, spread, timed
from crbp.bench.speed import PAPER, TINY
from crbp.ops import conv2d, shared_spectra


@dataclass(frozen=True, kw_only=True)
class Case:
    """A convolution of C to C channels that keeps the size."""

    channels: int
    kernel_size: int
    image: int
    batch: int


# The cell of contour tracing, its smaller kernels, and that of masks, of ten and of a hundred instances.
CASES = (
    *(Case(channels=25, kernel_size=side, image=150, batch=8) for side in (3, 5, 9, 15)),
    *(Case(channels=256, kernel_size=3, image=14, batch=instances) for instances in (10, 100)),
)
QUICK = (Case(channels=4, kernel_size=5, image=12, batch=2),)


def convolutions(*, quick: bool, device: str) -> Numbers:
    """A convolution and its gradient in the image, directly and by FFT, by layout and precision.

    The spectrum of the kernel is there already, as in a run of many steps. ``error`` is that of the result, relative to
    float64.
    """
    return {"rows": [_convolution(case, device, repeats=2 if quick else 10) for case in (QUICK if quick else CASES)]}


def _convolution(case: Case, device: str, *, repeats: int) -> Numbers:
    generator = torch.Generator().manual_seed(0)
    side, kernel = case.image, case.kernel_size
    image = torch.randn(case.batch, case.channels, side, side, generator=generator).to(device)
    weight = torch.randn(case.channels, case.channels, kernel, kernel, generator=generator).to(device) / kernel**2
    exact = conv2d(image.double(), weight.double(), method="direct")
    ways: dict[str, tuple[Any, torch.dtype, torch.memory_format]] = {
        "direct": ("direct", torch.float32, torch.contiguous_format),
        "direct, channels last": ("direct", torch.float32, torch.channels_last),
        "direct, bfloat16": ("direct", torch.bfloat16, torch.contiguous_format),
        "direct, bfloat16, channels last": ("direct", torch.bfloat16, torch.channels_last),
        "FFT": ("fft", torch.float32, torch.contiguous_format),
    }
    jobs: dict[str, Callable[[], Tensor]] = {}
    for name, (method, dtype, layout) in ways.items():
        given = (each.to(dtype=dtype, memory_format=layout) for each in (image, weight))
        jobs[name] = _forward_and_back(next(given).requires_grad_(), next(given), method)
    with shared_spectra():
        errors = {name: relative(job().double(), exact) for name, job in jobs.items()}
        in_turns(jobs, 1)
        seconds = in_turns(jobs, repeats)
    found = {name: {**spread(values), "error": errors[name]} for name, values in seconds.items()}
    return {"size": asdict(case), "seconds": found}


def _forward_and_back(image: Tensor, weight: Tensor, method: Any) -> Callable[[], Tensor]:
    def job() -> Tensor:
        result = conv2d(image, weight, method=method)
        torch.autograd.grad(result, image, result.detach())
        return result.detach()

    return job


def rollout(*, quick: bool, device: str) -> Numbers:
    """N steps of a cell without a graph: eager, fused, and compiled whole, on a GPU into CUDA graphs.

    ``first_seconds`` are those of the first run, which compiles. Where the whole is compiled, convolutions are direct.
    """
    size = replace(TINY if quick else PAPER, device=device)
    torch.manual_seed(0)
    plain = make_cell(size.channels, size.kernel_size, fused=False).to(device)
    fused = make_cell(size.channels, size.kernel_size, fused=True).to(device)
    fused.load_state_dict(plain.state_dict())
    drive = torch.rand(size.batch, size.channels, size.image, size.image).to(device)
    cells: dict[str, Any] = {
        "eager": plain,
        "fused": fused,
        "compiled": torch.compile(plain, mode="reduce-overhead", dynamic=False),
    }
    jobs = {name: _steps(cell, drive, size.steps) for name, cell in cells.items()}
    first, ends = {}, {}
    for name, job in jobs.items():
        ends[name], first[name] = timed(job)
    seconds = in_turns(jobs, 2 if quick else 10)
    found = {
        name: {**spread(values), "first_seconds": first[name], "difference": relative(ends[name], ends["eager"])}
        for name, values in seconds.items()
    }
    return {"size": asdict(size), "seconds": found}


def _steps(cell: Any, drive: Tensor, steps: int) -> Callable[[], Tensor]:
    @torch.no_grad()
    def job() -> Tensor:
        state = torch.zeros_like(drive)
        with shared_spectra():
            for _ in range(steps):
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                state = cell(state, drive).clone()  # the next replay of a CUDA graph writes over what it returned
        return state

    return job
