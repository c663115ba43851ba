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
from crbp.ops._kept import Kept

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
            each = MATRIX_TRANSFORM * (inputs + outputs) + MATRIX * inputs * outputs
            return MATRIX_CALL + points * (images * each + MATRIX_READ * inputs * outputs) / threads
        into, out = (-(-channels // LANES) for channels in (inputs, outputs))
        passes = sum(len(factors(size)) for size in self.size)
        plane, spectra = (2 * BYTES * LANES * points * each for each in (max(into, out), inputs * out / 2))
        each = PASS * (into + out) * passes * (1.5 if plane > CORE else 1.0)
        each += PRODUCT * inputs * out * (1.8 if spectra > SHARED else 1.0)
        return CALL + -(-self.planes(images, image) // threads) * points * each


# Fitted to times of single calls (`benchmarks/convolution.py` judges them). For each call more than for a direct one.
CALL = 6e6
# Natively for each point of a plane: a pass over the vectors of 16 channels, and a product of one input with 16
# outputs; they take longer where a plane is larger than a core's cache, or the spectrum larger than what cores share.
LANES, BYTES, PASS, PRODUCT, CORE, SHARED = 16, 4, 500.0, 200.0, 2.0**20, 2e7
LARGEST = 256  # side of a plane that is tried, but for kernels that need more
# By PyTorch: a call, transforms and their copies for each channel, products, and reading the spectrum for them.
MATRIX_CALL, MATRIX_TRANSFORM, MATRIX, MATRIX_READ = 1.1e7, 340.0, 0.2, 15.0


def frame_for(
    images: int, image: Sides, kernel: Sides, inputs: int, outputs: int, *, native: bool, threads: int = 1
) -> Frame:
    """The plane expected to be the fastest; for PyTorch the smallest for the whole image."""
    if not native:
        size = _whole(image[0], kernel[0]), _whole(image[1], kernel[1])
        return Frame(size, image, kernel, native)
    frames = (
        Frame(size, (_tile(image[0], size[0], kernel[0]), _tile(image[1], size[1], kernel[1])), kernel, native)
        for size in product(_sizes(image[0], kernel[0]), _sizes(image[1], kernel[1]))
    )
    return min(frames, key=lambda frame: frame.cost(images, image, inputs, outputs, threads))


def _tile(image: int, plane: int, kernel: int) -> int:
    return image if plane >= image + kernel // 2 else plane - kernel + 1


def _whole(image: int, kernel: int) -> int:
    size = max(8, image + kernel // 2, kernel)
    size += size % 2
    while not factors(size):
        size += 2
    return size


def _sizes(image: int, kernel: int) -> list[int]:
    """Planes worth trying: for each number of tiles those that no smaller one with as few passes takes the place of."""
    most = min(_whole(image, kernel), max(LARGEST, 4 * kernel))
    passes: dict[int, int] = {}
    sizes = []
    for size in range(max(8, kernel + 1), most + 1, 2):
        if not (found := factors(size)):
            continue
        tiles = -(-image // _tile(image, size, kernel))
        if len(found) < passes.get(tiles, len(found) + 1):
            passes[tiles] = len(found)
            sizes.append(size)
    return sizes


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
    """Whether `spectral.cpp` is meant for this: on a CPU, for up to 16 384 pairs of channels."""
    # Above this, the matrices of a frequency fill the cache of a core, and a library's blocking is better.
    return device.type == "cpu" and inputs * outputs <= 128 * 128


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
        ctx.outputs = weight.shape[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Kernel.apply(gradient, ctx.frame, ctx.outputs), None


class _Kernel(torch.autograd.Function):
    """The adjoint of `_Spectrum`."""

    @staticmethod
    def forward(spectrum: Tensor, frame: Frame, outputs: int) -> Tensor:
        return _untransformed(spectrum, frame, outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, ctx.frame, _ = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Spectrum.apply(gradient, ctx.frame), None, None


# A kernel has so few points that products with the waves are faster than a transform. Natively they are real, and in
# the order that is wanted.


def _transformed(weight: Tensor, frame: Frame) -> Tensor:
    rows, columns = _waves(frame, weight)
    with torch.autocast(weight.device.type, enabled=False):
        if not frame.native:
            return _laid_out((rows @ (weight.to(rows.dtype) @ columns.mT)).flatten(2).permute(2, 1, 0))
        inputs, tall, wide = weight.shape[1:]
        kernels = _filled(weight.permute(2, 3, 1, 0)).reshape(tall, wide, -1)
        by_columns = _pairs(columns) @ kernels
        by_columns = by_columns.view(tall, frame.half, 2, -1).transpose(0, 1).reshape(frame.half, 2 * tall, -1)
        return (_turns(rows) @ by_columns).view(frame.half, frame.size[0], 2, inputs, -1)


def _untransformed(spectrum: Tensor, frame: Frame, outputs: int) -> Tensor:
    rows, columns = _waves(frame, spectrum)
    tall, wide = frame.kernel
    with torch.autocast(spectrum.device.type, enabled=False):
        if not frame.native:
            planes = _laid_out(spectrum.permute(2, 1, 0)).view(outputs, -1, frame.size[0], frame.half)
            kernels: Tensor = rows.mH @ (planes @ columns.conj())
            return kernels.real.contiguous()
        inputs = spectrum.shape[3]
        by_columns = _turns(rows).mT @ spectrum.reshape(frame.half, 2 * frame.size[0], -1)
        by_columns = by_columns.view(frame.half, tall, 2, -1).transpose(0, 1).reshape(tall, 2 * frame.half, -1)
        kernels = (_pairs(columns).mT @ by_columns).view(tall, wide, inputs, -1)
        return kernels[..., :outputs].permute(3, 2, 0, 1).contiguous()


def _waves(frame: Frame, like: Tensor) -> tuple[Tensor, Tensor]:
    """``exp(2πi f (p − ⌊k / 2⌋) / size)``, for frequencies f and points p of a kernel, ``(R, k)`` and ``(Q, k)``."""

    def waves(size: int, frequencies: int, points: int) -> Tensor:
        rate, place = (torch.arange(n, dtype=torch.float64, device=like.device) for n in (frequencies, points))
        turns = 2 * torch.pi * torch.outer(rate, place - points // 2) / size
        return torch.polar(torch.ones_like(turns), turns).to(like.dtype.to_complex())

    return waves(frame.size[0], frame.size[0], frame.kernel[0]), waves(frame.size[1], frame.half, frame.kernel[1])


def _pairs(waves: Tensor) -> Tensor:
    """``(Q, k)``, complex, to its real and imaginary parts as ``(2 Q, k)``."""
    return torch.view_as_real(waves).mT.reshape(-1, waves.shape[1])


def _turns(waves: Tensor) -> Tensor:
    """``(R, k)``, complex, to what multiplying by it does to pairs of real and imaginary part, ``(2 R, 2 k)``."""
    real, imaginary = waves.real, waves.imag
    both = torch.stack([torch.stack([real, -imaginary], 2), torch.stack([imaginary, real], 2)], 1)
    return both.reshape(2 * waves.shape[0], -1)


def _filled(kernels: Tensor) -> Tensor:
    """The last dimension filled up with zeros to whole vectors."""
    missing = -kernels.shape[-1] % _lanes(kernels.dtype)
    return F.pad(kernels, (0, missing)) if missing else kernels


def _lanes(dtype: torch.dtype) -> int:
    """Of a vector."""
    lanes: int = _native.library().vector_bytes() // dtype.itemsize
    return lanes


def _adjoint(spectrum: Tensor, outputs: int) -> Tensor:
    """``conj Sᵀ`` of a native spectrum S, without a graph."""
    real, imaginary = spectrum.detach()[..., :outputs].mT.unbind(2)
    return _filled(torch.stack([real, -imaginary], 2))


def correlate(image: Tensor, spectrum: Tensor, frame: Frame, outputs: int, kept: Kept | None = None) -> Tensor:
    """``(B, C, H, W)`` to ``(B, O, H, W)``; a spectrum of several uses comes with what is kept of it, its adjoint."""
    if frame.native:
        result: Tensor = _Correlate.apply(image, spectrum, kept or Kept(), frame, outputs, False)
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
#   correlate(x, S) = F⁻¹(x̂ S), whose adjoint in x is the same with conj Sᵀ, its reverse
#   cross(x, y), its adjoint in S: the sum over tiles of conj(x̂)ᵀ ŷ
# That holds for spectra of kernels of the frame's size, for which what is around a tile is enough; no others come up.


class _Correlate(torch.autograd.Function):
    """``(B, C, H, W)`` and a spectrum to ``(B, O, H, W)``; in reverse, ``(B, O, H, W)`` to ``(B, C, H, W)``."""

    @staticmethod
    def forward(image: Tensor, spectrum: Tensor, kept: Kept, frame: Frame, outputs: int, reverse: bool) -> Tensor:
        matrices = kept.get("adjoint", lambda: _adjoint(spectrum, outputs)) if reverse else spectrum
        channels = spectrum.shape[3] if reverse else outputs
        found: Tensor = _correlate(image, matrices, channels, *frame.size, *frame.tile, *frame.kernel)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        image, spectrum, ctx.kept, ctx.frame, ctx.outputs, ctx.reverse = inputs
        ctx.save_for_backward(image, spectrum)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, spectrum = ctx.saved_tensors
        for_image, for_spectrum = wanted(ctx, 2)
        back = crossed = None
        if for_image:
            back = _Correlate.apply(gradient, spectrum, ctx.kept, ctx.frame, ctx.outputs, not ctx.reverse)
        if for_spectrum:
            pair = (gradient, image) if ctx.reverse else (image, gradient)
            crossed = _Cross.apply(*pair, ctx.frame)
        return back, crossed, None, None, None, None


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
        rest = gradient, Kept(), ctx.frame, result.shape[1]
        return (
            _Correlate.apply(result, *rest, True) if for_image else None,
            _Correlate.apply(image, *rest, False) if for_result else None,
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
    sizes = images, inputs, outputs, height, width, rows, columns, tall, wide, high // 2, broad // 2
    _call("apply", (image.contiguous(), spectrum.contiguous(), result), sizes)
    return result


@torch.library.custom_op("crbp::cross", mutates_args=(), device_types="cpu")
def _cross(
    image: Tensor, result: Tensor, rows: int, columns: int, tall: int, wide: int, high: int, broad: int
) -> Tensor:
    (images, inputs, height, width), outputs = image.shape, result.shape[1]
    found: Tensor = _empty_cross(image, result, rows, columns)
    if images == 0:
        return found.zero_()
    sizes = images, inputs, outputs, height, width, rows, columns, tall, wide, high // 2, broad // 2
    _call("cross", (image.contiguous(), result.contiguous(), found), sizes)
    return found


@_correlate.register_fake
def _empty_result(image: Tensor, spectrum: Tensor, outputs: int, *sizes: int) -> Tensor:
    return image.new_empty(image.shape[0], outputs, *image.shape[2:])


@_cross.register_fake
def _empty_cross(image: Tensor, result: Tensor, rows: int, columns: int, *sizes: int) -> Tensor:
    lanes = _lanes(image.dtype)
    outputs = -(-result.shape[1] // lanes) * lanes
    return image.new_empty(columns // 2 + 1, rows, 2, image.shape[1], outputs)


def _call(name: str, tensors: tuple[Tensor, Tensor, Tensor], sizes: tuple[int, ...]) -> None:
    dtype, threads, native = tensors[0].dtype, torch.get_num_threads(), _native.library()
    if any(each.dtype != dtype or each.device.type != "cpu" for each in tensors):
        raise TypeError(f"tensors of one dtype on the CPU are needed, not {[(t.dtype, t.device) for t in tensors]}")
    if name == "apply":
        tiles = sizes[0] * -(-sizes[3] // sizes[7]) * -(-sizes[4] // sizes[8])
        threads = max(1, min(threads, -(-tiles // 2)))
    suffix = str(dtype).removeprefix("torch.")
    given = (ctypes.c_int64 * len(sizes))(*sizes)
    vectors = getattr(native, f"{name}_scratch_{suffix}")(given, threads)
    roots = [_roots(size, dtype) for size in sizes[5:7]]
    scratch = torch.empty(vectors, dtype=dtype, device="cpu")
    passed = [ctypes.c_void_p(each.data_ptr()) for each in (*tensors, *roots, scratch)]
    getattr(native, f"{name}_{suffix}")(*passed, given, threads)


@lru_cache
def _roots(count: int, dtype: torch.dtype) -> Tensor:
    """``exp(−2πi j / count)`` as pairs of real numbers ``(count, 2)``."""
    turns = -2 * torch.pi * torch.arange(count, dtype=torch.float64, device="cpu") / count
    return torch.stack([turns.cos(), turns.sin()], dim=1).to(dtype)
