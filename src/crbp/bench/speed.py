"""Seconds of a training step beside the textbook's, how they grow, and the least that this machine allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from tempfile import TemporaryDirectory
from typing import Any

import torch

from crbp.bench.measure import (
    Numbers,
    Pair,
    Size,
    flat,
    in_process,
    in_turns,
    make_cell,
    relative,
    spread,
    timed,
)
from crbp.data.pathfinder import Pathfinder
from crbp.ops import repeated_products, shared_spectra
from crbp.ops.spectral import frame_for

PAPER = Size()
TINY = Size(channels=4, kernel_size=5, image=20, steps=4, terms=3, fused=False)
BYTES = 4  # of a float32


def step(*, quick: bool, device: str) -> Numbers:
    """A training step at the paper's size, penalty on, batch 2, float32; fused, as cells are by default, and eager."""
    size, repeats = replace(TINY if quick else PAPER, device=device), 3 if quick else 5
    plain, eager = (replace(size, fused=fused) for fused in (False, "eager"))
    return {
        "size": asdict(size),
        **Pair.of(size).compare(repeats),
        "not_fused": Pair.of(plain).compare(repeats),
        "eager": Pair.of(eager).compare(repeats),
        "float64": exactness(size),
    }


def compiling(*, quick: bool) -> Numbers:
    """Seconds of the first fused training step beyond those of the next, with an empty and a filled cache on disk.

    Each in a process of its own; the step's size hardly matters.
    """
    size = asdict(replace(TINY, fused=True))
    seconds: dict[str, list[float]] = {"empty": [], "filled": []}
    with TemporaryDirectory() as folder:
        cache = {"TORCHINDUCTOR_CACHE_DIR": folder}
        for name in ("empty", "filled") if quick else ("empty", "filled", "filled", "filled"):
            seconds[name].append(in_process("crbp.bench.probe", {"size": size}, what="compiling", variables=cache))
    return {name: spread(values) for name, values in seconds.items()}


def images(*, quick: bool) -> Numbers:
    """Milliseconds to make an image of each task, one thread, the generator compiled."""
    threads, rows = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    try:
        for preset in ("mini",) if quick else ("mini", "small14", "pf14"):
            data = Pathfinder(preset=preset, split="train", seed=0)
            data[0]
            seconds = [timed(partial(data.__getitem__, index))[1] for index in range(1, 17 if quick else 201)]
            rows[preset] = spread([1e3 * each for each in seconds])
    finally:
        torch.set_num_threads(threads)
    return rows


def exactness(size: Size) -> Numbers:
    """Of either code, the largest ``‖a − b‖ / ‖b‖`` of a parameter's gradient, with ``b`` the textbook's in float64."""
    pair = Pair.of(size)
    exact = pair.in_float64()[1]
    errors = {}
    for name, job in (("crbp", pair.ours), ("textbook", pair.theirs)):
        found = {at: relative(gradient, exact[at]) for at, gradient in job()[1].items()}
        worst = max(found, key=lambda at: found[at])
        errors[name] = {"gradient_error": found[worst], "at": worst}
    return errors


def kernels(*, quick: bool, device: str) -> Numbers:
    """The same as `step` for the paper's smaller kernels, whose runs are longer: 300, 100 and 30 steps of 150×150."""
    base, repeats = replace(replace(TINY, image=16) if quick else PAPER, device=device), 2 if quick else 3
    rows = []
    for side, steps in ((3, 300), (5, 100), (9, 30)):
        size = replace(base, kernel_size=side, steps=TINY.steps if quick else steps)
        row = {"kernel_size": side, "steps": size.steps, **Pair.of(size).compare(repeats)}
        if size.fused:
            row["not_fused"] = Pair.of(replace(size, fused=False)).compare(repeats)
        rows.append(row)
    return {"size": asdict(base), "rows": rows}


