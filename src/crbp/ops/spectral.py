"""Cross-correlation of images with kernels by their spectra: natively tile by tile, or by PyTorch as a whole.

A kernel ``w``, its centre at the origin of a periodic plane, acts through its spectrum ``S[f] = conj ŵ[f]``, a matrix
of inputs and outputs for each frequency ``f``: ``y = F⁻¹(x̂ S)``. A spectrum is in the layout of whoever computes with
it. Everything here can be differentiated any number of times.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crbp.ops import _native
from crbp.ops._engine import wanted

Sides = tuple[int, int]


@dataclass(frozen=True)
class Frame:
    """The periodic plane in which an image is transformed, whole or in tiles.

    A tile comes with as much around it as the kernel reaches. The plane of a whole image need only be half a kernel
    larger than that: what wraps around at one edge falls on the zeros that the other edge has anyway.

    Attributes:
        size: rows and columns of the plane, even and without a prime factor above 5.
        tile: height and width of what one tile yields.
        kernel: height and width of the kernel.
        native: for `spectral.cpp`; otherwise for PyTorch, which takes whole images.
    """

    size: Sides
    tile: Sides
    kernel: Sides
    native: bool

    @property
    def half(self) -> int:
        """Columns of the spectrum of real numbers."""
        return self.size[1] // 2 + 1

    def planes(self, images: int, image: Sides) -> int:
        """How many there are of some images; each is complex, and holds two tiles."""
        down, across = (-(-side // tile) for side, tile in zip(image, self.tile, strict=True))
        return -(-images * down * across // 2)

    def cost(self, images: int, image: Sides, inputs: int, outputs: int, threads: int) -> float:
        """Of a convolution on a CPU, in multiply-adds of the direct method on one thread, by fits to what it takes."""
        points = math.prod(self.size)
        if not self.native:
            # Of the products the spectrum is read once for all images.
            spectrum = inputs * outputs * (MATRIX + MATRIX_READ / images)
            return CALL + images * points * (MATRIX_TRANSFORM * (inputs + outputs) + spectrum) / threads
        into, out = (-(-channels // LANES) for channels in (inputs, outputs))
        passes = sum(len(factors(size)) for size in self.size)
        plane, spectra = (2 * BYTES * LANES * points * each for each in (max(into, out), inputs * out / 2))
        each = PASS * (into + out) * passes * (1.5 if plane > CORE else 1.0)
        each += PRODUCT * inputs * out * (1.8 if spectra > SHARED else 1.0)
        return CALL + -(-self.planes(images, image) // threads) * points * each


# Fitted to times that `benchmarks/convolution.py` measures. For each call more than for a direct one.
CALL = 6e6
# Natively for each point of a plane: a pass over the vectors of 16 channels, and a product of one input with 16
# outputs; they take longer where a plane is larger than a core's cache, or the spectrum larger than what cores share.
LANES, BYTES, PASS, PRODUCT, CORE, SHARED = 16, 4, 500.0, 200.0, 1e6, 2e7
# By PyTorch: transforms and their copies for each channel; products, and reading the spectrum for them.
MATRIX_TRANSFORM, MATRIX, MATRIX_READ = 120.0, 6.0, 30.0


@lru_cache(maxsize=1024)
def frame_for(
    images: int, image: Sides, kernel: Sides, inputs: int, outputs: int, *, native: bool, threads: int = 1
) -> Frame:
    """The plane expected to be the fastest."""
    frames = [
        Frame(size, tuple(map(_tile, image, size, kernel)), kernel, native)  # type: ignore[arg-type]
        for size in product(*map(_sizes, image, kernel))
    ]
    if not native:
        return frames[-1]
    return min(frames, key=lambda frame: frame.cost(images, image, inputs, outputs, threads))


def _tile(image: int, plane: int, kernel: int) -> int:
    return image if plane >= image + kernel // 2 else plane - kernel + 1


def _sizes(image: int, kernel: int) -> list[int]:
    """Planes from two pixels a tile up to the smallest for the whole image."""
    sizes = [max(8, kernel + 1)]
    while not factors(sizes[-1]) or sizes[-1] < image + kernel // 2:
        sizes.append(sizes[-1] + 2)
    return [size for size in sizes if factors(size)]


@lru_cache(maxsize=4096)
def factors(size: int) -> tuple[int, ...]:
    """What a transform of this length is made of, in the order of `spectral.cpp`; nothing if it has other factors."""
    found: list[int] = []
    rest = size
    while rest > 1:
        radix = 4 if rest == 16 else next((radix for radix in (8, 6, 5, 4, 3, 2) if rest % radix == 0), 0)
        if not radix:
            return ()
        found.append(radix)
        rest //= radix
    return tuple(found)


def native_suits(device: torch.device, inputs: int, outputs: int) -> bool:
    """Whether `spectral.cpp` is meant for this: on a CPU, for up to 4 096 pairs of channels."""
    # Above this, the matrices of a frequency leave the nearest cache, and a library's blocking is better.
    return device.type == "cpu" and inputs * outputs <= 64 * 64


def spectrum(weight: Tensor, frame: Frame) -> Tensor:
    """``(O, C, k, k)`` to matrices for the rows R and the columns Q of half a plane.

    They are ``(Q, R, 2, C, O′)`` natively, real and imaginary parts, O filled up with zeros to whole vectors; and
    complex ``(R Q, C, O)`` otherwise.
    """
    found: Tensor = _Spectrum.apply(weight, frame)
    return found


class _Spectrum(torch.autograd.Function):
    """Linear, and keeps nothing: a run's one spectrum serves as many backward passes as there are."""

    @staticmethod
    def forward(weight: Tensor, frame: Frame) -> Tensor:
        return _transformed(weight, frame)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        weight, ctx.frame = inputs
        ctx.shape, ctx.dtype = weight.shape, weight.dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Kernel.apply(gradient, ctx.frame, ctx.shape, ctx.dtype), None


