"""What autograd does not save for a second derivative, since it follows from what it saves anyway."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_engine: Any = torch._C._autograd


class Recomputed(torch.autograd.Function):
    """A function whose outputs follow from the tensors that it saves; see `computed_anew`."""

    @staticmethod
    @abstractmethod
    def outputs(ctx: Any, saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs, from ``ctx.saved_tensors``, without a graph."""


@contextmanager
def computed_anew() -> Iterator[None]:
    """Save no output of a `Recomputed` function, and no view of one, within this context: compute it in the pass.

    A copy of an output, as of another dtype, is saved like all else, which is handed to the hooks on saved tensors that
    are set already. Within the context, as under any such hooks, `torch.func` takes no derivatives.
    """
    if not _engine._saved_tensors_hooks_is_enabled():
        yield
        return
    pack, unpack = _top() or (_pack, _unpack)

    def packed(tensor: Tensor) -> Any:
        return _Output.of(tensor) or pack(tensor)

    def unpacked(kept: Any) -> Tensor:
        found: Tensor = kept.tensor() if isinstance(kept, _Output) else unpack(kept)
        return found

    with torch.autograd.graph.saved_tensors_hooks(packed, unpacked):
        yield


@contextmanager
def without_hooks() -> Iterator[None]:
    """Set no hooks on saved tensors within this context, under which `torch.func` takes no derivatives."""
    hooks = []
    while (pair := _top()) is not None:
        hooks.append(pair)
        _engine._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pair in reversed(hooks):
            _engine._push_saved_tensors_default_hooks(*pair)


def saved_by(ctx: Any) -> tuple[Tensor, ...]:
    """``ctx.saved_tensors`` of a `Recomputed` function in its backward pass, and let go of what was computed anew.

    What has been unpacked in this pass is not unpacked once more, which `torch.utils.checkpoint` does not allow.
    """
    found, ctx.found = getattr(ctx, "found", None), None
    if found is not None and found.task == torch._C._current_graph_task_id():
        return found.saved  # type: ignore[no-any-return]
    return ctx.saved_tensors  # type: ignore[no-any-return]


def _top() -> Any:
    return _engine._top_saved_tensors_default_hooks(True)


def _pack(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor.detach(), tensor._version


def _unpack(kept: tuple[Tensor, int]) -> Tensor:
    tensor, version = kept
    if tensor._version != version:  # which PyTorch asks of what it keeps without hooks
        raise RuntimeError(
            "a tensor needed to differentiate a product with the Jacobian, as penalties do, has been modified in place "
            f"(a parameter by an optimiser's step?): its version is {tensor._version}, not {version}; call backward() "
            "before changing it"
        )
    return tensor


@dataclass(frozen=True)
class _Found:
    """What was computed anew in one pass of the engine."""

    task: int
    saved: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Output:
    """An output of a node, or a view of it, in place of the tensor; its offset is that in the output."""

    node: Any
    place: int
    sizes: Sequence[int]
    strides: Sequence[int]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Output | None:
        """What stands for a tensor, if it is one that can be computed anew."""
        base = tensor._base if tensor._is_view() else tensor
        if base is None or not issubclass(getattr(base.grad_fn, "_forward_cls", object), Recomputed):
            return None
        # Changed in place, as by a hook on it, or seen as another type, it is no longer what the node computes.
        same = base._version == 0 and tensor.dtype == base.dtype and not tensor.is_conj() and not tensor.is_neg()
        if not (same and base.is_contiguous()):
            return None
        offset = int(tensor.storage_offset() - base.storage_offset())
        return cls(base.grad_fn, base.output_nr, tensor.shape, tensor.stride(), offset)

    def tensor(self) -> Tensor:
        node, task = self.node, torch._C._current_graph_task_id()
        found = getattr(node, "found", None)
        if found is None or found.task != task:
            saved = node.saved_tensors
            found = _Found(task, saved, node._forward_cls.outputs(node, saved))
            if task != -1:  # otherwise not in a pass, at whose end it would be let go of
                node.found = found
        whole: Tensor = found.outputs[self.place].contiguous()
        return whole.as_strided(self.sizes, self.strides, whole.storage_offset() + self.offset)
