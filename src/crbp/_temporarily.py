"""Attributes that have other values for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def temporarily(thing: Any, **values: Any) -> Iterator[None]:
    """Give attributes of ``thing`` other values, and their own ones back in the end, whatever happens."""
    kept = {name: getattr(thing, name) for name in values}
    try:
        for name, value in values.items():
            setattr(thing, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(thing, name, value)