class _Kernel(torch.autograd.Function):
    """The adjoint of `_Spectrum`."""

    @staticmethod
    def forward(spectrum: Tensor, frame: Frame, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        with torch.enable_grad():
            weight = spectrum.new_zeros(shape, dtype=dtype).requires_grad_()
            (kernel,) = torch.autograd.grad(_transformed(weight, frame), weight, spectrum)
        return kernel

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, ctx.frame, *_ = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Spectrum.apply(gradient, ctx.frame), None, None, None


def _transformed(weight: Tensor, frame: Frame) -> Tensor:
    inputs, tall, wide = weight.shape[1:]
    rows = _waves(frame.size[0], frame.size[0], tall, weight)
    columns = _waves(frame.size[1], frame.half, wide, weight)
    if not frame.native:
        found = rows @ (weight.to(rows.dtype) @ columns.mT)
        return _laid_out(found.flatten(2).permute(2, 1, 0))
    # Of so few points, products with the waves are faster than a transform; in the order that is wanted, and real.
    kernels = _filled(weight.permute(2, 3, 1, 0)).reshape(tall, wide, -1)
    by_columns = torch.view_as_real(columns).mT.reshape(-1, wide) @ kernels
    by_columns = by_columns.view(tall, frame.half, 2, -1).transpose(0, 1).reshape(frame.half, 2 * tall, -1)
    real, imaginary = rows.real, rows.imag
    both = torch.stack([torch.stack([real, -imaginary], 2), torch.stack([imaginary, real], 2)], 1)
    return (both.reshape(-1, 2 * tall) @ by_columns).view(frame.half, frame.size[0], 2, inputs, -1)


def _waves(size: int, frequencies: int, points: int, like: Tensor) -> Tensor:
    """``exp(2πi f (p − ⌊points / 2⌋) / size)``, for frequencies f and points p."""
    rate, place = (torch.arange(n, dtype=torch.float64, device=like.device) for n in (frequencies, points))
    turns = 2 * torch.pi * torch.outer(rate, place - points // 2) / size
    return torch.polar(torch.ones_like(turns), turns).to(like.dtype.to_complex())


def _filled(kernels: Tensor) -> Tensor:
    """The last dimension filled up with zeros to whole vectors."""
    lanes = _native.library().vector_bytes() // kernels.dtype.itemsize
    return F.pad(kernels, (0, -kernels.shape[-1] % lanes))


def adjoint(native: Tensor, outputs: int) -> Tensor:
    """A native spectrum of kernels to that of their adjoints: ``conj Sᵀ``."""
    turned = native[..., :outputs].mT
    real, imaginary = turned.unbind(2)
    return _filled(torch.stack([real, -imaginary], 2))


def correlate(image: Tensor, spectrum: Tensor, reverse: Tensor | None, frame: Frame, outputs: int) -> Tensor:
    """``(B, C, H, W)`` to ``(B, O, H, W)``; ``reverse`` is the adjoint of a native spectrum, for derivatives."""
    if frame.native:
        result: Tensor = _Correlate.apply(image, spectrum, reverse, frame, outputs)
        return result
    height, width = image.shape[-2:]
    frequencies = torch.fft.rfft2(image, s=frame.size).flatten(2)
    products = _laid_out(torch.bmm(_laid_out(frequencies.permute(2, 0, 1)), spectrum).permute(1, 2, 0))
    planes: Tensor = torch.fft.irfft2(products.view(*products.shape[:2], -1, frame.half), s=frame.size)
    return planes[..., :height, :width]


def _laid_out(spectrum: Tensor) -> Tensor:
    """The same in its own order in memory: products and transforms of views copy them one by one."""
    laid = torch.empty(spectrum.shape, dtype=spectrum.dtype, device=spectrum.device)
    return laid.copy_(spectrum)


# The native correlation is linear in the image and in the spectrum, so that two functions are each other's derivatives:
#   correlate(x, S) = F⁻¹(x̂ S), whose adjoint in x is correlate(y, conj Sᵀ)
#   cross(x, y), its adjoint in S: the sum over tiles of conj(x̂)ᵀ ŷ
# That holds for spectra of kernels of the frame's size, for which what is around a tile is enough; no others come up.


class _Correlate(torch.autograd.Function):
    @staticmethod
    def forward(image: Tensor, spectrum: Tensor, reverse: Tensor | None, frame: Frame, outputs: int) -> Tensor:
        found: Tensor = _correlate(image, spectrum, outputs, *frame.size, *frame.tile, *frame.kernel)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        image, spectrum, reverse, ctx.frame, _ = inputs
        ctx.save_for_backward(image, spectrum, reverse)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, spectrum, reverse = ctx.saved_tensors
        for_image, for_spectrum = wanted(ctx, 2)
        if for_image and reverse is None:
            reverse = adjoint(spectrum, gradient.shape[1])
        return (
            _Correlate.apply(gradient, reverse, spectrum, ctx.frame, image.shape[1]) if for_image else None,
            _Cross.apply(image, gradient, ctx.frame) if for_spectrum else None,
            None,
            None,
            None,
        )


class _Cross(torch.autograd.Function):
    """``(B, C, H, W), (B, O, H, W)`` to what the two have to do with a spectrum between them."""

    @staticmethod
    def forward(image: Tensor, result: Tensor, frame: Frame) -> Tensor:
        found: Tensor = _cross(image, result, *frame.size, *frame.tile, *frame.kernel)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        image, result, ctx.frame = inputs
        ctx.save_for_backward(image, result)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, result = ctx.saved_tensors
        for_image, for_result = wanted(ctx, 2)
        inputs, outputs = image.shape[1], result.shape[1]
        reverse = adjoint(gradient, outputs)
        return (
            _Correlate.apply(result, reverse, gradient, ctx.frame, inputs) if for_image else None,
            _Correlate.apply(image, gradient, reverse, ctx.frame, outputs) if for_result else None,
            None,
        )


# Operators of PyTorch, so that fake tensors, tracing and tensors of other kinds meet them as they meet its own. The
# integers are the number of outputs, then rows and columns of the plane, of a tile and of the kernel.


@torch.library.custom_op("crbp::correlate", mutates_args=(), device_types="cpu")
def _correlate(
    image: Tensor, spectrum: Tensor, outputs: int, rows: int, columns: int, tall: int, wide: int, high: int, broad: int
) -> Tensor:
    images, inputs, height, width = image.shape
    result = image.new_empty(images, outputs, height, width)
    # Two planes at a time share what is read of the spectrum, and lie in a core's cache.
    sizes = images, inputs, outputs, height, width, rows, columns, tall, wide, high // 2, broad // 2, 2
    _call("apply", (image.contiguous(), spectrum.contiguous(), result), sizes)
    return result


@torch.library.custom_op("crbp::cross", mutates_args=(), device_types="cpu")
def _cross(
    image: Tensor, result: Tensor, rows: int, columns: int, tall: int, wide: int, high: int, broad: int
) -> Tensor:
    (images, inputs, height, width), outputs = image.shape, result.shape[1]
    found: Tensor = _empty_cross(image, result, rows, columns)
    # Of four the sums are added to the spectrum at once, which is written out every time.
    sizes = images, inputs, outputs, height, width, rows, columns, tall, wide, high // 2, broad // 2, 4
    _call("cross", (image.contiguous(), result.contiguous(), found), sizes)
    return found


@_correlate.register_fake
def _empty_result(image: Tensor, spectrum: Tensor, outputs: int, *sizes: int) -> Tensor:
    return image.new_empty(image.shape[0], outputs, *image.shape[2:])


@_cross.register_fake
def _empty_cross(image: Tensor, result: Tensor, rows: int, columns: int, *sizes: int) -> Tensor:
    lanes = _native.library().vector_bytes() // image.dtype.itemsize
    outputs = -(-result.shape[1] // lanes) * lanes
    return image.new_empty(columns // 2 + 1, rows, 2, image.shape[1], outputs)


def _call(name: str, tensors: tuple[Tensor, Tensor, Tensor], sizes: tuple[int, ...]) -> None:
    dtype, threads, native = tensors[0].dtype, torch.get_num_threads(), _native.library()
    assert all(each.dtype == dtype and each.device.type == "cpu" for each in tensors)
    suffix = str(dtype).removeprefix("torch.")
    given = (ctypes.c_int64 * 12)(*sizes)
    scratch = torch.empty(getattr(native, f"scratch_{suffix}")(given, threads), dtype=dtype, device="cpu")
    roots = (_roots(size, dtype) for size in sizes[5:7])
    passed = [ctypes.c_void_p(each.data_ptr()) for each in (*tensors, *roots, scratch)]
    getattr(native, f"{name}_{suffix}")(*passed, given, threads)


@lru_cache
def _roots(count: int, dtype: torch.dtype) -> Tensor:
    """``exp(−2πi j / count)`` as pairs of real numbers ``(count, 2)``."""
    turns = -2 * torch.pi * torch.arange(count, dtype=torch.float64, device="cpu") / count
    return torch.stack([turns.cos(), turns.sin()], dim=1).to(dtype)
