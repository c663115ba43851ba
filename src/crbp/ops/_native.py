"""`spectral.cpp`, `winograd.cpp` and `pointwise.cpp`, compiled on this machine when they are first wanted."""

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
from functools import cache
from pathlib import Path

SOURCES = tuple(Path(__file__).with_name(name) for name in ("spectral.cpp", "winograd.cpp", "pointwise.cpp"))
HEADERS = (Path(__file__).with_name("lanes.h"),)


def library() -> ctypes.CDLL:
    """The compiled functions, where `found` has them."""
    loaded = found()
    assert loaded is not None
    return loaded


@cache
def found() -> ctypes.CDLL | None:
    """The compiled functions; None, with a warning, where they cannot be compiled."""
    try:
        library = ctypes.CDLL(str(build()))
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"convolutions and softplus use PyTorch's own operations, which is slower, as the native ones cannot be "
            f"compiled ({reason(error)}); a C++ compiler named c++ or by the variable CXX is needed",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    library.vector_bytes.restype = ctypes.c_int64
    for name in ("apply", "cross", "winograd"):
        for dtype in ("float32", "float64"):
            getattr(library, f"{name}_scratch_{dtype}").restype = ctypes.c_int64
    return library


def reason(error: Exception) -> str:
    """The first line of what a compiler, or the system, said."""
    said = getattr(error, "stderr", None)
    return [*(said if isinstance(said, str) else str(error)).strip().splitlines(), type(error).__name__][0]


def compiler() -> list[str]:
    """The command of the C++ compiler.

    Raises:
        OSError: if there is none, or the variable CXX cannot be read.
    """
    if named := os.environ.get("CXX"):
        try:
            return shlex.split(named)
        except ValueError as error:
            raise OSError(f"the variable CXX is {named!r}: {error}") from error
    on_path = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if on_path is None:
        raise FileNotFoundError("there is no C++ compiler")
    return [on_path]


def build() -> Path:
    """The compiled library, from the cache, or compiled into it: in some seconds, once for a machine.

    Raises:
        OSError: or `subprocess.SubprocessError`, if it cannot be compiled.
    """
    command = compiler()
    failure: Exception | None = None
    for target in (["-march=native", "-fopenmp"], ["-march=native"], []):
        try:
            return _compiled([*command, "-O3", "-ffp-contract=fast", "-std=c++17", *target])
        except subprocess.CalledProcessError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _compiled(command: list[str]) -> Path:
    # What the compiler predefines tells its version and the instructions of this processor, which share a home on a
    # cluster with others.
    defined = _run([*command, "-dM", "-E", "-x", "c++", os.devnull])
    sources = (file.read_text(encoding="utf-8") for file in (*SOURCES, *HEADERS))
    key = hashlib.sha256("\n".join((*command, defined, *sources)).encode()).hexdigest()[:16]
    folder = _cache()
    library = folder / f"native-{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            new = Path(scratch) / library.name
            _run([*command, "-shared", "-fPIC", *map(str, SOURCES), "-o", str(new)])
            new.replace(library)
    return library


def _cache() -> Path:
    """The user's folder for such files; where there is none that can be written, one for this process alone."""
    try:
        return writable(user_cache())
    except (OSError, RuntimeError):  # RuntimeError: no home
        own = tempfile.mkdtemp(prefix="crbp-")
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        return Path(own)


def user_cache() -> Path:
    """Where the user keeps such files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crbp"


def writable(folder: Path) -> Path:
    """The folder, made where it is missing.

    Raises:
        OSError: if nothing can be written there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return folder


def _run(command: list[str]) -> str:
    # On a machine with much else to do, some seconds have been seen to become two minutes.
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