def precision(*, quick: bool, device: str) -> Numbers:
    """What bfloat16 costs and gives: gradients under autocast beside those in float32, for each kernel.

    Parameters and state stay float32; convolutions, direct ones then, and matrix products are in bfloat16.
    """
    base = replace(TINY if quick else replace(PAPER, steps=6, terms=4, fused=False), device=device)
    rows = []
    for side in (5,) if quick else (3, 9, 15):
        size = replace(base, kernel_size=side)
        pair = Pair.of(size)

        def low(pair: Pair = pair) -> Any:
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
                return pair.ours()

        exact = {at: gradient.clone() for at, gradient in pair.ours()[1].items()}
        found = low()[1]
        errors = {at: relative(found[at], wanted) for at, wanted in exact.items()}
        worst = max(errors, key=lambda at: errors[at])
        seconds = in_turns({"float32": pair.ours, "bfloat16": low}, 2 if quick else 3)
        rows.append(
            {
                "kernel_size": side,
                **{name: spread(values) for name, values in seconds.items()},
                "speedup": spread([a / b for a, b in zip(seconds["float32"], seconds["bfloat16"], strict=True)]),
                "gradient_error_overall": relative(flat(found, exact), flat(exact, exact)),
                "gradient_error": errors[worst],
                "gradient_error_at": worst,
            }
        )
    return {"size": asdict(base), "rows": rows}


def scaling(*, quick: bool, device: str) -> Numbers:
    """Seconds against batch, image side and channels, and the exponent of each, ``seconds ∝ value^exponent``.

    The cell is not fused: every size would compile anew.
    """
    base = replace(TINY, batch=1, steps=3, terms=2) if quick else Size(batch=1, image=75, steps=6, terms=4, fused=False)
    base = replace(base, device=device)
    grids: dict[str, Sequence[int]] = {
        "batch": (1, 2) if quick else (1, 2, 4, 8),
        "image": (16, 24) if quick else (48, 75, 100, 150, 200),
        "channels": (4, 6) if quick else (8, 16, 25, 32, 64),
    }
    numbers: Numbers = {"size": asdict(base)}
    measured = cache(lambda size: Pair.of(size).compare(repeats=2 if quick else 5))
    for axis, values in grids.items():
        rows = []
        for value in values:
            found = measured(_with(base, axis, value))
            rows.append({"value": value, **{name: found[name] for name in ("crbp", "textbook", "speedup")}})
        exponents = {name: exponent(values, [row[name]["median"] for row in rows]) for name in ("crbp", "textbook")}
        numbers[axis] = {"rows": rows, "exponents": exponents}
    return numbers


def _with(size: Size, axis: str, value: int) -> Size:
    change: dict[str, Any] = {axis: value}
    return replace(size, **change)


