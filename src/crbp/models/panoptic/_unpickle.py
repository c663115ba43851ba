"""Files of weights, read without running what is in them."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crbp._torch_file import load_plain
from crbp.errors import CrbpError
from crbp.models.panoptic._pickled_arrays import PickledArray, PickledType, from_buffer, reconstruct, scalar


def _latin1(text: str, encoding: str) -> bytes:
    """How bytes are written by protocol 2; other encodings could blow them up without end."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}")
    return text.encode(encoding)


_CORES = ("core", "_core")  # what NumPy calls it before and since 2.0
_ARRAYS: dict[tuple[str, str], Any] = {
    **{(f"numpy.{core}.numeric", "_frombuffer"): from_buffer for core in _CORES},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): reconstruct for core in _CORES},
    **{(f"numpy.{core}.multiarray", "scalar"): scalar for core in _CORES},
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): PickledType,
}
_ADMITTED = _ARRAYS | {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _latin1,
    ("__builtin__", "bytes"): lambda: b"",  # which protocol 2 writes as a call
}
_FILLED = (PickledArray, PickledType, OrderedDict)  # what a pickle may give a state


class CheckpointError(CrbpError, ValueError):
    """A file of weights cannot be read, or does not fit the model."""


_Unpickler: Any = pickle._Unpickler


class _ArraysOnly(_Unpickler):
    """Makes arrays of numbers and plain containers, and refuses to look up anything else.

    In Python, since the compiled class takes 32 GiB where ten bytes name a large place of its memory.
    """

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array or container") from None

    def _load_build(self) -> None:
        if type(self.stack[-2]) not in _FILLED:
            raise pickle.UnpicklingError(f"it changes a {type(self.stack[-2]).__name__}")
        super().load_build()

    def _load_bytearray8(self) -> None:
        # Python's own makes room for as many bytes as it is told before it reads any.
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch = {  # noqa: RUF012
        **_Unpickler.dispatch,
        pickle.BUILD[0]: _load_build,
        pickle.BYTEARRAY8[0]: _load_bytearray8,
    }


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What is in a `.pkl` file of arrays, or in a `.pth` file of tensors.

    Raises:
        CheckpointError: if it does not exist, cannot be read or holds other objects than arrays and containers.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        if path.suffix == ".pkl":
            with path.open("rb") as file:
                found = _ArraysOnly(file, encoding="latin1").load()
        else:
            # Schedulers and optimisers of older checkpoints hold numbers of numpy.
            numbers = tuple((made, f"{module}.{name}") for (module, name), made in _ARRAYS.items())
            found = load_plain(path, admitted=numbers)
    except Exception as error:  # a broken file is a program that fails in any way
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read: {reason}; only tensors, arrays and containers are") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not a table of tensors by name")
    return found


def tensors(found: Mapping[str, Any]) -> dict[str, Tensor]:
    """The table of tensors in a checkpoint, whether it is all there is or stands under a name beside other things.

    Raises:
        CheckpointError: naming what is no tensor.
    """
    for key in ("model", "state_dict", "blobs"):
        if isinstance(found.get(key), Mapping):
            found = found[key]
            break
    table, others = {}, []
    for name, value in found.items():
        if not isinstance(name, str):
            raise CheckpointError(f"the weights have the name {name!r}, which is no text")
        if isinstance(value, Tensor):
            table[name] = value
            continue
        array = value.values if isinstance(value, PickledArray) else value
        if isinstance(array, np.ndarray | np.generic) and array.dtype.kind in "fiub":
            table[name] = torch.from_numpy(np.array(array))
        elif not isinstance(value, str):
            others.append(f"{name} ({type(value).__name__})")
    if others:
        raise CheckpointError(f"the weights hold what is no array of numbers: {', '.join(others)}")
    return {name.removeprefix("module."): value for name, value in table.items()}
