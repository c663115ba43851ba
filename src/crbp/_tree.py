"""States are pytrees of tensors; inside the library they travel as tuples of leaves."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from crbp.errors import StateError

Leaves = tuple[Tensor, ...]
LeafStep = Callable[[Leaves], Leaves]


def flatten_state(state: Any) -> tuple[Leaves, TreeSpec]:
    """Leaves and structure of a state.

    Raises:
        StateError: if the state is empty or a leaf is not a floating-point tensor.
    """
    leaves, spec = tree_flatten(state)
    if not leaves:
        raise StateError("the state holds no tensor; pass a tensor or a pytree of tensors")
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            raise StateError(
                f"leaf {i} of the state is a {type(leaf).__name__}, not a tensor; let the step close over "
                "whatever does not evolve"
            )
        if not leaf.is_floating_point():
            raise StateError(f"leaf {i} of the state has dtype {leaf.dtype}; a state is made of floating-point tensors")
    return tuple(leaves), spec


def leaf_step(step: Callable[[Any], Any], spec: TreeSpec) -> LeafStep:
    """A step on leaves that checks what the user's step returns.

    Under autocast a step may return a lower precision than it was given: the state keeps its dtype, so that rounding
    does not pile up over the steps.

    Raises:
        StateError: if the step changes the structure, a shape, or (outside autocast) a dtype.
    """

    def apply(leaves: Leaves) -> Leaves:
        returned = step(tree_unflatten(list(leaves), spec))
        new, new_spec = tree_flatten(returned)
        if new_spec != spec:
            raise StateError(f"the step returned the structure {new_spec} for a state of structure {spec}")
        return tuple(_checked(i, old, leaf) for i, (old, leaf) in enumerate(zip(leaves, new, strict=True)))

    return apply


def _checked(index: int, old: Tensor, new: Any) -> Tensor:
    if not isinstance(new, Tensor):
        raise StateError(f"the step returned a {type(new).__name__} for leaf {index} of the state, not a tensor")
    if new.shape != old.shape:
        raise StateError(
            f"the step turned leaf {index} of the state from shape {tuple(old.shape)} into {tuple(new.shape)}; "
            "a step maps a state to a state of the same shape (check padding and batch size)"
        )
    if new.dtype != old.dtype and not torch.is_autocast_enabled(old.device.type):
        raise StateError(
            f"the step turned leaf {index} of the state from {old.dtype} into {new.dtype}; "
            "start from a state of the dtype that the step computes in"
        )
    kept: Tensor = new.to(old.dtype)
    return kept


def detach(leaves: Leaves, *, requires_grad: bool = False) -> Leaves:
    """The same values, cut from their graph."""
    return tuple(leaf.detach().requires_grad_(requires_grad) for leaf in leaves)


def separate(leaves: Leaves) -> Leaves:
    """The same values on the same graph, each behind a view of its own.

    A derivative with respect to one of them then holds the others, even where the graph leads from one to another (the
    output of an LSTM is made of its memory).
    """
    return tuple(leaf.view_as(leaf) for leaf in leaves) if torch.is_grad_enabled() and len(leaves) > 1 else leaves


def norm(leaves: Leaves) -> Tensor:
    """Euclidean norm over all leaves together, accumulated in at least float32."""
    squares = [
        torch.linalg.vector_norm(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32)).square() for leaf in leaves
    ]
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()


def relative_residual(previous: Leaves, state: Leaves) -> Tensor:
    """``‖h_t − h_{t−1}‖ / ‖h_t‖`` over all leaves together; 0 where nothing moved."""
    with torch.no_grad():
        moved = norm(tuple(new - old for old, new in zip(previous, state, strict=True)))
        scale = norm(state)
        # A state that has just become zero moved by all it was.
        scale = torch.where(scale > 0, scale, moved)
        return torch.where(moved == 0, moved, moved / scale)


def vector_jacobian(outputs: Leaves, inputs: Leaves, vector: Leaves, *, create_graph: bool = False) -> Leaves:
    """``Jᵀ v`` of the step whose graph leads from ``inputs`` to ``outputs``; the graph is kept."""
    live = [(out, v) for out, v in zip(outputs, vector, strict=True) if out.requires_grad]
    if not live:
        return tuple(torch.zeros_like(leaf) for leaf in inputs)
    return torch.autograd.grad(
        [out for out, _ in live],
        inputs,
        [v for _, v in live],
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )


def ravel(leaves: Leaves) -> tuple[Tensor, Callable[[Tensor], Leaves]]:
    """One tensor for all leaves, and the way back. A single leaf is passed through without a copy."""
    if len(leaves) == 1:
        return leaves[0], lambda tensor: (tensor,)
    shapes = [leaf.shape for leaf in leaves]
    dtypes = [leaf.dtype for leaf in leaves]
    sizes = [leaf.numel() for leaf in leaves]

    def unravel(flat: Tensor) -> Leaves:
        parts = torch.split(flat, sizes)
        return tuple(p.view(s).to(d) for p, s, d in zip(parts, shapes, dtypes, strict=True))

    return torch.cat([leaf.reshape(-1) for leaf in leaves]), unravel


@cache
def differentiates_in_inference_mode() -> bool:
    """Whether `torch.func.vjp` does: the products of PyTorch 2.11 are zero there, without a word."""
    with torch.inference_mode():
        two = torch.full((1,), 2.0)
        pull: Callable[[Tensor], Leaves] = torch.func.vjp(lambda one: one * two, torch.ones(1))[1]
        return float(pull(torch.ones(1))[0]) == 2.0
