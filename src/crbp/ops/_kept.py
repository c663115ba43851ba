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
        if what not in self._found:
            self._found[what] = make()
            for seen in _watching.lists:
                seen.append(ref(self._found[what]))
        return self._found[what]


@dataclass
class _Watching(threading.local):
    lists: list[list[ref[Tensor]]] = field(default_factory=list)


_watching = _Watching()


@contextmanager
def watched() -> Iterator[list[ref[Tensor]]]:
    """What is kept from now on, by this thread, in the block."""
    seen: list[ref[Tensor]] = []
    _watching.lists.append(seen)
    try:
        yield seen
    finally:
        _watching.lists.remove(seen)
