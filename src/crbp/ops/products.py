"""Products of complex matrices, one for each frequency of a transform: natively, or by PyTorch's matrix products.

An image's transform ``x̂`` is ``(B, C, F)``, as it leaves the FFT; the spectrum of a kernel is in the layout of whoever
computes with it, and known by that name alone: `pack` makes it from ``(O, C, F)``, `unpack` gives that back, both
conjugated.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("products.cpp")


class MatrixProducts:
    """By `torch.bmm` on spectra ``(F, C, O)``: for any device and size, at two copies more."""

    def pack(self, spectrum: Tensor) -> Tensor:
        """``(O, C, F)``, conjugated, to ``(F, C, O)``."""
        return _laid_out(spectrum.permute(2, 1, 0).conj())

    def unpack(self, packed: Tensor, frequencies: int) -> Tensor:
        """Back to ``(O, C, F)``."""
        return _laid_out(packed.permute(2, 1, 0).conj())

    def correlate(self, image: Tensor, packed: Tensor) -> Tensor:
        """``Σ_c x̂[b, c] S[c, o]``: ``(B, O, F)``."""
        return _laid_out(torch.bmm(_laid_out(image.permute(2, 0, 1)), packed).permute(1, 2, 0))

    def convolve(self, image: Tensor, packed: Tensor) -> Tensor:
        """``Σ_o ŷ[b, o] conj S[c, o]``: ``(B, C, F)``."""
        product = torch.bmm(_laid_out(image.permute(2, 0, 1).conj()), packed.mT)
        return _laid_out(product.permute(1, 2, 0).conj())

    def cross(self, image: Tensor, result: Tensor) -> Tensor:
        """``Σ_b conj(x̂[b, c]) ŷ[b, o]``, in the layout of a spectrum."""
        left, right = image.permute(2, 1, 0).conj(), result.permute(2, 0, 1)
        return torch.bmm(_laid_out(left), _laid_out(right))


def _laid_out(spectrum: Tensor) -> Tensor:
    """The same in its own order in memory: products and transforms of views, or of conjugates, copy them one by one."""
    laid = torch.empty(spectrum.shape, dtype=spectrum.dtype, device=spectrum.device)
    return laid.copy_(spectrum)


class NativeProducts:
    """By `products.cpp`, compiled on this machine: spectra are read once, in the order of the transform."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.vector_bytes.restype = ctypes.c_int64
        self._bytes: int = library.vector_bytes()

    def pack(self, spectrum: Tensor) -> Tensor:
        """``(O, C, F)``, conjugated, to blocks of W frequencies ``(F / W, C, O, 2, W)``, real."""
        outputs, inputs, frequencies = spectrum.shape
        real = _REAL[spectrum.dtype]
        width = self._bytes // real.itemsize
        packed = torch.empty(-(-frequencies // width), inputs, outputs, 2, width, dtype=real)
        self._call("pack", real, spectrum.contiguous(), packed, inputs, outputs, frequencies)
        return packed

    def unpack(self, packed: Tensor, frequencies: int) -> Tensor:
        """Back to ``(O, C, F)``."""
        inputs, outputs = packed.shape[1:3]
        spectrum = torch.empty(outputs, inputs, frequencies, dtype=packed.dtype.to_complex())
        self._call("unpack", packed.dtype, packed.contiguous(), spectrum, inputs, outputs, frequencies)
        return spectrum

    def correlate(self, image: Tensor, packed: Tensor) -> Tensor:
        """``Σ_c x̂[b, c] S[c, o]``: ``(B, O, F)``."""
        return self._apply("correlate", image, packed, channels=packed.shape[2])

    def convolve(self, image: Tensor, packed: Tensor) -> Tensor:
        """``Σ_o ŷ[b, o] conj S[c, o]``: ``(B, C, F)``."""
        return self._apply("convolve", image, packed, channels=packed.shape[1])

    def cross(self, image: Tensor, result: Tensor) -> Tensor:
        """``Σ_b conj(x̂[b, c]) ŷ[b, o]``, in the layout of a spectrum."""
        (images, inputs, frequencies), outputs = image.shape, result.shape[1]
        real = _REAL[image.dtype]
        width = self._bytes // real.itemsize
        packed = torch.empty(-(-frequencies // width), inputs, outputs, 2, width, dtype=real)
        tensors = image.contiguous(), result.contiguous(), packed
        self._call("cross", real, *tensors, images, inputs, outputs, frequencies)
        return packed

    def _apply(self, name: str, image: Tensor, packed: Tensor, *, channels: int) -> Tensor:
        images, _, frequencies = image.shape
        inputs, outputs = packed.shape[1:3]
        result = torch.empty(images, channels, frequencies, dtype=image.dtype)
        tensors = image.contiguous(), packed.contiguous(), result
        self._call(name, packed.dtype, *tensors, images, inputs, outputs, frequencies)
        return result

    def _call(self, name: str, dtype: torch.dtype, *arguments: Tensor | int) -> None:
        function = getattr(self._library, f"{name}_{str(dtype).removeprefix('torch.')}")
        passed: list[Any] = [
            ctypes.c_void_p(each.data_ptr()) if isinstance(each, Tensor) else ctypes.c_int64(each) for each in arguments
        ]
        function(*passed, ctypes.c_int(torch.get_num_threads()))


Products = MatrixProducts | NativeProducts
_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}
# Above this, the matrices of a block of frequencies leave the cache of a core, and a library's blocking is better.
_MOST_NATIVE = 64 * 64


def native_suits(device: torch.device, inputs: int, outputs: int) -> bool:
    """Whether the native products are to be taken: on a CPU, for up to 4 096 pairs of channels, with a compiler."""
    return device.type == "cpu" and inputs * outputs <= _MOST_NATIVE and _native() is not None


def products(*, native: bool) -> Products:
    """The products of the kind asked for."""
    if not native:
        return _matrix
    found = _native()
    assert found is not None
    return found


_matrix = MatrixProducts()


@cache
def _native() -> NativeProducts | None:
    try:
        return NativeProducts(ctypes.CDLL(str(_build())))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        warnings.warn(
            f"convolutions by FFT use PyTorch's matrix products, which is slower: {detail.strip().splitlines()[0]}; a "
            "C++ compiler named c++ or by the variable CXX is needed for the native ones",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _build() -> Path:
    """The compiled library, from the cache, or compiled into it: a second or two, once for a machine."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler")
    failure: Exception | None = None
    for target in (["-march=native", "-fopenmp"], ["-march=native"], []):
        flags = ["-O3", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC", *target]
        try:
            return _compiled([*compiler.split(), *flags])
        except subprocess.CalledProcessError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _compiled(command: list[str]) -> Path:
    # What the compiler predefines tells its version and the instructions of this processor, which share a home on a
    # cluster with others.
    defined = _run([*command, "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256("\n".join((*command, defined, SOURCE.read_text(encoding="utf-8"))).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crbp"
    library = folder / f"products-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            new = Path(scratch) / library.name
            _run([*command, str(SOURCE), "-o", str(new)])
            new.replace(library)
    return library


def _run(command: list[str]) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    if done.stderr:
        print(done.stderr, file=sys.stderr)
    return done.stdout
