"""What tells whether a recurrent model is stable and what it costs: residuals, spectral radius, activation memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crbp._checks import count, non_negative
from crbp._tree import Leaves, flatten_state, leaf_step, relative_residual
from crbp.evolve import Run
from crbp.ops import repeated_products
from crbp.ops._kept import watched


def residual_curve(step: Callable[[Any], Any], state: Any, *, steps: int) -> Tensor:
    """Relative residual ``‖h_t − h_{t−1}‖ / ‖h_t‖`` of each step ``t = 1 … steps``, without a graph.

    Args:
        step: maps a state to the next one.
        state: the start, a tensor or a pytree of tensors.
        steps: how far to run.

    Returns:
        Tensor ``(steps,)``: falling towards 0 where the dynamics settle, level where they cycle.

    Raises:
        ValueError: if ``steps`` is below 1.
    """
    count("steps", steps)
    leaves, spec = flatten_state(state)
    on_leaves = leaf_step(step, spec)
    curve = []
    with torch.no_grad():
        for _ in range(steps):
            new = on_leaves(leaves)
            curve.append(relative_residual(leaves, new))
            leaves = new
    return torch.stack(curve)


@dataclass(frozen=True, kw_only=True)
class SpectralRadius:
    """An estimate of ``ρ(J)``.

    Attributes:
        radius: ``(B,)`` where estimated image by image, else a scalar.
        converged: of the same shape; False marks an estimate to distrust.
        change: relative change of the estimate in the last iteration, of the same shape.
        iterations: vector-Jacobian products spent.
    """

    radius: Tensor
    converged: Tensor
    change: Tensor
    iterations: int


@repeated_products()
def spectral_radius(
    run: Run,
    *,
    per_sample: bool = False,
    iterations: int = 100,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
) -> SpectralRadius:
    """Spectral radius ``ρ(J)`` of the step at the final state of a run, by power iteration.

    ``v ← Jᵀ v / ‖Jᵀ v‖``; the radius is the largest Ritz value on two successive vectors, so that a dominant complex
    pair, on which the plain ratio of norms never settles, is found as well. Below 1 the final state is stable: small
    perturbations die out.

    Args:
        run: what `crbp.Evolve` returned; works under ``no_grad`` and after ``backward()`` too.
        per_sample: one radius for each index of the first dimension; right where a step does not couple them.
        iterations: the most vector-Jacobian products, at least 2.
        tolerance: relative change below which an estimate has converged (three times in a row).
        generator: of the random start, on the device of the state; None draws from torch's own.

    Raises:
        ValueError: for values out of range.
    """
    count("iterations", iterations, at_least=2)
    non_negative("tolerance", tolerance)
    state, vjp = run.linearized(at_end=True)
    rows = state[0].shape[0] if per_sample else 1
    draw = [torch.randn(leaf.shape, dtype=leaf.dtype, device=leaf.device, generator=generator) for leaf in state]
    old = _unit(_to_rows(tuple(draw), rows))
    new, calm, taken = _apply(vjp, state, old), old.new_zeros(rows), 1
    radius = change = old.new_full((rows,), torch.inf)
    while taken < iterations and bool((calm < 3).any()):
        scale = _safe(new.norm(dim=1))
        newest = _apply(vjp, state, new / scale[:, None])
        estimate = _largest_ritz_value(old, new, newest * scale[:, None])
        change = torch.where(estimate == radius, 0.0, (estimate - radius).abs() / _safe(estimate))
        calm = torch.where(change <= tolerance, calm + 1, 0)
        radius, taken = estimate, taken + 1
        old, new = new / scale[:, None], newest
    converged = calm >= 3
    if not per_sample:
        radius, converged, change = radius[0], converged[0], change[0]
    return SpectralRadius(radius=radius, converged=converged, change=change, iterations=taken)


def _to_rows(leaves: Leaves, rows: int) -> Tensor:
    return torch.cat([leaf.reshape(rows, -1) for leaf in leaves], dim=1)


def _safe(norms: Tensor) -> Tensor:
    return torch.where(norms > 0, norms, 1.0)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / _safe(vectors.norm(dim=1))[:, None]


def _apply(vjp: Callable[[Leaves], Leaves], state: Leaves, rows: Tensor) -> Tensor:
    """``Jᵀ`` on every row of ``(rows, units)``."""
    sizes = [leaf.numel() // len(rows) for leaf in state]
    parts = torch.split(rows, sizes, dim=1)
    vector = tuple(part.reshape(leaf.shape).to(leaf.dtype) for part, leaf in zip(parts, state, strict=True))
    return _to_rows(vjp(vector), len(rows)).detach()


def _largest_ritz_value(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """Largest ``|eigenvalue|`` of ``A`` restricted to ``span{v, Av}``, given unit ``v``, ``Av`` and ``A²v`` in rows."""
    a = (first * second).sum(1)
    rest = second - a[:, None] * first
    length = rest.norm(dim=1)
    # Where Av is parallel to v to rounding, v is an eigenvector and a its eigenvalue.
    parallel = length <= second.norm(dim=1) * 1e-4
    other = rest / _safe(length)[:, None]
    image = (third - a[:, None] * second) / _safe(length)[:, None]
    b, c, d = (first * image).sum(1), length, (other * image).sum(1)
    half_trace, determinant = (a + d) / 2, a * d - b * c
    root = half_trace.square() - determinant
    real = half_trace.abs() + root.clamp_min(0).sqrt()
    complex_pair = determinant.clamp_min(0).sqrt()
    return torch.where(parallel, a.abs(), torch.where(root >= 0, real, complex_pair))


@dataclass(kw_only=True)
class ActivationMemory:
    """Bytes that autograd saved; see `activation_memory`."""

    bytes: int = 0


@contextmanager
def activation_memory(*, exclude: Iterable[Tensor] = ()) -> Iterator[ActivationMemory]:
    """Measure the bytes that autograd saves for the backward pass inside the block, on any device.

    Exact and repeatable, since it counts saved tensors rather than the allocator: each storage once, and none of
    ``exclude``. The storages are kept until the block ends, so nothing that is freed meanwhile is missed. What
    `crbp.ops.conv2d` computes of kernels and keeps with the graph is counted when the block ends. What the backward
    pass needs while it runs is not in it.

    ```python
    with crbp.activation_memory(exclude=cell.parameters()) as memory:
        run = evolve(lambda h: cell(h, drive), h0)
    memory.bytes
    ```

    Args:
        exclude: tensors that would be there anyway, such as parameters and inputs.
    """
    memory = ActivationMemory()
    known = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in exclude}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known[storage.data_ptr()] = storage
            memory.bytes += storage.nbytes()
        # The tensor itself would hold the graph that holds it, which nothing but a backward pass then frees.
        return tensor.detach()

    with watched() as kept, torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        yield memory
        memory.bytes += sum(tensor.nbytes for reference in kept if (tensor := reference()) is not None)
