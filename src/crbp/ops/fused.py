"""Fused element-wise functions: compiled, with first and second derivatives that are compiled too."""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from crbp.ops._anew import Recomputed, saved_by, without_hooks
from crbp.ops._engine import wanted
from crbp.ops._linear import Linear, linearise
from crbp.ops.pointwise import for_compiler

Function = Callable[..., Tensor]
Indices = tuple[int, ...]
Signature = tuple[Any, ...]
SIZES = 8


class Fused:
    """A function of tensors, compiled together with its gradient and the gradient of that.

    What ``torch.compile`` compiles can be differentiated only once; the Lipschitz penalty needs a second derivative.
    Here ``y = f(x…)``, its pull-back ``(g, x…) ↦ gᵀ ∂f/∂x`` and the pull-back of that are three functions, each
    traced with `torch.func.vjp` inside and compiled by itself. Only the arguments are kept for the backward pass; what
    is in between is computed anew, which costs less than to read it back where memory is the bound. Within
    `repeated_products`, as in the solve of RBP's backward equation, what does not depend on ``g`` is computed once.

    The functions compile when first called, once for every set of arguments whose gradient is asked for and for up to
    `SIZES` shapes; others run as they are. Without a working compiler a warning says so, once, and `function` itself
    runs.

    Not ``compiled``, they run operation by operation, as traced, which takes a fraction of a second for each of up to
    `SIZES` shapes; for others `torch.func.vjp` is called anew. They keep as little for the backward pass and need no
    compiler, and are slower than `function` itself, as part of it is computed twice.

    Args:
        function: of tensors alone, built from PyTorch operations; returns one tensor.
        compiled: False to save memory alone.

    Attributes:
        compile_seconds: time spent in first calls that compile so far.
    """

    def __init__(self, function: Function, *, compiled: bool = True) -> None:
        self.function, self.compiled = function, compiled
        self.compile_seconds = 0.0
        self._ready: dict[tuple[Any, Signature], Callable[..., Any]] = {}
        self._linear: dict[tuple[Indices, Signature], Linear] = {}
        self._impure: set[Indices] = set()  # whose product cannot be split
        self._sizes: Counter[Any] = Counter()
        self._told = False

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The function of ``tensors``."""
        if self.compiled and not _Compiler.works:
            return self.function(*tensors)
        _calls.count += 1
        # Of a leaf the engine may not tell whether its gradient is needed; of a view it does.
        tensors = tuple(each.view_as(each) if each.is_leaf and each.requires_grad else each for each in tensors)
        result: Tensor = _Value.apply(self, *tensors)
        return result

    def value(self, *tensors: Tensor) -> Tensor:
        """``f(x…)``, without a graph."""
        result: Tensor = self._run(("value", ()), self.function, *tensors)
        return result

    def pullback(self, asked: Indices, gradient: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Of ``g, x…`` the gradients ``gᵀ ∂f/∂x`` for the arguments ``asked``, without a graph."""
        return tuple(self._run(("pullback", asked), _first(self.function, asked), gradient.contiguous(), *tensors))

    def linearised(self, asked: Indices, *tensors: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """The same as a function of ``g`` alone, all computed and kept that depends on ``x…`` only."""
        key = asked, _signature(tensors)
        arguments = tensors[1:]
        if key not in self._linear and asked not in self._impure and not self._is_full(("residuals", asked)):
            traced = self._traced(_first(self.function, asked), tensors)
            # The derivatives of some operations, as of `torch.lerp`, fill a tensor in place.
            linear = linearise(traced) or linearise(self._traced(torch.func.functionalize(traced), tensors))
            if linear is None:
                self._impure.add(asked)
            else:
                self._linear[key] = linear
        if key not in self._linear:
            return lambda gradient: self.pullback(asked, gradient, *arguments)
        linear = self._linear[key]
        # The graphs hold for these arguments, of which not all come by again.
        kept = self._run(("residuals", asked, key), linear.residuals, *arguments)
        kept = (*kept, *(arguments[place] for place in linear.needed))
        return lambda gradient: tuple(self._run(("product", asked, key), linear.product, gradient, *kept))

    def second(self, asked: Indices, then: Indices, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The pull-back of `pullback`: of cotangents and then ``g, x…``, for the arguments ``then`` of these."""
        pull = _second(self.function, asked, then)
        return tuple(self._run(("second", (asked, then)), pull, *tensors))

    def _traced(self, function: Callable[..., Any], tensors: Sequence[Tensor]) -> fx.GraphModule:
        return _traced(function, tensors, for_compiler if self.compiled else nullcontext)

    def _run(self, name: Any, function: Callable[..., Any], *tensors: Tensor) -> Any:
        if self.compiled and not _Compiler.works:
            return _as_it_is(function, tensors)
        # Without a history all calls look the same to the compiler.
        tensors = tuple(each.detach() for each in tensors)
        key = name, _signature(tensors)
        # A stage computes in the dtypes it is given.
        with torch.autocast(tensors[0].device.type, enabled=False):
            if key in self._ready:
                return self._ready[key](*tensors)
            if self._is_full(name[:2]):
                return _as_it_is(function, tensors)
            return self._first_run(key, function, tensors)

    def _is_full(self, what: Any) -> bool:
        """Whether what is asked for, whatever the sizes, has been compiled for as many as there may be."""
        if self._sizes[what] < SIZES:
            return False
        if self.compiled and not self._told:
            self._told = True
            _warn(f"a fused function has been compiled for {SIZES} sizes of image and batch; others run as they are")
        return True

    def _first_run(self, key: tuple[Any, Signature], function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Any:
        self._sizes[key[0][:2]] += 1  # without the sizes
        if not self.compiled:
            # Of derivatives only what it takes to compute them is to run.
            self._ready[key] = function if function is self.function else self._traced(function, tensors)
            return self._ready[key](*tensors)
        start = time.perf_counter()
        try:
            self._ready[key] = _compiled(self._traced(function, tensors), tensors)
            return self._ready[key](*tensors)
        except torch._dynamo.exc.TorchDynamoException as error:  # also where a GPU is too old, or Triton missing
            _Compiler.give_up(error)
            self._ready[key] = function
            return _as_it_is(function, tensors)
        finally:
            spent = time.perf_counter() - start
            self.compile_seconds += spent
            _Compiler.seconds += spent


def _as_it_is(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Any:
    with without_hooks():
        return function(*tensors)


def _signature(tensors: Sequence[Tensor]) -> Signature:
    """What a compiled function is compiled for."""
    return torch.get_num_threads(), *((each.shape, each.stride(), each.dtype, each.device) for each in tensors)


class _Calls(threading.local):
    count = 0


_calls = _Calls()


def fused_calls() -> int:
    """How many fused functions this thread has called so far."""
    return _calls.count


@dataclass
class _Repeated(threading.local):
    """Within `repeated_products`: for each node of a graph, and what it was asked for, the node and its linear map."""

    maps: dict[Any, tuple[Any, Callable[[Tensor], tuple[Tensor, ...]]]] | None = None


_repeated = _Repeated()


@contextmanager
def repeated_products() -> Iterator[None]:
    """Say that vector-Jacobian products of one graph are taken again and again within this context, without a graph.

    Each `Fused` then keeps, until the context is left, what its products have in common.
    """
    before = _repeated.maps
    _repeated.maps = {} if before is None else before
    try:
        yield
    finally:
        _repeated.maps = before


def _traced(
    function: Callable[..., Any], tensors: Sequence[Tensor], context: Callable[[], AbstractContextManager[None]]
) -> fx.GraphModule:
    """The operations that a function comes to for tensors like these, within a context."""
    if isinstance(function, fx.GraphModule):
        return function
    # One tensor given twice is two arguments here.
    copies = [torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=each.device) for each in tensors]
    graded = torch.is_grad_enabled()

    def trace() -> fx.GraphModule:
        with torch.set_grad_enabled(graded), context():
            graph: fx.GraphModule = make_fx(function, tracing_mode="fake")(*copies)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return graph

    # Hooks on saved tensors, as `crbp.activation_memory` and `torch.utils.checkpoint` set them, are of one thread, and
    # nothing can be traced under them.
    with ThreadPoolExecutor(1) as another:
        return another.submit(trace).result()


def _compiled(graph: fx.GraphModule, tensors: Sequence[Tensor]) -> Callable[..., Any]:
    # PyTorch tells on a machine without a GPU, when it compiles for the CPU, that it found none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with torch.no_grad():
        # The graph is there already: `torch.compile` would look at it again, and check at every call what `_run` knows.
        compiled: Callable[..., Any] = torch._inductor.compile(graph, list(tensors))
    return compiled


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def compiler_works() -> bool:
    """Whether fused functions are compiled, as far as is known: none has failed to be so far."""
    return _Compiler.works


def compile_seconds() -> float:
    """Seconds that this process has spent on first calls of fused functions, in which they compile."""
    return _Compiler.seconds


class _Compiler:
    """Whether there is a compiler that works, and how long it took, for the whole process."""

    works = True
    seconds = 0.0

    @classmethod
    def give_up(cls, error: Exception) -> None:
        if not cls.works:
            return
        cls.works = False
        reason = str(error).strip().splitlines()[0]
        _warn(
            "fused operations cannot be compiled here and run as ordinary ones from now on, which is slower "
            f"({reason}); a C++ compiler is needed, on a GPU Triton, or fused=False"
        )


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
        maps = _repeated.maps
        if torch.is_grad_enabled() or maps is None:
            found = _Pullback.apply(ctx.fused, asked, gradient, *tensors)
        else:
            # The node is kept with its map, so that its id stays its own.
            key = id(ctx), asked
            gradient = gradient.contiguous()
            if key not in maps:
                maps[key] = ctx, ctx.fused.linearised(asked, gradient, *tensors)
            found = maps[key][1](gradient)
        return None, *_filled(len(tensors), asked, found)


class _Pullback(Recomputed):
    @staticmethod
    def forward(fused: Fused, asked: Indices, *tensors: Tensor) -> tuple[Tensor, ...]:
        return fused.pullback(asked, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.fused, ctx.asked, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def outputs(ctx: Any, saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = ctx.fused.pullback(ctx.asked, *saved)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # Raised at once: `once_differentiable` would be passed over by `torch.autograd.grad` with named inputs.
            raise NotImplementedError("a fused function has two derivatives, not three; choose fused=False")
        gradient, *arguments = saved_by(ctx)
        then = _places(wanted(ctx, 1 + len(arguments), first=2))
        vectors = (each.contiguous() for each in (*gradients, gradient))
        found = ctx.fused.second(ctx.asked, then, *vectors, *arguments)
        return None, None, *_filled(1 + len(arguments), then, found)


def _places(flags: tuple[bool, ...]) -> Indices:
    return tuple(place for place, flag in enumerate(flags) if flag)


def _filled(count: int, places: Indices, values: Sequence[Tensor]) -> list[Tensor | None]:
    filled: list[Tensor | None] = [None] * count
    for place, value in zip(places, values, strict=True):
        filled[place] = value
    return filled
