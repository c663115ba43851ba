"""Convolutions that keep the image size: direct, or by FFT with the kernel's spectrum shared over a whole run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crbp._checks import choice, count
from crbp.ops._engine import wanted
from crbp.ops.products import native_suits, products

Method = Literal["auto", "direct", "fft"]


class Frame(NamedTuple):
    """The periodic plane in which an image is transformed, and who multiplies there, see `crbp.ops.products`.

    The plane need only be half a kernel larger than the image: what wraps around at one edge falls on the zeros that
    the other edge has anyway.
    """

    width: int
    rows: int
    columns: int
    native: bool = False

    @staticmethod
    def around(image: tuple[int, int], kernel: tuple[int, int]) -> Frame:
        """The smallest plane that is fast to transform."""
        rows, columns = (_fast_size(max(side + reach // 2, reach)) for side, reach in zip(image, kernel, strict=True))
        return Frame(image[1], rows, columns)

    @property
    def half(self) -> int:
        """Columns of the spectrum of real numbers."""
        return self.columns // 2 + 1


@lru_cache
def _fast_size(least: int) -> int:
    """The smallest even number from ``least`` on without a prime factor above 5."""
    size = least + least % 2
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 2


def conv2d(image: Tensor, weight: Tensor, bias: Tensor | None = None, *, method: Method = "auto") -> Tensor:
    """Cross-correlate images with odd kernels, stride 1, zeros around: the size is kept.

    ``y[b, o, i, j] = Σ w[o, c, u, v] x[b, c, i + u − k/2, j + v − k/2]``, as `torch.nn.functional.conv2d` with
    ``padding="same"``. By FFT it is ``rfft2``, one matrix product for each frequency, ``irfft2``: the cost does not
    depend on the kernel's size. It can be differentiated any number of times, but not batched by ``vmap``. Inside
    `shared_spectra`, which `crbp.Evolve` opens for each run, a kernel is transformed once.

    Args:
        image: ``(B, C, H, W)``.
        weight: ``(O, C, k, k)``, odd sides.
        bias: ``(O,)``, added to each channel.
        method: ``"direct"``, ``"fft"`` (float32 or float64), or ``"auto"``: whichever `prefers_fft` expects to be
            faster.

    Returns:
        ``(B, O, H, W)``.

    Raises:
        ValueError: for an even kernel, an unknown method, or images of a shape or dtype that the FFT is not for.
    """
    choice("method", method, get_args(Method))
    if weight.shape[-1] % 2 == 0 or weight.shape[-2] % 2 == 0:
        raise ValueError(f"a kernel must have odd sides to keep the image size, not {tuple(weight.shape[-2:])}")
    if method == "direct" or (method == "auto" and not prefers_fft(image, weight)):
        return F.conv2d(image, weight, bias, padding="same")
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
        raise ValueError(f"there is no FFT for images of {image.dtype}; choose method='direct' or float32")
    frame = Frame.around((image.shape[-2], image.shape[-1]), (weight.shape[-2], weight.shape[-1]))
    frame = frame._replace(native=native_suits(image.device, weight.shape[1], weight.shape[0]))
    result: Tensor = _Correlate.apply(image, _spectrum_of(weight, frame), frame)
    return result if bias is None else result + bias[:, None, None]


def prefers_fft(image: Tensor, weight: Tensor) -> bool:
    """Whether the FFT is expected to be faster: a rule fitted to times on a CPU; `benchmarks/convolution.py` has them.

    Elsewhere, in lower precision, under autocast, inside `torch.compile` and under the transforms of `torch.func` and
    forward differentiation the direct method is taken.
    """
    if image.ndim != 4 or image.shape[0] == 0:
        return False
    if image.device.type != "cpu" or image.dtype not in (torch.float32, torch.float64):
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
        return False
    outputs, inputs, height, width = weight.shape
    frame = Frame.around((image.shape[-2], image.shape[-1]), (height, width))
    direct = image.shape[-2] * image.shape[-1] * height * width * inputs * outputs
    plane = frame.rows * frame.columns
    # Transforms and their copies for each channel; the products, of which the spectrum is read once for all images.
    fft = plane * (TRANSFORM * (inputs + outputs) + inputs * outputs * (PRODUCT + SPECTRUM / image.shape[0]))
    return fft < direct


# Costs in multiply-adds of the direct method.
TRANSFORM, PRODUCT, SPECTRUM = 120.0, 6.0, 30.0


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


@dataclass
class _Shared(threading.local):
    """The spectra of the run that this thread is in, by kernel and frame."""

    spectra: dict[Any, tuple[Tensor, Tensor]] | None = None
    graph: bool = field(default=False)


_shared = _Shared()


@contextmanager
def shared_spectra() -> Iterator[None]:
    """Transform each kernel once within this context, whose kernels must not be changed in it.

    Where gradients are recorded on entering, the spectra carry them, also to uses under ``torch.no_grad`` inside: the
    one spectrum serves the steps without a graph and the last one with it.
    """
    before = _shared.spectra, _shared.graph
    _shared.spectra, _shared.graph = {}, torch.is_grad_enabled()
    try:
        yield
    finally:
        _shared.spectra, _shared.graph = before


def _spectrum_of(weight: Tensor, frame: Frame) -> Tensor:
    # A weight that is itself computed is another one at every step: only what outlives the run is worth keeping.
    lasting = isinstance(weight, nn.Parameter) or (weight.is_leaf and weight.requires_grad)
    if _shared.spectra is None or not lasting or weight.is_inference():
        found: Tensor = _Spectrum.apply(weight, frame)
        return found
    graph = _shared.graph or torch.is_grad_enabled()
    key = id(weight), weight._version, frame, graph
    if key not in _shared.spectra:
        with torch.set_grad_enabled(graph):
            # The weight is kept as well, so that its id stays its own.
            _shared.spectra[key] = _Spectrum.apply(weight, frame), weight
    return _shared.spectra[key][0]


# A kernel w, its centre at the origin of the plane, acts through its spectrum S[f] = conj ŵ[f], a (C, O) matrix for
# each frequency f; an image x through (B, C) matrices x̂[f]. All is bilinear, so three products, each the derivative of
# the others, and a linear pair are enough for derivatives of any order:
#   correlate(x, S) = U(x̂ S)      convolve(y, S) = U(ŷ conj(S)ᵀ), its adjoint in x
#   cross(x, y) = conj(x̂)ᵀ ŷ, its adjoint in S          spectrum(w) and its adjoint
# A spectrum and its gradient are in the layout of `products`, as the adjoint of `spectrum` wants it; private to this
# package. Rows are transformed here, columns there.


def _rows(image: Tensor, frame: Frame) -> Tensor:
    """``(B, C, H, W)`` to the transforms of its rows ``(B, C, H, Q)``."""
    rows: Tensor = torch.fft.rfft(image, n=frame.columns)
    return rows


def _image(rows: Tensor, frame: Frame) -> Tensor:
    """The way back."""
    plane: Tensor = torch.fft.irfft(rows, n=frame.columns)
    return plane[..., : frame.width]


def _waves(frame: Frame, kernel: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """The transform of a kernel by rows ``(R, k)`` and columns ``(k, Q)``: of so few points, products are faster."""

    def waves(size: int, frequencies: int, points: int) -> Tensor:
        rate, place = (torch.arange(n, dtype=torch.float64, device=like.device) for n in (frequencies, points))
        turns = torch.outer(rate, place - points // 2) / size
        return torch.polar(torch.ones_like(turns), -2 * torch.pi * turns).to(like.dtype.to_complex())

    return waves(frame.rows, frame.rows, kernel[0]), waves(frame.columns, frame.half, kernel[1]).mT


class _Product(torch.autograd.Function):
    """One of the three products, of two tensors in a frame."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        *tensors, ctx.frame = inputs
        ctx.save_for_backward(*tensors)