def exponent(values: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of the least-squares line through ``(log value, log seconds)``."""
    x = torch.tensor(values, dtype=torch.float64).log()
    y = torch.tensor(seconds, dtype=torch.float64).log()
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def roofline(*, quick: bool) -> Numbers:
    """Peak arithmetic and bandwidth as measured, and what they allow the `step` part at best.

    A direct convolution takes ``2 B C² k² H W`` operations. By FFT, in tiles of the size that `crbp.ops` takes, it is
    a transform of every plane there and back, and for every frequency a product ``(B, C) · (C, C)``, whose kernel
    spectrum has to be read; the two spectra are computed once and their gradients transformed back once. Where
    everything else is fused, a step moves ``TRANSFERS["step"]`` tensors ``(B, C, H, W)``, a vector-Jacobian product
    ``TRANSFERS["product"]``.
    """
    size = TINY if quick else PAPER
    peak = _peak_flops(256 if quick else 3072, repeats=3 if quick else 7)
    bandwidth = _bandwidth(2**20 if quick else 2**26, repeats=3 if quick else 7)
    direct = convolution_count(size) * 2.0 * size.batch * (size.channels * size.kernel_size * size.image) ** 2
    fourier, spectra = _fourier(size)
    elementwise = _elementwise_bytes(size)
    return {
        "size": asdict(size),
        "gflops": {name: value / 1e9 for name, value in peak.items()},
        "gbytes_per_second": {name: value / 1e9 for name, value in bandwidth.items()},
        "direct_gflop": direct / 1e9,
        "fft_gflop": fourier / 1e9,
        "fft_gbyte": spectra / 1e9,
        "elementwise_gbyte": elementwise / 1e9,
        "transfers": TRANSFERS,
        "least_seconds": {
            "direct": direct / peak["best"],
            "fft": max(fourier / peak["best"], spectra / bandwidth["triad"]),
            "elementwise": elementwise / bandwidth["triad"],
        },
        "measured_seconds": measured(size),
        "note": "no cache is counted on: a tensor that stays in one moves faster than the bandwidth of memory",
    }


# Reads and writes of whole tensors with perfect fusion. A step: h → gated (2); c1 twice, for its statistics too, h
# and x → z (5); c2 twice, z and h → h' (5). Its product reads what these read and the cotangent and writes one a stage.
TRANSFERS = {"step": 12, "product": 20}


def _peak_flops(side: int, *, repeats: int) -> Numbers:
    a, b = torch.rand(side, side), torch.rand(side, side)
    out = torch.empty(side, side)
    torch.mm(a, b, out=out)
    seconds = in_turns({"mm": lambda: torch.mm(a, b, out=out)}, repeats)["mm"]
    return {"best": 2 * side**3 / min(seconds), "median": 2 * side**3 / spread(seconds)["median"]}


def _bandwidth(items: int, *, repeats: int) -> Numbers:
    a, b, c = torch.rand(items), torch.rand(items), torch.empty(items)
    jobs: dict[str, Any] = {"copy": lambda: c.copy_(a), "triad": lambda: torch.add(a, b, alpha=3.0, out=c)}
    in_turns(jobs, 1)
    seconds = in_turns(jobs, repeats)
    return {name: moved * BYTES * items / min(seconds[name]) for name, moved in (("copy", 2), ("triad", 3))}


def convolution_count(size: Size) -> int:
    """The fewest convolutions of C to C channels that a training step can do with.

    Two for each of the ``N`` steps, the ``K`` products, the penalty's product and the last backward pass, which has two
    gradients of kernels beside, and two of either kind for the second derivative.
    """
    return 2 * (size.steps + size.terms + 5)


def _fourier(size: Size) -> tuple[float, float]:
    """Operations and bytes of the convolutions of one training step by FFT."""
    image, kernel = (size.image, size.image), (size.kernel_size, size.kernel_size)
    frame = frame_for(
        size.batch, image, kernel, size.channels, size.channels, native=True, threads=torch.get_num_threads()
    )
    points, planes, pairs = math.prod(frame.size), frame.planes(size.batch, image), size.channels**2
    transform = 5 * points * math.log2(points)  # of a complex plane
    each = planes * (2 * size.channels * transform + 8 * pairs * points)
    flops = convolution_count(size) * each + 2 * pairs * transform  # two spectra and their gradients, of half planes
    moved = BYTES * (2 * size.batch * size.channels * size.image**2 + pairs * points)
    return flops, float(convolution_count(size) * moved)


def measured(size: Size) -> Numbers:
    """Of one convolution, one step of the cell without a graph and one vector-Jacobian product of it, the least."""
    torch.manual_seed(0)
    cell = make_cell(size.channels, size.kernel_size, fused=size.fused)
    drive = torch.rand(size.batch, size.channels, size.image, size.image)
    with shared_spectra():
        with torch.no_grad():
            state = cell(cell.initial_state(drive), drive)
            jobs: dict[str, Any] = {
                "convolution": lambda: cell.inhibition(state),
                "step": lambda: cell(state, drive),
            }
            in_turns(jobs, 2)
            found = in_turns(jobs, 10)
        state.requires_grad_()
        last, vector = cell(state, drive), torch.rand_like(state)
        with repeated_products():
            product = {
                "product": lambda: torch.autograd.grad(last, state, vector, retain_graph=True),
            }
            in_turns(product, 2)
            found |= in_turns(product, 10)
    return {name: min(values) for name, values in found.items()}


def _elementwise_bytes(size: Size) -> float:
    tensor = BYTES * size.batch * size.channels * size.image**2
    products = size.terms + 3  # the series, the penalty's, the last backward pass and the second derivative
    return float(tensor * (size.steps * TRANSFERS["step"] + products * TRANSFERS["product"]))
