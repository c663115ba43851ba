"""Data sets; each family is a subpackage that is imported on first use, so that `import crbp` stays light."""

from __future__ import annotations

import importlib
from types import ModuleType

_FAMILIES = ("panoptic", "pathfinder")

__all__ = ["panoptic", "pathfinder"]


def __getattr__(name: str) -> ModuleType:
    if name in _FAMILIES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_FAMILIES])
