"""Checks of arguments, worded the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterable


def count(name: str, value: int, *, at_least: int = 1) -> None:
    """Raise unless ``value`` is a whole number of at least ``at_least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} must be a whole number of at least {at_least}, not {value!r}")


def non_negative(name: str, value: float) -> None:
    """Raise unless ``value`` is finite and at least 0."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and at least 0, not {value!r}")


def share(name: str, value: float, *, closed: bool = False) -> None:
    """Raise unless ``value`` lies in [0, 1), or in [0, 1] where ``closed``."""
    if not (0 <= value < 1 or (closed and value == 1)):
        raise ValueError(f"{name} must lie in [0, 1{']' if closed else ')'}, not {value!r}")


def choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise unless ``value`` is one of ``allowed``."""
    options = list(allowed)
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, not {value!r}")
