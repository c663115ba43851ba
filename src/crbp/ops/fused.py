"""Fused element-wise functions: compiled, with first and second derivatives that are compiled too."""

from __future__ import annotations

import itertools
import logging
import time
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crbp.ops._engine import wanted

Function = Callable[..., Tensor]
Indices = tuple[int, ...]


class Fused:
    """A function of tensors, compiled together with its gradient and the gradient of that.

    What ``torch.compile`` compiles can be differentiated only once; the Lipschitz penalty needs a second derivative.
    Here ``y = f(x…)``, its pull-back ``(g, x…) ↦ gᵀ ∂f/∂x`` and the pull-back of that are three functions, each
    compiled by itself with `torch.func.vjp` inside. Only the arguments are kept for the backward pass: values in
    between are computed anew, which costs less than to read them back where memory is the bound.

    The functions compile when first called, once for every set of arguments whose gradient is asked for. Without a
    working compiler a warning says so, once, and `function` itself runs.

    Args:
        function: of tensors alone, built from PyTorch operations; returns one tensor.

    Attributes:
        compile_seconds: time spent in first calls so far.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        self.compile_seconds = 0.0
        self._compiled: dict[tuple[Any, ...], Function] = {}

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The function of ``tensors``."""
        if not _Compiler.works:
            return self.function(*tensors)
        # Of a leaf the engine may not tell whether its gradient is needed; of a view it does.
        tensors = tuple(each.view_as(each) if each.is_leaf and each.requires_grad else each for each in tensors)
        result: Tensor = _Value.apply(self, *tensors)
        return result

    def value(self, *tensors: Tensor) -> Tensor:
        """``f(x…)``, without a graph."""
        result: Tensor = self._run("value", self.function, *tensors)
        return result

    def pullback(self, asked: Indices, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Of ``g, x…`` the gradients ``gᵀ ∂f/∂x`` for the arguments ``asked``, without a graph."""
        found: tuple[Tensor, ...] = self._run(("pullback", asked), _first(self.function, asked), *tensors)
        return found

    def second(self, asked: Indices, then: Indices, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The pull-back of `pullback`: of cotangents and then ``g, x…``, for the arguments ``then`` of these."""
        pull = _second(self.function, asked, then)
        found: tuple[Tensor, ...] = self._run(("second", asked, then), pull, *tensors)
        return found

    def _run(self, key: Any, function: Callable[..., Any], *tensors: Tensor) -> Any:
        # Without a history all calls look the same to the compiler.
        tensors = tuple(each.detach() for each in tensors)
        start = time.perf_counter()
        first = key not in self._compiled
        if first:
            # PyTorch tells on a machine without a GPU, when it compiles for the CPU, that it found none.
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
            self._compiled[key] = torch.compile(_apart(function), fullgraph=True)
        try:
            return self._compiled[key](*tensors)
        except (torch._dynamo.exc.BackendCompilerFailed, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            _Compiler.give_up(error)
            self._compiled[key] = function
            return function(*tensors)
        finally:
            if first:
                self.compile_seconds += time.perf_counter() - start


# log(1 + e) / e on [0, 1], lowest power first: a least-squares fit in Chebyshev polynomials.
_LOG1P = (
    0.999999999, -0.499999817, 0.333325692, -0.249873928, 0.198915375, -0.161086319,
    0.124251029, -0.082535332, 0.0415576225, -0.013444831, 0.0020376905,
)  # fmt: skip


def softplus(x: Tensor) -> Tensor:
    """``log(1 + eˣ)``, for use inside `Fused`, where a logarithm costs more than all else in a stage.

    In float32 ``max(x, 0) + log(1 + e^−|x|)`` with a polynomial for the logarithm: relative error below 2e-7 of the
    value, 1e-6 of the derivative, 1e-4 of the second one. In other precisions `torch.nn.functional.softplus`.
    """
    if x.dtype != torch.float32:
        return F.softplus(x)
    # Not `abs` and `relu`: the derivatives at zero must be those of the softplus.
    positive = x >= 0
    small = torch.exp(torch.where(positive, -x, x))
    series = torch.full_like(small, _LOG1P[-1])
    for coefficient in reversed(_LOG1P[:-1]):
        series = series * small + coefficient
    return torch.where(positive, x, 0.0) + series * small


class _Compiler:
    """Whether there is a compiler that works, for the whole process."""

    works = True

    @classmethod
    def give_up(cls, error: Exception) -> None:
        if not cls.works:
            return
        cls.works = False
        reason = str(error).strip().splitlines()[0]
        warnings.warn(
            "fused operations cannot be compiled here and run as ordinary ones from now on, which is slower "
            f"({reason}); a C++ compiler is needed, at most eight sizes of image and batch, or fused=False",
            RuntimeWarning,
            stacklevel=2,
        )


def _apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with code of its own, for the compiler counts its versions by code, which closures share."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_number)}")
    return types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )


_number = itertools.count()


def _first(function: Function, asked: Indices) -> Callable[..., tuple[Tensor, ...]]:
    def pull(gradient: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
        def of_asked(*some: Tensor) -> Tensor:
            return function(*_replaced(arguments, asked, some))

        found: tuple[Tensor, ...] = torch.func.vjp(of_asked, *(arguments[i] for i in asked))[1](gradient)
        return found

    return pull


def _second(function: Function, asked: Indices, then: Indices) -> Callable[..., tuple[Tensor, ...]]:
    def pull(*tensors: Tensor) -> tuple[Tensor, ...]:
        cotangents, arguments = tensors[: len(asked)], tensors[len(asked) :]

        def of_then(*some: Tensor) -> tuple[Tensor, ...]:
            return _first(function, asked)(*_replaced(arguments, then, some))

        found: tuple[Tensor, ...] = torch.func.vjp(of_then, *(arguments[i] for i in then))[1](cotangents)
        return found

    return pull


def _replaced(tensors: tuple[Tensor, ...], places: Indices, values: tuple[Tensor, ...]) -> list[Tensor]:
    new = list(tensors)
    for place, value in zip(places, values, strict=True):
        new[place] = value
    return new


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(fused: Fused, *tensors: Tensor) -> Tensor:
        return fused.value(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.fused, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        asked = _places(wanted(ctx, len(tensors), first=1))
        found = _Pullback.apply(ctx.fused, asked, gradient.contiguous(), *tensors)
        return None, *_filled(len(tensors), asked, found)


class _Pullback(torch.autograd.Function):
    @staticmethod
    def forward(fused: Fused, asked: Indices, *tensors: Tensor) -> tuple[Tensor, ...]:
        return fused.pullback(asked, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.fused, ctx.asked, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # Raised at once: `once_differentiable` would be passed over by `torch.autograd.grad` with named inputs.
            raise NotImplementedError("a fused function has two derivatives, not three; choose fused=False")
        tensors = ctx.saved_tensors
        then = _places(wanted(ctx, len(tensors), first=2))
        found = ctx.fused.second(ctx.asked, then, *(each.contiguous() for each in gradients), *tensors)
        return None, None, *_filled(len(tensors), then, found)


def _places(flags: tuple[bool, ...]) -> Indices:
    return tuple(place for place, flag in enumerate(flags) if flag)


def _filled(count: int, places: Indices, values: Sequence[Tensor]) -> list[Tensor | None]:
    filled: list[Tensor | None] = [None] * count
    for place, value in zip(places, values, strict=True):
        filled[place] = value
    return filled
