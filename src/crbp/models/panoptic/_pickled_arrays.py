"""Arrays of a pickle, put together here: NumPy's own `__setstate__` believes what it is told, and crashes on lies."""

from __future__ import annotations

import re
from pickle import UnpicklingError
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NUMBERS = re.compile(r"[<>|=]?(b1|[biuf][1248])")
_PLAIN = (None, None, None, -1, -1, 0)  # of a dtype without fields, shape or metadata


class PickledType:
    """What a pickle has in the place of `numpy.dtype`: a kind of number, then its byte order."""

    def __init__(self, name: object, align: object = False, copy: object = False) -> None:
        if not isinstance(name, str) or not _NUMBERS.fullmatch(name):
            raise UnpicklingError(f"it holds an array of {name!r}, which are no numbers")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: object) -> None:
        if (
            not isinstance(state, tuple)
            or len(state) < 8
            or state[1] not in ("<", ">", "|", "=")
            or state[2:8] != _PLAIN
        ):
            raise UnpicklingError("it holds an array of something else than numbers")
        self.dtype = self.dtype.newbyteorder(state[1])


class PickledArray:
    """What a pickle has in the place of `numpy.ndarray`.

    Attributes:
        values: the array; None until the pickle has told what is in it.
    """

    def __init__(self, values: NDArray[Any] | None = None) -> None:
        self.values = values

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise UnpicklingError("it holds an array without shape or numbers")
        _, shape, kind, columns_first, data = state
        self.values = _values(data, kind, shape, "F" if columns_first else "C")


def reconstruct(subtype: object, shape: object, code: object) -> PickledArray:
    """In the place of NumPy's function of this name: an array still to be filled."""
    return PickledArray()


def from_buffer(data: object, kind: object, shape: object, order: object, axes: object = None) -> PickledArray:
    """In the place of NumPy's ``_frombuffer``, which newer protocols use."""
    if order not in ("C", "F") or axes is not None:
        raise UnpicklingError(f"it holds an array in the order {order!r}")
    return PickledArray(_values(data, kind, shape, str(order)))


def scalar(kind: object, data: object) -> PickledArray:
    """In the place of NumPy's function of this name: one number, as an array without dimensions."""
    return PickledArray(_values(data, kind, (), "C"))


def _values(data: object, kind: object, shape: object, order: str) -> NDArray[Any]:
    if isinstance(data, str):
        data = data.encode("latin1")  # as Python 2 wrote bytes
    if not isinstance(kind, PickledType) or not isinstance(data, bytes | bytearray):
        raise UnpicklingError("it holds an array of something else than numbers")
    if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
        raise UnpicklingError(f"it holds an array of shape {shape!r}")
    native = kind.dtype.newbyteorder("=")
    values: NDArray[Any] = np.frombuffer(data, kind.dtype).astype(native)
    return values.reshape(shape, order="F" if order == "F" else "C")
