"""Softplus, of which a step of the cells takes several and which takes longer than all else between convolutions."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crbp.ops import _native
from crbp.ops._engine import is_ordinary

LEAST = 1 << 15  # numbers from which on the native code is worth a call of it

# log(1 + e) / e on [0, 1], lowest power first: a least-squares fit in Chebyshev polynomials.
_LOG1P = (
    0.999999999, -0.499999817, 0.333325692, -0.249873928, 0.198915375, -0.161086319,
    0.124251029, -0.082535332, 0.0415576225, -0.013444831, 0.0020376905,
)  # fmt: skip


def softplus(x: Tensor) -> Tensor:
    """``log(1 + eˣ)``, of a tensor of any shape, differentiable any number of times.

    In float32, for 32 768 numbers or more that lie side by side, on a CPU with a C++ compiler, and in what `Fused`
    compiles, it is ``max(x, 0) + log(1 + e^−|x|)`` with polynomials: relative error below 3e-7, and 0 below −87. Its
    derivative is the logistic function. That is then all that is kept for the backward pass, and a second derivative
    goes back through the same node: it needs ``retain_graph`` as that of `torch.sigmoid` does.

    Elsewhere, and inside `torch.compile`, tracing, the transforms of `torch.func`, forward differentiation and
    autocast, it is `torch.nn.functional.softplus`.
    """
    if x.dtype != torch.float32 or _thread.kind == "PyTorch's":
        return F.softplus(x)
    if _thread.kind == "for a compiler":
        result: Tensor = _Polynomial.apply(x)
        return result
    # In this order, as no number of a symbolic shape must be looked at.
    plain = type(x) in (Tensor, nn.Parameter) and is_ordinary(x) and x.numel() >= LEAST and _is_dense(x)
    if not plain or _native.found() is None:
        return F.softplus(x)
    value: Tensor = _softplus_and_slope(x)[0] if x.requires_grad and torch.is_grad_enabled() else _softplus(x)
    return value


class _Thread(threading.local):
    kind: Literal["native", "for a compiler", "PyTorch's"] = "native"


_thread = _Thread()


@contextmanager
def _of_kind(kind: Literal["for a compiler", "PyTorch's"]) -> Iterator[None]:
    before, _thread.kind = _thread.kind, kind
    try:
        yield
    finally:
        _thread.kind = before


def for_compiler() -> AbstractContextManager[None]:
    """Within this context what this thread traces will be compiled: take what a compiler makes the most of."""
    return _of_kind("for a compiler")


def as_pytorch() -> AbstractContextManager[None]:
    """Within this context take in this thread what runs without crbp: the softplus of PyTorch."""
    return _of_kind("PyTorch's")


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


@torch.library.custom_op("crbp::softplus", mutates_args=(), device_types="cpu")
def _softplus(x: Tensor) -> Tensor:
    value = torch.empty_like(x)
    _call(x, value, None)
    return value


@torch.library.custom_op("crbp::softplus_and_slope", mutates_args=(), device_types="cpu")
def _softplus_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    value, slope = torch.empty_like(x), torch.empty_like(x)
    _call(x, value, slope)
    return value, slope


def _keep_slope(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, of_value: Tensor | None, of_slope: Tensor | None) -> Tensor | None:
    (slope,) = ctx.saved_tensors
    found = None if of_value is None else of_value * slope
    if of_slope is None:
        return found
    second: Tensor = torch.ops.aten.sigmoid_backward(of_slope, slope)
    return second if found is None else found + second


_softplus_and_slope.register_autograd(_backward, setup_context=_keep_slope)


@_softplus.register_fake
def _empty_value(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@_softplus_and_slope.register_fake
def _empty_value_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _call(x: Tensor, value: Tensor, slope: Tensor | None) -> None:
    if x.dtype != torch.float32 or not _is_dense(x):
        raise TypeError(f"a dense tensor of float32 is needed, not one of {x.dtype} with strides {x.stride()}")
    places = [None if each is None else each.data_ptr() for each in (x, value, slope)]
    threads = max(1, min(torch.get_num_threads(), x.numel() // LEAST))
    coefficients = (ctypes.c_float * len(_LOG1P))(*_LOG1P)
    given = (*map(ctypes.c_void_p, places), coefficients, ctypes.c_int64(x.numel()), threads)
    _native.library().softplus_float32(*given)


class _Polynomial(torch.autograd.Function):
    """The same from operations that a compiler fuses."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        small = torch.exp(-x.abs())
        return torch.relu(x) + _log1p(small)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * torch.sigmoid(x)


def _log1p(e: Tensor) -> Tensor:
    """``log(1 + e)`` on [0, 1], by Estrin’s scheme, as Horner’s is one long chain of operations."""
    c = _LOG1P
    e2 = e * e
    e4 = e2 * e2
    pairs = [c[k] + c[k + 1] * e for k in range(0, 10, 2)]
    low = (pairs[0] + pairs[1] * e2) + (pairs[2] + pairs[3] * e2) * e4
    return (low + (pairs[4] + c[10] * e2) * (e4 * e4)) * e
