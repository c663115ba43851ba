"""What PyTorch is after: the autograd engine while it runs, and whoever calls an operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def wanted(ctx: Any, arguments: int, *, first: int = 0) -> tuple[bool, ...]:
    """For each tensor a `torch.autograd.Function` was given, whether this backward pass needs its gradient.

    The tensors are ``arguments`` in number, the first of them argument ``first``.

    ``ctx.needs_input_grad`` says what could be asked for. A vector-Jacobian product for the state alone must not pay
    for the weights too, and which nodes the pass goes on to only the engine knows.
    """
    # The engine's list has the tensors alone.
    pairs = zip(ctx.needs_input_grad[first : first + arguments], ctx.next_functions[:arguments], strict=True)
    return tuple(needed and _executes(node) for needed, (node, _) in pairs)


def _executes(node: Any) -> bool:
    """Whether the running pass goes on to a node; True where the engine does not say."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except (AttributeError, RuntimeError, TypeError):
        return True  # a leaf in `torch.autograd.grad`, or no pass of the engine at all


def is_ordinary(x: Tensor) -> bool:
    """Whether a tensor on a CPU is computed with as usual: no compiler, transform or change of precision is at work.

    Those are `torch.compile`, `torch.jit.trace`, the transforms of `torch.func`, forward differentiation and autocast.
    """
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    return torch._C._functorch.peek_interpreter_stack() is None and torch.autograd.forward_ad._current_level < 0
