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

_reconstruct: Any = np.empty(0).__reduce__()[0]
_scalar: Any = np.float64(0).__reduce__()[0]
_NUMPY = {"_reconstruct": _reconstruct, "scalar": _scalar}


def _latin1(text: str, encoding: str) -> bytes:
    """How bytes are written by protocol 2; other encodings could blow them up without end."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}")
    return text.encode(encoding)


_frombuffer: Any = np.empty(0).__reduce_ex__(5)[0]
_ADMITTED: dict[tuple[str, str], Any] = {
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", name): made for core in ("core", "_core") for name, made in _NUMPY.items()},
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _latin1,
}
# For `torch.load`: what is admitted above, and the kinds of numbers.
_NUMBERS: tuple[Any, ...] = (
    *((made, f"{module}.{name}") for (module, name), made in _ADMITTED.items() if module.startswith("numpy.")),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "b1")},
)


class CheckpointError(CrbpError, ValueError):
    """A file of weights cannot be read, or does not fit the model."""


class _ArraysOnly(pickle._Unpickler):
    """Makes arrays of numbers and plain containers, and refuses to look up anything else.

    In Python, since the compiled class takes 32 GiB where ten bytes name a large place of its memory.
    """

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array or container") from None


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
            found = load_plain(path, admitted=_NUMBERS)
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
        if isinstance(value, Tensor):
            table[name] = value
        elif isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "fiub":
            table[name] = torch.from_numpy(np.array(value))
        elif not isinstance(value, str):
            others.append(f"{name} ({type(value).__name__})")
    if others:
        raise CheckpointError(f"the weights hold what is no array of numbers: {', '.join(others)}")
    return {name.removeprefix("module."): value for name, value in table.items()}
