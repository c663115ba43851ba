"""What is computed of a kernel and kept for later uses of it, beside what autograd saves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import ref

from torch import Tensor


class Kept:
    """Tensors without a graph, each computed when first asked for, for as long as a run or a graph has them."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Tensor] = {}

    def get(self, what: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of this name, made if need be."""
        found = self._found.get(what)
        if found is None:
            self._found[what] = found = make()
            for seen in _thread.watching:
                seen.append(ref(found))
            if _thread.passing is not None:
                _thread.passing.append((self, what))
        return found

    def forget(self, what: Hashable) -> None:
        """Let go of a tensor, which is made again when it is asked for again."""
        self._found.pop(what, None)


@dataclass
class _Thread(threading.local):
    watching: list[list[ref[Tensor]]] = field(default_factory=list)
    passing: list[tuple[Kept, Hashable]] | None = None


_thread = _Thread()


@contextmanager
def watched() -> Iterator[list[ref[Tensor]]]:
    """What is made in the block."""
    seen: list[ref[Tensor]] = []
    _thread.watching.append(seen)
    try:
        yield seen
    finally:
        _thread.watching.pop()


@contextmanager
def passing() -> Iterator[None]:
    """Let go, when the outermost such block ends, of what was made in it.

    Penalties need the adjoint of a spectrum for their values, and then not before the backward pass: a graph that waits
    for that need not hold it. To make it once more takes up to a few percent of a training step.
    """
    if _thread.passing is not None:
        yield
        return
    made: list[tuple[Kept, Hashable]] = []
    _thread.passing = made
    try:
        yield
    finally:
        _thread.passing = None
        for kept, what in made:
            kept.forget(what)
