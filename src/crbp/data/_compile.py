"""How the generators are compiled: with a cache on disk, or, where there can be none, with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from numba import njit


def cached(function: Callable[..., Any]) -> Any:
    """Compile with an on-disk cache; say so where no directory can be written instead of being slow."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither the package's __pycache__ nor the user's cache directory is writable
        warnings.warn(
            f"{function.__module__}.{function.__name__} cannot be cached, so every process compiles it anew: "
            "set NUMBA_CACHE_DIR to a writable directory",
            RuntimeWarning,
            stacklevel=2,
        )
        return njit(nogil=True)(function)
