"""Gradient methods: how a run of a step function is differentiated. Each is a value that `Evolve` is given."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crbp._checks import choice, count
from crbp._tree import LeafStep, Leaves, detach, ravel, relative_residual, separate, vector_jacobian
from crbp.errors import DivergenceError, DivergenceWarning
from crbp.ops import repeated_products, shared_spectra
from crbp.ops.convolution import Spectra, running_spectra
from crbp.solvers import Neumann, Solution, Solver, StopReason

Policy = Literal["raise", "warn", "fallback"]


@dataclass(kw_only=True)
class BackwardReport:
    """How the backward equation of one run was solved; filled in by `backward()`.

    Attributes:
        terms: vector-Jacobian products spent.
        residual: relative residual of the solution, in units of ``‖g‖``.
        stop: why the solver ended.
        fell_back: whether the best iterate was used in place of the last one.
    """

    terms: int
    residual: float
    stop: StopReason
    fell_back: bool


@dataclass(frozen=True, kw_only=True)
class Recurrence:
    """What a gradient method is asked to run.

    Attributes:
        step: maps the leaves of a state to the leaves of the next.
        start: the leaves to start from.
        steps: the most steps, at least 1.
        tolerance: relative residual at which to stop early; None takes all steps.
        record: to be called from the backward pass by methods that solve an equation there.
    """

    step: LeafStep
    start: Leaves
    steps: int
    tolerance: float | None
    record: Callable[[BackwardReport], None]

    def split(self, window: int) -> tuple[Rollout, int]:
        """Run all but the last ``window`` steps without a graph; the state is then cut, open to a new graph.

        Returns:
            The run so far, and the number of steps left to take with a graph. Where no step comes before the window,
            the state is the start, still attached.
        """
        tail = min(window, self.steps)
        with torch.no_grad():
            head = advance(self.step, self.start, self.steps - tail, self.tolerance)
        if head.steps:
            head.state = detach(head.last, requires_grad=torch.is_grad_enabled())
        return head, tail


@dataclass(kw_only=True)
class Rollout:
    """What a gradient method hands back to `Evolve`.

    Attributes:
        state: the final state; its graph carries the method's gradient.
        previous: the state before the last step.
        last: the step itself, undamped, applied to ``previous``, on its own graph.
        steps: steps taken.
        stop: why they ended.
    """

    state: Leaves
    previous: Leaves
    last: Leaves
    steps: int
    stop: StopReason

    def followed_by(self, tail: Rollout) -> Rollout:
        """This run without a graph and then ``tail``, which takes all its steps."""
        return replace(tail, steps=self.steps + tail.steps, stop=self.stop)


class GradientMethod(ABC):
    """How a run is differentiated. Implement `__call__` to add a method of your own."""

    @abstractmethod
    def __call__(self, recurrence: Recurrence) -> Rollout:
        """Run the recurrence so that its final state carries the gradient of this method."""


def advance(step: LeafStep, state: Leaves, steps: int, tolerance: float | None = None) -> Rollout:
    """Apply ``step`` up to ``steps`` times under whatever graph mode is on."""
    previous = last = state
    taken, stop = 0, StopReason.BUDGET
    while taken < steps and stop is StopReason.BUDGET:
        previous = separate(last)
        last = step(previous)
        taken += 1
        if tolerance is not None and float(relative_residual(previous, last)) <= tolerance:
            stop = StopReason.CONVERGED
    return Rollout(state=last, previous=previous, last=last, steps=taken, stop=stop)


@dataclass(frozen=True)
class BPTT(GradientMethod):
    """Back-propagation through time: exact, through every step; memory O(N)."""

    def __call__(self, recurrence: Recurrence) -> Rollout:
        """Run every step with a graph."""
        return advance(recurrence.step, recurrence.start, recurrence.steps, recurrence.tolerance)


@dataclass(frozen=True, kw_only=True)
class TruncatedBPTT(GradientMethod):
    """Back-propagate through the last ``window`` steps only; memory O(window).

    With a tolerance, the steps without a graph may end early; the ``window`` steps with one are always taken.

    Raises:
        ValueError: if ``window`` is below 1.
    """

    window: int

    def __post_init__(self) -> None:
        count("window", self.window)

    def __call__(self, recurrence: Recurrence) -> Rollout:
        """Run the steps before the window without a graph."""
        head, left = recurrence.split(self.window)
        return head.followed_by(advance(recurrence.step, head.state, left))


@dataclass(frozen=True)
class OneStep(GradientMethod):
    """The one-step ("Jacobian-free") gradient: ``u = g``, through the last step only; memory O(1).

    Source: Fung et al., JFB: Jacobian-free backpropagation for implicit networks, arXiv 2103.12803.
    """

    def __call__(self, recurrence: Recurrence) -> Rollout:
        """Run all but the last step without a graph."""
        return TruncatedBPTT(window=1)(recurrence)


@dataclass(frozen=True, kw_only=True)
class CheckpointedBPTT(GradientMethod):
    """Exact back-propagation through time that recomputes chunks of steps; memory O(N / chunk + chunk).

    The gradient is that of `BPTT`, for one more forward pass. A tolerance is tested at the end of each chunk.

    Args:
        chunk: steps between two stored states; None takes ``⌈√N⌉``, which needs least memory.

    Raises:
        ValueError: if ``chunk`` is below 1.

    Source: Chen et al., Training deep nets with sublinear memory cost, arXiv 1604.06174.
    """

    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None:
            count("chunk", self.chunk)

    def __call__(self, recurrence: Recurrence) -> Rollout:
        """Run the steps in chunks that store their first state only; the last step keeps its graph."""
        step, tolerance = recurrence.step, recurrence.tolerance
        if not torch.is_grad_enabled():
            return advance(step, recurrence.start, recurrence.steps, tolerance)
        size, spectra = self.chunk or math.isqrt(recurrence.steps - 1) + 1, running_spectra()
        head = advance(step, recurrence.start, 0)
        while head.steps < recurrence.steps - 1 and head.stop is StopReason.BUDGET:
            length = min(size, recurrence.steps - 1 - head.steps)
            leaves = checkpoint(_chunk, step, length, spectra, *head.state, use_reentrant=False)
            half = len(leaves) // 2
            head = replace(head, previous=leaves[:half], state=leaves[half:], steps=head.steps + length)
            if tolerance is not None and float(relative_residual(head.previous, head.state)) <= tolerance:
                head.stop = StopReason.CONVERGED
        return head.followed_by(advance(step, head.state, 1))


def _chunk(step: LeafStep, length: int, spectra: Spectra | None, *state: Tensor) -> Leaves:
    with shared_spectra(spectra):  # the backward pass takes these steps again, outside the run
        rolled = advance(step, state, length)
    return *rolled.previous, *rolled.last


@dataclass(frozen=True, kw_only=True)
class Phantom(GradientMethod):
    """Unrolled phantom gradient: the last ``window`` steps are damped and back-propagated through; memory O(window).

    ``h_{t+1} = (1 − damping) h_t + damping · f(h_t)``. Damping makes a step contract more surely, at the price of a
    state that moves less. The run ends on damped steps in evaluation too.

    Args:
        window: damped steps with a graph, at least 1.
        damping: share of the new state, in (0, 1].

    Raises:
        ValueError: for values out of range.

    Source: Geng et al., On training implicit models, arXiv 2111.05177.
    """

    window: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        count("window", self.window)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], not {self.damping!r}")

    def __call__(self, recurrence: Recurrence) -> Rollout:
        """Run the steps before the window undamped and without a graph."""

        def mix(old: Leaves, new: Leaves) -> Leaves:
            return tuple(torch.lerp(h, f, self.damping) for h, f in zip(old, new, strict=True))

        head, left = recurrence.split(self.window)
        damped = advance(lambda old: mix(old, recurrence.step(old)), head.state, left - 1)
        # The last step is kept undamped as well: penalties and diagnostics are about the step, whatever the method.
        tail = advance(recurrence.step, damped.state, 1)
        tail.state = mix(tail.previous, tail.last)
        return head.followed_by(replace(tail, steps=left))


@dataclass(frozen=True)
class RBP(GradientMethod):
    """Recurrent back-propagation: the implicit gradient at the steady state; memory O(1) in the number of steps.

    With ``J = ∂f/∂h`` at the last step and ``g = ∂L/∂h_N``, solves ``(I − Jᵀ) u = g`` and sends ``u`` through the last
    step, ``dL/dθ = uᵀ ∂f/∂θ``. Steps before the last have no graph, so no gradient reaches ``h_0``. It is right where
    the state has settled and the step contracts; `crbp.lipschitz_penalty` makes it so (together: C-RBP).

    Args:
        solver: of the backward equation. The default is the published Neumann series, which shows by growing where the
            step does not contract; `crbp.GMRES` comes closer with 8 products than that with 15, keeps more vectors, and
            trained no better (``docs/speed.md``).
        on_divergence: what to do when the solution is not finite or its relative residual exceeds ``max_residual``:
            ``"raise"`` a `crbp.DivergenceError`; ``"warn"`` and use the solution as it is; ``"fallback"`` to the
            solver's best iterate. Every outcome is in ``run.report.backward``.
        max_residual: largest accepted relative residual. At 1, the default, a solution passes unless it is worse than
            no solution at all. A gradient that comes in with a NaN or an infinity is handed on as it is, so that a
            gradient scaler sees it, unless the policy is ``"raise"``.

    Raises:
        ValueError: for an unknown policy or a residual that is not positive.

    Source: Linsley et al., Stable and expressive recurrent vision models, NeurIPS 2020.
    """

    solver: Solver = field(default_factory=Neumann)
    on_divergence: Policy = field(default="warn", kw_only=True)
    max_residual: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise TypeError(f"solver must be a crbp solver such as crbp.Neumann(terms=15), not {self.solver!r}")
        choice("on_divergence", self.on_divergence, get_args(Policy))
        if not self.max_residual > 0:
            raise ValueError(f"max_residual must be above 0, not {self.max_residual!r}")

    def __call__(self, recurrence: Recurrence) -> Rollout:
        """Run all but the last step without a graph and hang the backward solve on the last."""
        # Cut at the start, so that no gradient reaches it where the run has a single step either.
        start = detach(recurrence.start, requires_grad=torch.is_grad_enabled())
        head, left = replace(recurrence, start=start).split(1)
        rolled = head.followed_by(advance(recurrence.step, head.state, left))
        if any(leaf.requires_grad for leaf in rolled.last):
            rolled.state = _ImplicitGradient.apply(self, recurrence.record, len(start), *rolled.last, *rolled.previous)
        return rolled

    def backward(self, last: Leaves, previous: Leaves, gradient: Leaves) -> tuple[Leaves, BackwardReport]:
        """``u`` for the gradient ``g`` with respect to the final state, and how it was found."""
        _, unravel = ravel(last)

        def vjp(vector: Tensor) -> Tensor:
            return ravel(vector_jacobian(last, previous, unravel(vector)))[0]

        found = self.solver.solve(vjp, ravel(gradient)[0])
        solution, report = self._judge(found)
        return unravel(solution), report

    def _judge(self, found: Solution) -> tuple[Tensor, BackwardReport]:
        """Apply the policy to a solution."""
        stop = found.stop
        if stop is not StopReason.NOT_FINITE and found.residual > self.max_residual:
            stop = StopReason.DIVERGED
        failed = stop in (StopReason.DIVERGED, StopReason.NOT_FINITE)
        report = BackwardReport(
            terms=found.terms,
            residual=found.residual,
            stop=stop,
            fell_back=failed and self.on_divergence == "fallback",
        )
        if failed and self.on_divergence != "fallback":
            message = (
                f"the backward solve ended {stop.value} after {found.terms} terms, with a residual of "
                f"{found.residual:.3g} times the gradient (accepted: {self.max_residual:g}): the dynamics do not "
                "contract here; raise the weight of crbp.lipschitz_penalty, lower the learning rate, or choose "
                "on_divergence='fallback'"
            )
            if self.on_divergence == "raise":
                raise DivergenceError(message)
            warnings.warn(message, DivergenceWarning, stacklevel=2)
        return (found.best if report.fell_back else found.solution), report


class _ImplicitGradient(torch.autograd.Function):
    """Identity forward; backward replaces ``g`` by ``u``, which then flows through the last step as usual."""

    @staticmethod
    def forward(
        ctx: Any, method: RBP, record: Callable[[BackwardReport], None], leaves: int, *tensors: Tensor
    ) -> Leaves:
        ctx.method, ctx.record, ctx.leaves = method, record, leaves
        ctx.save_for_backward(*tensors)
        return tuple(tensor.detach() for tensor in tensors[:leaves])

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            # Raised at once: `once_differentiable` would be passed over by `torch.autograd.grad` with named inputs,
            # and the second derivative silently incomplete.
            raise NotImplementedError(
                "a gradient taken by crbp.RBP cannot be differentiated again, which create_graph=True asks for; "
                "use crbp.BPTT or crbp.TruncatedBPTT where second derivatives are needed"
            )
        saved = ctx.saved_tensors
        with torch.enable_grad(), repeated_products():
            solution, report = ctx.method.backward(saved[: ctx.leaves], saved[ctx.leaves :], gradient)
        ctx.record(report)
        return None, None, None, *solution, *(None for _ in solution)
