"""Convolution of images whose rows have been transformed with spectra of kernels: natively, or by PyTorch.

An image comes as ``(B, C, H, Q)``, its ``H`` rows transformed to ``Q`` frequencies each, and leaves so; between lie
the transforms of the columns to ``R`` frequencies and back, and one product of complex matrices for each frequency. The
spectrum of a kernel is in the layout of whoever computes with it: `pack` makes it from ``(O, C, R, Q)``, `unpack` gives
that back, both conjugated.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
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

    def pack(self, spectrum: Tensor) -> Tensor:
        """``(O, C, R, Q)``, conjugated, to blocks of W columns ``(Q / W, R, C, O, 2, W)``, real."""
        made: Tensor = _pack(spectrum)
        return made

    def unpack(self, packed: Tensor, rows: int, columns: int) -> Tensor:
        """Back to ``(O, C, R, Q)``."""
        made: Tensor = _unpack(packed, rows, columns)
        return made

    def correlate(self, image: Tensor, packed: Tensor, rows: int) -> Tensor:
        """``Σ_c x̂[b, c] S[c, o]``: ``(B, O, H, Q)``."""
        made: Tensor = _apply(image, packed, rows, False)
        return made

    def convolve(self, image: Tensor, packed: Tensor, rows: int) -> Tensor:
        """``Σ_o ŷ[b, o] conj S[c, o]``: ``(B, C, H, Q)``."""
        made: Tensor = _apply(image, packed, rows, True)
        return made

    def cross(self, image: Tensor, result: Tensor, rows: int) -> Tensor:
        """``Σ_b conj(x̂[b, c]) ŷ[b, o]``, in the layout of a spectrum."""
        made: Tensor = _cross(image, result, rows)
        return made


# Operators of PyTorch, so that fake tensors, tracing and tensors of other kinds meet them as they meet its own.


@torch.library.custom_op("crbp::pack_spectrum", mutates_args=(), device_types="cpu")
def _pack(spectrum: Tensor) -> Tensor:
    outputs, inputs, rows, columns = spectrum.shape
    packed = _empty_spectrum(spectrum, inputs, outputs)
    _call("pack", spectrum.contiguous(), packed, inputs, outputs, 0, rows, columns)
    return packed


@torch.library.custom_op("crbp::unpack_spectrum", mutates_args=(), device_types="cpu")
def _unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
    spectrum: Tensor = _empty_unpacked(packed, rows, columns)
    _call("unpack", packed.contiguous(), spectrum, *packed.shape[2:4], 0, rows, columns)
    return spectrum


@torch.library.custom_op("crbp::apply_spectrum", mutates_args=(), device_types="cpu")
def _apply(image: Tensor, packed: Tensor, rows: int, adjoint: bool) -> Tensor:
    images, _, height, columns = image.shape
    result: Tensor = _empty_result(image, packed, rows, adjoint)
    tensors = image.contiguous(), _aligned(packed), result, _roots(rows, packed.dtype)
    scratch = _scratch(images * sum(packed.shape[2:4]), rows, packed.dtype)
    sizes = images, *packed.shape[2:4], height, rows, columns
    _call("convolve" if adjoint else "correlate", *tensors, scratch, *sizes)
    return result


@torch.library.custom_op("crbp::cross_spectrum", mutates_args=(), device_types="cpu")
def _cross(image: Tensor, result: Tensor, rows: int) -> Tensor:
    (images, inputs, height, columns), outputs = image.shape, result.shape[1]
    packed: Tensor = _empty_crossed(image, result, rows)
    tensors = image.contiguous(), result.contiguous(), packed, _roots(rows, packed.dtype)
    scratch = _scratch(images * (inputs + outputs), rows, packed.dtype)
    _call("cross", *tensors, scratch, images, inputs, outputs, height, rows, columns)
    return packed


@_pack.register_fake
def _empty_packed(spectrum: Tensor) -> Tensor:
    return _empty_spectrum(spectrum, spectrum.shape[1], spectrum.shape[0])


@_unpack.register_fake
def _empty_unpacked(packed: Tensor, rows: int, columns: int) -> Tensor:
    inputs, outputs = packed.shape[2:4]
    return packed.new_empty(outputs, inputs, rows, columns, dtype=packed.dtype.to_complex())


@_apply.register_fake
def _empty_result(image: Tensor, packed: Tensor, rows: int, adjoint: bool) -> Tensor:
    return image.new_empty(image.shape[0], packed.shape[2 if adjoint else 3], *image.shape[2:])


@_cross.register_fake
def _empty_crossed(image: Tensor, result: Tensor, rows: int) -> Tensor:
    like = image.new_empty(0, 0, rows, image.shape[-1])
    return _empty_spectrum(like, image.shape[1], result.shape[1])


def _empty_spectrum(like: Tensor, inputs: int, outputs: int) -> Tensor:
    rows, columns = like.shape[-2:]
    dtype = like.dtype.to_real()
    width = _library().vector_bytes() // dtype.itemsize
    return like.new_empty(-(-columns // width), rows, inputs, outputs, 2, width, dtype=dtype)


def _scratch(planes: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Room for a block of columns of all images and results, and for each thread's transform; and to align it."""
    vectors = 2 * rows * planes + torch.get_num_threads() * 4 * rows + 1
    return torch.empty(vectors * _library().vector_bytes() // dtype.itemsize, dtype=dtype, device="cpu")


def _aligned(packed: Tensor) -> Tensor:
    """The same, where whole vectors can be loaded from; a tensor restored from elsewhere may lie otherwise."""
    packed = packed.contiguous()
    return packed.clone() if packed.data_ptr() % 64 else packed


def _call(name: str, *arguments: Tensor | int) -> None:
    precision = next(each.dtype for each in arguments if isinstance(each, Tensor)).to_real()
    function = getattr(_library(), f"{name}_{str(precision).removeprefix('torch.')}")
    passed: list[Any] = []
    for each in arguments:
        if isinstance(each, Tensor):
            assert each.dtype.to_real() == precision
            assert each.device.type == "cpu"
            passed.append(ctypes.c_void_p(each.data_ptr()))
        else:
            passed.append(ctypes.c_int64(each))
    function(*passed, ctypes.c_int(torch.get_num_threads()))


@lru_cache
def _roots(count: int, dtype: torch.dtype) -> Tensor:
    """``exp(−2πi j / count)`` as pairs of real numbers ``(count, 2)``."""
    turns = -2 * torch.pi * torch.arange(count, dtype=torch.float64, device="cpu") / count
    return torch.stack([turns.cos(), turns.sin()], dim=1).to(dtype)


Products = MatrixProducts | NativeProducts
# Above this, the matrices of a block of frequencies leave the cache of a core, and a library's blocking is better.
_MOST_NATIVE = 64 * 64
_native, _matrix = NativeProducts(), MatrixProducts()


def native_suits(device: torch.device, inputs: int, outputs: int) -> bool:
    """Whether the native products are to be taken: on a CPU, for up to 4 096 pairs of channels, with a compiler."""
    return device.type == "cpu" and inputs * outputs <= _MOST_NATIVE and _found() is not None


def products(*, native: bool) -> Products:
    """The products of the kind asked for."""
    return _native if native else _matrix


def _library() -> ctypes.CDLL:
    library = _found()
    assert library is not None  # `native_suits` has been asked
    return library


@cache
def _found() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None)
        reason = [*(said if isinstance(said, str) else str(error)).strip().splitlines(), type(error).__name__][0]
        warnings.warn(
            f"convolutions by FFT use PyTorch's matrix products, which is slower, because the native ones cannot be "
            f"compiled ({reason}); a C++ compiler named c++ or by the variable CXX is needed",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    library.vector_bytes.restype = ctypes.c_int64
    return library


def _build() -> Path:
    """The compiled library, from the cache, or compiled into it: a second or two, once for a machine."""
    named = os.environ.get("CXX")
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if named is None and found is None:
        raise FileNotFoundError("there is no C++ compiler")
    compiler = shlex.split(named) if named else [str(found)]
    failure: Exception | None = None
    for target in (["-march=native", "-fopenmp"], ["-march=native"], []):
        try:
            return _compiled([*compiler, "-O3", "-ffp-contract=fast", "-std=c++17", *target])
        except subprocess.CalledProcessError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _compiled(command: list[str]) -> Path:
    # What the compiler predefines tells its version and the instructions of this processor, which share a home on a
    # cluster with others.
    defined = _run([*command, "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256("\n".join((*command, defined, SOURCE.read_text(encoding="utf-8"))).encode()).hexdigest()[:16]
    folder = _cache()
    library = folder / f"products-{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            new = Path(scratch) / library.name
            _run([*command, "-shared", "-fPIC", str(SOURCE), "-o", str(new)])
            new.replace(library)
    return library


def _cache() -> Path:
    """The user's folder for such files; where there is none that can be written, one for this process alone."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crbp"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: no home
        own = tempfile.mkdtemp(prefix="crbp-")
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        return Path(own)


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
