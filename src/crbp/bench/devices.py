"""What to choose on a device, above all on a GPU: how to convolve, in which layout and precision, how to run a cell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from crbp.bench.measure import Numbers, forget_compiled, in_turns, make_cell, relative, spread, timed
from crbp.bench.speed import PAPER, TINY
from crbp.errors import CrbpError
from crbp.ops import conv2d, shared_spectra
from crbp.ops.convolution import Method

Step = Callable[[Tensor, Tensor], Tensor]


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

    The kernel's spectrum is computed once, as in a run of many steps. ``error`` is that of the result, relative to
    float64. Which algorithm cuDNN takes for the direct method on a GPU is its own choice.
    """
    return {"rows": [_convolution(case, device, repeats=2 if quick else 10) for case in (QUICK if quick else CASES)]}


def _convolution(case: Case, device: str, *, repeats: int) -> Numbers:
    generator = torch.Generator().manual_seed(0)
    side, kernel = case.image, case.kernel_size
    image = torch.randn(case.batch, case.channels, side, side, generator=generator).to(device)
    weight = torch.randn(case.channels, case.channels, kernel, kernel, generator=generator).to(device) / kernel**2
    exact = conv2d(image.double(), weight.double(), method="direct")
    last, low = torch.channels_last, torch.bfloat16
    jobs = {
        "direct": _forward_and_back(image, weight, "direct"),
        "direct, channels last": _forward_and_back(image, weight, "direct", layout=last),
        "direct, bfloat16": _forward_and_back(image, weight, "direct", dtype=low),
        "direct, bfloat16, channels last": _forward_and_back(image, weight, "direct", dtype=low, layout=last),
        "FFT": _forward_and_back(image, weight, "fft"),
    }
    if image.is_cuda:
        jobs["direct, TF32"] = _in_tf32(_forward_and_back(image, weight, "direct"))
        jobs["direct, TF32, channels last"] = _in_tf32(_forward_and_back(image, weight, "direct", layout=last))
    with shared_spectra():
        errors = {name: relative(job().double(), exact) for name, job in jobs.items()}
        seconds = in_turns(jobs, repeats)
    found = {name: {**spread(values), "error": errors[name]} for name, values in seconds.items()}
    return {"size": asdict(case), "seconds": found}


def _forward_and_back(
    image: Tensor,
    weight: Tensor,
    method: Method,
    *,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
) -> Callable[[], Tensor]:
    given = image.detach().to(dtype=dtype, memory_format=layout).requires_grad_()
    kernel = nn.Parameter(weight.to(dtype=dtype, memory_format=layout))  # of others no spectrum is shared

    def job() -> Tensor:
        result = conv2d(given, kernel, method=method)
        torch.autograd.grad(result, given, result.detach())
        return result.detach()

    return job


def _in_tf32(job: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def lower() -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            return job()

    return lower


def rollout(*, quick: bool, device: str) -> Numbers:
    """N steps of a cell without a graph: not fused, fused, and compiled whole, on a GPU into CUDA graphs.

    ``first_seconds`` are those of the first run, which compiles; the compiler's cache on disk shortens it. Where the
    whole is compiled, convolutions are direct. ``cuda_graphs_skipped`` counts what PyTorch would not make a CUDA graph
    of on a GPU.

    Raises:
        CrbpError: where the cell cannot be compiled.
    """
    size = replace(TINY if quick else PAPER, device=device)
    batches = (size.batch,) if torch.device(device).type == "cpu" else (size.batch, 32)
    forget_compiled()
    torch.manual_seed(0)
    plain = make_cell(size.channels, size.kernel_size, fused=False).to(device)
    fused = make_cell(size.channels, size.kernel_size, fused=True).to(device)
    fused.load_state_dict(plain.state_dict())
    compiled = torch.compile(plain, mode="reduce-overhead", dynamic=False, fullgraph=True)
    counters["inductor"].pop("cudagraph_skips", None)
    rows = []
    for batch in batches:
        drive = torch.rand(batch, size.channels, size.image, size.image).to(device)
        jobs = {
            "not fused": _steps(plain, drive, size.steps),
            "fused": _steps(fused, drive, size.steps),
            # The next replay of a CUDA graph writes over what the last one returned.
            "compiled": _steps(lambda state, drive: compiled(state, drive).clone(), drive, size.steps),
        }
        try:
            first = {name: timed(job) for name, job in jobs.items()}
        except (torch._dynamo.exc.BackendCompilerFailed, torch._inductor.exc.TritonMissing) as error:
            raise CrbpError(
                f"the roll-out cannot be compiled here ({str(error).strip()}): a C++ compiler is needed, on a GPU "
                "Triton; choose other parts with --only"
            ) from error
        seconds = in_turns(jobs, 2 if quick else 10)
        found = {
            name: {
                **spread(values),
                "first_seconds": first[name][1],
                "difference": relative(first[name][0], first["not fused"][0]),
            }
            for name, values in seconds.items()
        }
        rows.append({"batch": batch, "seconds": found})
    skipped = counters["inductor"]["cudagraph_skips"] if torch.device(device).type == "cuda" else 0
    return {"size": asdict(size), "rows": rows, "cuda_graphs_skipped": skipped}


def _steps(cell: Step, drive: Tensor, steps: int) -> Callable[[], Tensor]:
    @torch.no_grad()
    def job() -> Tensor:
        state = torch.zeros_like(drive)
        with shared_spectra():
            for _ in range(steps):
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                state = cell(state, drive)
        return state

    return job
