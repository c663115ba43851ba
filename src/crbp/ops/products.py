"""Convolution of images whose rows have been transformed with spectra of kernels: natively, or by PyTorch.

An image comes as ``(B, C, H, Q)``, its ``H`` rows transformed to ``Q`` frequencies each, and leaves so; between lie
the transforms of the columns to ``R`` frequencies and back, and one product of complex matrices for each frequency. The
spectrum of a kernel is in the layout of whoever computes with it: `pack` makes it from ``(O, C, R, Q)``, `unpack` gives
that back, both conjugated.
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
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("products.cpp")


class MatrixProducts:
    """By `torch.fft` and `torch.bmm` on spectra ``(R Q, C, O)``: for any device and size, with more copies."""

    def pack(self, spectrum: Tensor) -> Tensor:
        """``(O, C, R, Q)``, conjugated, to ``(R Q, C, O)``."""
        return _laid_out(spectrum.flatten(2).permute(2, 1, 0).conj())

    def unpack(self, packed: Tensor, rows: int, columns: int) -> Tensor:
        """Back to ``(O, C, R, Q)``."""
        spectrum = _laid_out(packed.permute(2, 1, 0).conj())
        return spectrum.view(*spectrum.shape[:2], rows, columns)

    def correlate(self, image: Tensor, packed: Tensor, rows: int) -> Tensor:
        """``Σ_c x̂[b, c] S[c, o]``: ``(B, O, H, Q)``."""
        product = torch.bmm(_laid_out(self._columns(image, rows).permute(2, 0, 1)), packed)
        return self._back(_laid_out(product.permute(1, 2, 0)), image, rows)

    def convolve(self, image: Tensor, packed: Tensor, rows: int) -> Tensor:
        """``Σ_o ŷ[b, o] conj S[c, o]``: ``(B, C, H, Q)``."""
        product = torch.bmm(_laid_out(self._columns(image, rows).permute(2, 0, 1).conj()), packed.mT)
        return self._back(_laid_out(product.permute(1, 2, 0).conj()), image, rows)

    def cross(self, image: Tensor, result: Tensor, rows: int) -> Tensor:
        """``Σ_b conj(x̂[b, c]) ŷ[b, o]``, in the layout of a spectrum."""
        left, right = self._columns(image, rows).permute(2, 1, 0).conj(), self._columns(result, rows).permute(2, 0, 1)
        return torch.bmm(_laid_out(left), _laid_out(right))

    def _columns(self, image: Tensor, rows: int) -> Tensor:
        transformed: Tensor = torch.fft.fft(image, n=rows, dim=-2)
        return transformed.flatten(2)

    def _back(self, spectrum: Tensor, image: Tensor, rows: int) -> Tensor:
        height, columns = image.shape[-2:]
        plane: Tensor = torch.fft.ifft(spectrum.view(*spectrum.shape[:2], rows, columns), dim=-2)
        return plane[..., :height, :]


def _laid_out(spectrum: Tensor) -> Tensor:
    """The same in its own order in memory: products and transforms of views, or of conjugates, copy them one by one."""
    laid = torch.empty(spectrum.shape, dtype=spectrum.dtype, device=spectrum.device)
    return laid.copy_(spectrum)


class NativeProducts:
    """By `products.cpp`, compiled on this machine: a spectrum is read once, in the order in which it lies."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.vector_bytes.restype = ctypes.c_int64
        self._bytes: int = library.vector_bytes()

    def pack(self, spectrum: Tensor) -> Tensor:
        """``(O, C, R, Q)``, conjugated, to blocks of W columns ``(Q / W, R, C, O, 2, W)``, real."""
        outputs, inputs, rows, columns = spectrum.shape
        packed = self._packed(spectrum.dtype.to_real(), inputs, outputs, rows, columns)
        self._call("pack", spectrum.contiguous(), packed, inputs, outputs, 0, rows, columns)
        return packed

    def unpack(self, packed: Tensor, rows: int, columns: int) -> Tensor:
        """Back to ``(O, C, R, Q)``."""
        inputs, outputs = packed.shape[2:4]
        spectrum = torch.empty(outputs, inputs, rows, columns, dtype=packed.dtype.to_complex())
        self._call("unpack", packed.contiguous(), spectrum, inputs, outputs, 0, rows, columns)
        return spectrum

    def correlate(self, image: Tensor, packed: Tensor, rows: int) -> Tensor:
        """``Σ_c x̂[b, c] S[c, o]``: ``(B, O, H, Q)``."""
        return self._apply("correlate", image, packed, packed.shape[3], rows)

    def convolve(self, image: Tensor, packed: Tensor, rows: int) -> Tensor:
        """``Σ_o ŷ[b, o] conj S[c, o]``: ``(B, C, H, Q)``."""
        return self._apply("convolve", image, packed, packed.shape[2], rows)

    def cross(self, image: Tensor, result: Tensor, rows: int) -> Tensor:
        """``Σ_b conj(x̂[b, c]) ŷ[b, o]``, in the layout of a spectrum."""
        (images, inputs, height, columns), outputs = image.shape, result.shape[1]
        packed = self._packed(image.dtype.to_real(), inputs, outputs, rows, columns)
        tensors = image.contiguous(), result.contiguous(), packed, _roots(rows, packed.dtype)
        self._call("cross", *tensors, images, inputs, outputs, height, rows, columns)
        return packed

    def _apply(self, name: str, image: Tensor, packed: Tensor, channels: int, rows: int) -> Tensor:
        images, _, height, columns = image.shape
        result = torch.empty(images, channels, height, columns, dtype=image.dtype)
        tensors = image.contiguous(), packed.contiguous(), result, _roots(rows, packed.dtype)
        self._call(name, *tensors, images, *packed.shape[2:4], height, rows, columns)
        return result

    def _packed(self, dtype: torch.dtype, inputs: int, outputs: int, rows: int, columns: int) -> Tensor:
        width = self._bytes // dtype.itemsize
        return torch.empty(-(-columns // width), rows, inputs, outputs, 2, width, dtype=dtype)

    def _call(self, name: str, *arguments: Tensor | int) -> None:
        precision = next(each.dtype for each in arguments if isinstance(each, Tensor)).to_real()
        function = getattr(self._library, f"{name}_{str(precision).removeprefix('torch.')}")
        passed: list[Any] = [
            ctypes.c_void_p(each.data_ptr()) if isinstance(each, Tensor) else ctypes.c_int64(each) for each in arguments
        ]
        function(*passed, ctypes.c_int(torch.get_num_threads()))


@lru_cache
def _roots(count: int, dtype: torch.dtype) -> Tensor:
    """``exp(−2πi j / count)`` as pairs of real numbers ``(count, 2)``."""
    turns = -2 * torch.pi * torch.arange(count, dtype=torch.float64) / count
    return torch.stack([turns.cos(), turns.sin()], dim=1).to(dtype)


Products = MatrixProducts | NativeProducts
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