class _Correlate(_Product):
    """``(B, C, H, W)`` and a spectrum to ``(B, O, H, W)``."""

    @staticmethod
    def forward(image: Tensor, spectrum: Tensor, frame: Frame) -> Tensor:
        found = products(native=frame.native).correlate(_rows(image, frame), spectrum, frame.rows)
        return _image(found, frame)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, spectrum = ctx.saved_tensors
        for_image, for_spectrum = wanted(ctx, 2)
        return (
            _Convolve.apply(gradient, spectrum, ctx.frame) if for_image else None,
            _Cross.apply(image, gradient, ctx.frame) if for_spectrum else None,
            None,
        )


class _Convolve(_Product):
    """``(B, O, H, W)`` and a spectrum to ``(B, C, H, W)``."""

    @staticmethod
    def forward(image: Tensor, spectrum: Tensor, frame: Frame) -> Tensor:
        found = products(native=frame.native).convolve(_rows(image, frame), spectrum, frame.rows)
        return _image(found, frame)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, spectrum = ctx.saved_tensors
        for_image, for_spectrum = wanted(ctx, 2)
        return (
            _Correlate.apply(gradient, spectrum, ctx.frame) if for_image else None,
            _Cross.apply(gradient, image, ctx.frame) if for_spectrum else None,
            None,
        )


class _Cross(_Product):
    """``(B, C, H, W), (B, O, H, W)`` to what the two have to do with a spectrum between them."""

    @staticmethod
    def forward(image: Tensor, result: Tensor, frame: Frame) -> Tensor:
        return products(native=frame.native).cross(_rows(image, frame), _rows(result, frame), frame.rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, result = ctx.saved_tensors
        for_image, for_result = wanted(ctx, 2)
        return (
            _Convolve.apply(result, gradient, ctx.frame) if for_image else None,
            _Correlate.apply(image, gradient, ctx.frame) if for_result else None,
            None,
        )


class _Spectrum(torch.autograd.Function):
    """``(O, C, k, k)`` to its spectrum."""

    @staticmethod
    def forward(weight: Tensor, frame: Frame) -> Tensor:
        rows, columns = _waves(frame, (weight.shape[-2], weight.shape[-1]), weight)
        return products(native=frame.native).pack(rows @ (weight.to(rows.dtype) @ columns))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        weight, ctx.frame = inputs
        ctx.kernel = weight.shape[-2], weight.shape[-1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Kernel.apply(gradient, ctx.frame, ctx.kernel), None


class _Kernel(torch.autograd.Function):
    """A spectrum to ``(O, C, k, k)``: the adjoint of `_Spectrum`."""

    @staticmethod
    def forward(spectrum: Tensor, frame: Frame, kernel: tuple[int, int]) -> Tensor:
        unpacked = products(native=frame.native).unpack(spectrum, frame.rows, frame.half)
        rows, columns = _waves(frame, kernel, unpacked)
        # Of a real plane the spectrum has one half; all but its first and last column stand for two.
        twice = torch.full((frame.half,), 2.0, dtype=columns.dtype, device=columns.device)
        twice[[0, -1]] = 1.0
        weight = (rows.mH @ unpacked) @ (columns.conj() * twice / (frame.rows * frame.columns)).mT
        return weight.real.contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, ctx.frame, _ = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Spectrum.apply(gradient, ctx.frame), None, None
