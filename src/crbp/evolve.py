"""Run a step function and report what happened: the entry point of the library."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_unflatten

from crbp._checks import choice, count, non_negative
from crbp._tree import (
    LeafStep,
    Leaves,
    differentiates_in_inference_mode,
    flatten_state,
    leaf_step,
    norm,
    relative_residual,
    vector_jacobian,
)
from crbp.errors import DivergenceError, DivergenceWarning, SettingsError
from crbp.gradients import BPTT, BackwardReport, GradientMethod, Recurrence
from crbp.ops import shared_spectra
from crbp.ops._anew import computed_anew
from crbp.ops.fused import fused_calls
from crbp.solvers import StopReason


@dataclass(kw_only=True)
class Report:
    """What one run did.

    Attributes:
        steps: steps taken.
        residual: relative residual of the last step, ``‖h_N − h_{N−1}‖ / ‖h_N‖`` over the whole state, with
            ``h_N = f(h_{N−1})`` (undamped under `crbp.Phantom` too).
        stop: why the run ended.
        backward: how the backward equation was solved; None before ``backward()`` and for methods without one.
    """

    steps: int
    residual: float
    stop: StopReason
    backward: BackwardReport | None = None


@dataclass(kw_only=True)
class Run:
    """The outcome of `Evolve`.

    Attributes:
        state: the final state, of the structure of the first; differentiable by the method chosen.
        report: what happened, forward and (once it has run) backward.
    """

    state: Any
    report: Report
    _step: LeafStep = field(repr=False)
    _previous: Leaves = field(repr=False)
    _last: Leaves = field(repr=False)
    _fused: bool = field(default=False, repr=False)

    def last_step(self) -> tuple[Leaves, Leaves]:
        """The leaves of the state before the last step and after it; the latter on the graph of that step, if any.

        Where the gradient method puts something else in the place of that graph, as `crbp.RBP` does, `state` has it and
        this has not.
        """
        return self._previous, self._last

    def linearized(self, *, at_end: bool = False) -> tuple[Leaves, Callable[[Leaves], Leaves]]:
        """The leaves at which one step is linearised, and the map ``v ↦ Jᵀ v`` there.

        The last step, on the graph that the run has built where there is one; or the step from the final state on
        (``at_end``), of which no gradient is recorded. Products taken under ``torch.no_grad`` record none either.

        Raises:
            SettingsError: under ``torch.inference_mode``, with a PyTorch whose functional transforms do not work there.
        """
        start = flatten_state(self.state)[0] if at_end else self._previous
        if torch.is_inference_mode_enabled():
            # Autograd records nothing here; a functional transform does.
            if not differentiates_in_inference_mode():
                raise SettingsError(
                    f"PyTorch {torch.__version__} takes no derivatives under torch.inference_mode; use torch.no_grad, "
                    "or a newer PyTorch"
                )
            pull = torch.func.vjp(lambda *leaves: self._step(leaves), *start)[1]
            return start, lambda vector: tuple(pull(vector))
        live = torch.is_grad_enabled() and not at_end
        if live and all(leaf.requires_grad for leaf in start) and any(leaf.grad_fn is not None for leaf in self._last):
            outputs = self._last
        else:
            # Leaves that carry a graph keep it, so that the gradient of a penalty flows on through the steps before.
            start = tuple(leaf if live and leaf.requires_grad else leaf.detach().requires_grad_() for leaf in start)
            with torch.enable_grad():
                outputs = self._step(start)

        def product(vector: Leaves) -> Leaves:
            recorded = live and torch.is_grad_enabled()
            with computed_anew() if recorded and self._fused else nullcontext():
                return vector_jacobian(outputs, start, vector, create_graph=recorded)

        return start, product


@dataclass(frozen=True, kw_only=True)
class Evolve:
    """Apply a step function ``N`` times, ``h_{t+1} = f(h_t)``, and differentiate the result by the method given.

    ```python
    evolve = crbp.Evolve(steps=20, gradient=crbp.RBP(crbp.Neumann(terms=15)))
    run = evolve(lambda h: cell(h, drive), h0)
    ```
    The gradient reaches whatever the step closes over. The state is a tensor or any pytree of floating-point tensors.

    Args:
        steps: the number of steps ``N``, at least 1.
        gradient: how the run is differentiated.
        tolerance: stop before ``N`` once the relative residual ``‖h_t − h_{t−1}‖ / ‖h_t‖`` of the whole state is at
            most this; None runs all steps. Each test waits for the device.
        on_divergence: what to do when the final state is not finite: ``"raise"`` a `crbp.DivergenceError` that names
            the step, or ``"warn"`` and go on.

    Raises:
        ValueError: for values out of range.

    Source: Linsley et al., Stable and expressive recurrent vision models, NeurIPS 2020.
    """

    steps: int
    gradient: GradientMethod = field(default_factory=BPTT)
    tolerance: float | None = None
    on_divergence: Literal["raise", "warn"] = "raise"

    def __post_init__(self) -> None:
        count("steps", self.steps)
        if not isinstance(self.gradient, GradientMethod):
            raise TypeError(f"gradient must be a gradient method such as crbp.BPTT(), not {self.gradient!r}")
        if self.tolerance is not None:
            non_negative("tolerance", self.tolerance)
        choice("on_divergence", self.on_divergence, ("raise", "warn"))

    def __call__(self, step: Callable[[Any], Any], state: Any) -> Run:
        """Run ``step`` from ``state``.

        Args:
            step: maps a state to the next one of the same structure, shapes and dtypes.
            state: where to start.

        Raises:
            StateError: if the state is no pytree of floating-point tensors or the step changes its form.
            DivergenceError: if the final state is not finite and ``on_divergence`` is ``"raise"``.
        """
        start, spec = flatten_state(state)
        on_leaves = leaf_step(step, spec)
        report = Report(steps=0, residual=0.0, stop=StopReason.BUDGET)

        def record(backward: BackwardReport) -> None:
            report.backward = backward

        before = fused_calls()
        with shared_spectra():
            rolled = self.gradient(
                Recurrence(step=on_leaves, start=start, steps=self.steps, tolerance=self.tolerance, record=record)
            )
        report.steps, report.stop = rolled.steps, rolled.stop
        report.residual = float(relative_residual(rolled.previous, rolled.last))
        if not math.isfinite(report.residual):
            report.stop = StopReason.NOT_FINITE
            self._diverged(on_leaves, start, rolled.steps)
        return Run(
            state=tree_unflatten(list(rolled.state), spec),
            report=report,
            _step=on_leaves,
            _previous=rolled.previous,
            _last=rolled.last,
            _fused=fused_calls() > before,
        )

    def _diverged(self, step: LeafStep, start: Leaves, steps: int) -> None:
        """Apply the policy to a final state that is not finite, naming the step at which that began."""
        with torch.no_grad():
            state, first = start, 0
            while first < steps and math.isfinite(float(norm(state))):
                state = step(state)
                first += 1
        message = (
            f"the state is not finite from step {first} of {steps} on: "
            + (
                "the start holds a NaN or an infinity"
                if first == 0
                else "the dynamics do not contract, or an input is not finite"
            )
            + "; check drive and weights, lower the learning rate or raise the weight of crbp.lipschitz_penalty"
        )
        if self.on_divergence == "raise":
            raise DivergenceError(message)
        warnings.warn(message, DivergenceWarning, stacklevel=3)
