"""Convolutions that keep the image size: direct, by FFT with the kernel's spectrum shared over a run, or Winograd's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crbp._checks import choice, count
from crbp.ops import winograd
from crbp.ops._engine import is_ordinary
from crbp.ops._kept import Kept
from crbp.ops._native import found
from crbp.ops.spectral import LANES, Frame, Sides, correlate, frame_for, native_suits, spectrum

Method = Literal["auto", "direct", "fft", "winograd"]
T = TypeVar("T")


def conv2d(image: Tensor, weight: Tensor, bias: Tensor | None = None, *, method: Method = "auto") -> Tensor:
    """Cross-correlate images with odd kernels, stride 1, zeros around: the size is kept.

    ``y[b, o, i, j] = Σ w[o, c, u, v] x[b, c, i + u − k/2, j + v − k/2]``, as `torch.nn.functional.conv2d` with
    ``padding="same"``. By FFT it is a Fourier transform, one matrix product for each frequency, and the transform
    back: the cost hardly depends on the kernel's size. Inside `shared_spectra`, which `crbp.Evolve` opens for each
    run, a kernel is transformed once. By native code two images, or two parts of one, are transformed together:
    rounding errors are relative to the larger values of the two, and what is not finite spreads over both. Winograd's
    method takes a quarter of the products of the direct sum with 3×3 kernels; its rounding errors are larger than
    those, in float32 1e-6 of the result's norm with 25 channels and 3e-6 with 256, and what is not finite spreads over
    the 4×4 tiles that see it. Both can be differentiated any number of times, but not batched by ``vmap``.

    Args:
        image: ``(B, C, H, W)``.
        weight: ``(O, C, k, k)``, odd sides.
        bias: ``(O,)``, added to each channel.
        method: ``"direct"``, ``"fft"`` (float32 or float64), ``"winograd"`` (the same, 3×3 kernels on a CPU with a C++
            compiler), or ``"auto"``: the one that `preferred_method` expects to be the fastest.

    Returns:
        ``(B, O, H, W)``.

    Raises:
        ValueError: for an even kernel, an unknown method, or images or kernels that the method is not for.
    """
    choice("method", method, get_args(Method))
    if weight.shape[-1] % 2 == 0 or weight.shape[-2] % 2 == 0:
        raise ValueError(f"a kernel must have odd sides to keep the image size, not {tuple(weight.shape[-2:])}")
    if method == "auto":
        method = preferred_method(image, weight)
    if method == "direct":
        return F.conv2d(image, weight, bias, padding="same")
    _check(image, weight, method)
    if method == "winograd":
        result = winograd.correlate(image, weight, _shared_of(weight, "winograd", Kept) if _is_shared(weight) else None)
    else:
        frame = next(frame for _, frame in _frames(image, weight) if not frame.native or found() is not None)
        graph = torch.is_grad_enabled() or (_thread.spectra is not None and _thread.spectra.graph)

        def transform() -> tuple[Tensor, Kept]:
            with torch.set_grad_enabled(graph):
                return spectrum(weight, frame), Kept()

        transformed, kept = _shared_of(weight, (frame.size, frame.native, graph), transform)
        result = correlate(image, transformed, frame, weight.shape[0], kept)
    return result if bias is None else result + bias[:, None, None]


def _check(image: Tensor, weight: Tensor, method: Method) -> None:
    """Raise ValueError for what a method other than the direct one is not for."""
    if image.ndim != 4:
        raise ValueError(f"images must have shape (B, C, H, W), not {tuple(image.shape)}")
    if (image.dtype, image.device) != (weight.dtype, weight.device):
        raise ValueError(
            f"image and kernel must have one dtype and device, not {image.dtype} on {image.device} and {weight.dtype} "
            f"on {weight.device}"
        )
    if image.shape[1] != weight.shape[1] or weight.numel() == 0:
        raise ValueError(
            f"a kernel of shape {tuple(weight.shape)} cannot take images of {image.shape[1]} channels to others"
        )
    if image.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"method={method!r} is not for images of {image.dtype}; choose method='direct' or float32")
    if image.numel() == 0 and image.shape[0] != 0:
        raise ValueError(f"images of shape {tuple(image.shape)} have no pixel")
    if method != "winograd":
        return
    if tuple(weight.shape[2:]) != winograd.KERNEL or image.device.type != "cpu":
        raise ValueError(
            f"method='winograd' is for 3×3 kernels on a CPU, not {tuple(weight.shape[2:])} on {image.device}; choose "
            "method='fft' or 'direct'"
        )
    if found() is None:
        raise ValueError("method='winograd' needs a C++ compiler; choose method='direct'")


def _frames(image: Tensor, weight: Tensor) -> tuple[tuple[float, Frame], ...]:
    """The planes that could be taken and what they cost, the cheapest first."""
    images, _, height, width = image.shape
    outputs, inputs, high, broad = weight.shape
    native = native_suits(image.device, inputs, outputs)
    return _ranked(images, (height, width), (high, broad), inputs, outputs, native, torch.get_num_threads())


@lru_cache(maxsize=1024)
def _ranked(
    images: int, image: Sides, kernel: Sides, inputs: int, outputs: int, native: bool, threads: int
) -> tuple[tuple[float, Frame], ...]:
    kinds = (True, False) if native else (False,)
    frames = [frame_for(images, image, kernel, inputs, outputs, native=kind, threads=threads) for kind in kinds]
    costs = ((frame.cost(images, image, inputs, outputs, threads), frame) for frame in frames)
    return tuple(sorted(costs, key=lambda pair: pair[0]))


def preferred_method(image: Tensor, weight: Tensor) -> Literal["direct", "fft", "winograd"]:
    """The method expected to be the fastest: a rule fitted to times on a CPU, which `benchmarks/convolution.py` judges.

    Elsewhere, in lower precision, under autocast, inside `torch.compile` and under the transforms of `torch.func` and
    forward differentiation it is the direct one.
    """
    if image.ndim != 4 or image.numel() == 0 or weight.numel() == 0:
        return "direct"
    if image.dtype not in (torch.float32, torch.float64) or not is_ordinary(image):
        return "direct"
    (images, _, height, width), (outputs, inputs, high, broad) = image.shape, weight.shape
    threads = torch.get_num_threads()
    # Outputs are computed by whole vectors; numbers of channels that fill none take longer, but for a single output.
    filled = inputs % LANES == 0 and (outputs % LANES == 0 or outputs == 1)
    direct = (
        images * height * width * (high * broad * inputs * (-(-outputs // LANES) * LANES) + COPY * (inputs + outputs))
    )
    direct *= (1.0 if filled else 1.4) / threads
    if winograd.suits(image.device, weight):  # and then the FFT is slower than it, or than the direct method
        faster = winograd.cost(images, height, width, inputs, outputs, threads) < direct
        return "winograd" if faster and found() is not None else "direct"  # it is compiled where it is worth it
    frames = _frames(image, weight)
    return "fft" if any(cost < direct and (not frame.native or found()) for cost, frame in frames) else "direct"


# What reading or writing a pixel takes, in multiply-adds of the direct method; fitted as `Frame.cost` is.
COPY = 70.0


class Conv2d(nn.Conv2d):
    """A layer of `conv2d`; its parameters are those of `torch.nn.Conv2d`.

    Args:
        inputs: channels C of the image.
        outputs: channels O of the result.
        kernel_size: side of the kernel, odd.
        bias: add one number to each channel.
        method: see `conv2d`.

    Raises:
        ValueError: for an even kernel or an unknown method.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel_size: int, *, bias: bool = False, method: Method = "auto"
    ) -> None:
        choice("method", method, get_args(Method))
        count("kernel_size", kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that the image size is kept, not {kernel_size}")
        super().__init__(inputs, outputs, kernel_size, padding="same", bias=bias)
        self.method: Method = method

    def forward(self, image: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, O, H, W)``."""
        return conv2d(image, self.weight, self.bias, method=self.method)


@dataclass(kw_only=True)
class Spectra:
    """What has become of the kernels in one run.

    Attributes:
        graph: whether spectra carry gradients.
        found: by kernel and what is wanted of it: the kernel, so that its id stays its own, its version, and what was
            found for that.
    """

    graph: bool
    found: dict[Hashable, tuple[Tensor, int, Any]] = field(default_factory=dict)


@dataclass
class _Thread(threading.local):
    spectra: Spectra | None = None


_thread = _Thread()


@contextmanager
def shared_spectra(spectra: Spectra | None = None) -> Iterator[Spectra]:
    """Transform each kernel once within this context.

    A kernel that an operation changes in place is transformed anew; a change that PyTorch does not count, through
    ``.data``, is not seen. Where gradients are recorded on entering, the spectra carry them, also to uses under
    ``torch.no_grad`` inside: the one spectrum serves the steps without a graph and the last one with it.

    Args:
        spectra: what an earlier context gave, to go on with that.
    """
    before = _thread.spectra
    _thread.spectra = spectra or Spectra(graph=torch.is_grad_enabled())
    try:
        yield _thread.spectra
    finally:
        _thread.spectra = before


def running_spectra() -> Spectra | None:
    """Those of the context that this thread is in."""
    return _thread.spectra


def _is_shared(weight: Tensor) -> bool:
    # A weight that is itself computed is another one at every step: only what outlives the run is worth keeping.
    lasting = isinstance(weight, nn.Parameter) or (weight.is_leaf and weight.requires_grad)
    return _thread.spectra is not None and lasting and not weight.is_inference()


def _shared_of(weight: Tensor, what: Hashable, make: Callable[[], T]) -> T:
    """What is made of a kernel, once in a run."""
    if not _is_shared(weight):
        return make()
    assert _thread.spectra is not None
    found, key = _thread.spectra.found, (id(weight), what)
    if key not in found or found[key][1] != weight._version:
        found[key] = weight, weight._version, make()
    made: T = found[key][2]
    return made
