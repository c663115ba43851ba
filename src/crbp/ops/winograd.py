"""Cross-correlation of images with 3×3 kernels by Winograd's method F(4×4, 3×3), natively on a CPU.

A tile of 4×4 pixels is computed from 6×6 with 36 products a pair of channels, where the direct sum takes 144:
``Y = Aᵀ [(G w Gᵀ) ⊙ (Bᵀ x B)] A``, summed over inputs. It can be differentiated any number of times.

Source: Lavin and Gray, Fast algorithms for convolutional neural networks, CVPR 2016.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from crbp.ops import _native
from crbp.ops._engine import wanted
from crbp.ops._kept import Kept

KERNEL = (3, 3)
POINTS = 36  # of a tile

# In multiply-adds of the direct method, fitted as `Frame.cost` is: a call, a multiply-add, which takes longer where the
# kernels leave a core's cache, the transforms of a tile of one channel, and those of a row of tiles, unless it is of so
# many that fill vectors.
CALL, PRODUCT, CACHED, TILE, ROW = 3e6, 1.4, 64 * 64, 850.0, 7_000.0
FILLING = (4, 8, 16)


def suits(device: torch.device, weight: Tensor) -> bool:
    """Whether `winograd.cpp` is meant for this: 3×3 kernels on a CPU, for up to 65 536 pairs of channels."""
    # Above this, what has become of the kernels leaves the cache that cores share.
    outputs, inputs = weight.shape[:2]
    return device.type == "cpu" and tuple(weight.shape[2:]) == KERNEL and inputs * outputs <= 256 * 256


def cost(images: int, height: int, width: int, inputs: int, outputs: int, threads: int) -> float:
    """Of a convolution, in multiply-adds of the direct method on one thread, by fits to what it takes."""
    rows, across = images * -(-height // 4), -(-width // 4)
    product = POINTS * PRODUCT * (1.0 if inputs * outputs <= CACHED else 1.5) * inputs * outputs
    transforms = across * TILE + (0.0 if across in FILLING else ROW)
    return CALL + rows * (across * product + transforms * (inputs + outputs)) / threads


def correlate(image: Tensor, weight: Tensor, kept: Kept | None = None) -> Tensor:
    """``(B, C, H, W)`` and ``(O, C, 3, 3)`` to ``(B, O, H, W)``.

    A weight of several uses comes with what is kept of it, ``G w Gᵀ`` and the same of the kernels turned round.
    """
    result: Tensor = _Winograd.apply(image, weight, kept, False)
    return result


# A correlation is linear in the image and in the kernel; its adjoint in the image is the reverse one.


class _Winograd(torch.autograd.Function):
    """``(B, C, H, W)`` and a weight to ``(B, O, H, W)``; in reverse, ``(B, O, H, W)`` to ``(B, C, H, W)``."""

    @staticmethod
    def forward(image: Tensor, weight: Tensor, kept: Kept | None, reverse: bool) -> Tensor:
        def transform() -> Tensor:
            given = weight.detach()
            return _transformed(given.flip(2, 3).transpose(0, 1) if reverse else given)

        found: Tensor = _correlate(image, (kept or Kept()).get(reverse, transform))
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        image, weight, ctx.kept, ctx.reverse = inputs
        ctx.save_for_backward(image, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, weight = ctx.saved_tensors
        for_image, for_weight = wanted(ctx, 2)
        back = crossed = None
        if for_image:
            back = _Winograd.apply(gradient, weight, ctx.kept, not ctx.reverse)
        if for_weight:
            given, found = (gradient, image) if ctx.reverse else (image, gradient)
            crossed = _crossed(given, found, weight.shape)
        return back, crossed, None, None


def _crossed(image: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
    """The derivative by the kernel, which is a correlation of the two over all places."""
    found: Tensor = conv2d_weight(image, shape, gradient, padding=1)  # type: ignore[no-untyped-call]
    return found


def _transformed(weight: Tensor) -> Tensor:
    """``G w Gᵀ`` of every kernel, ``(36, O, C)``."""
    outputs, inputs = weight.shape[:2]
    with torch.autocast(weight.device.type, enabled=False):
        both = torch.tensor(_BOTH, dtype=weight.dtype, device="cpu")
        return (both @ weight.reshape(outputs * inputs, 9).mT).view(POINTS, outputs, inputs)


# ``24 G`` for the points 0, ±1, ±2 and infinity, and ``G ⊗ G``, ``(36, 9)``; a tensor that is kept would be what it was
# first made as, under a `FakeTensorMode` as well.
_ROWS = ((6, 0, 0), (-4, -4, -4), (-4, 4, -4), (1, 2, 4), (1, -2, 4), (0, 0, 24))
_BOTH = [[p * q / 24**2 for p in down for q in across] for down in _ROWS for across in _ROWS]


@torch.library.custom_op("crbp::winograd", mutates_args=(), device_types="cpu")
def _correlate(image: Tensor, kernels: Tensor) -> Tensor:
    images, inputs, height, width = image.shape
    outputs, dtype = kernels.shape[1], image.dtype
    if kernels.dtype != dtype or dtype not in (torch.float32, torch.float64):
        raise TypeError(f"image and kernel must both be of float32 or of float64, not of {dtype} and {kernels.dtype}")
    if kernels.shape != (POINTS, outputs, inputs):
        raise ValueError(f"kernels for {inputs} channels are ({POINTS}, O, {inputs}), not {tuple(kernels.shape)}")
    result = image.new_empty(images, outputs, height, width)
    if result.numel() == 0:
        return result
    native, suffix = _native.library(), str(dtype).removeprefix("torch.")
    tiles = images * -(-height // 4) * -(-width // 4)
    threads = max(1, min(torch.get_num_threads(), tiles // 16))
    given = (ctypes.c_int64 * 5)(images, inputs, outputs, height, width)
    scratch = torch.empty(getattr(native, f"winograd_scratch_{suffix}")(given, threads), dtype=dtype, device="cpu")
    tensors = image.contiguous(), kernels.contiguous(), result, scratch
    getattr(native, f"winograd_{suffix}")(*(ctypes.c_void_p(each.data_ptr()) for each in tensors), given, threads)
    return result


@_correlate.register_fake
def _empty_result(image: Tensor, kernels: Tensor) -> Tensor:
    return image.new_empty(image.shape[0], kernels.shape[1], *image.shape[2:])
