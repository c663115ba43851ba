"""Whole models: what comes before and after a recurrent cell, and the baselines beside it.

The panoptic ones need torchvision and are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from crbp.models.feedforward import FeedForwardNet
from crbp.models.pathfinder import PathfinderNet, Prediction

_PANOPTIC = ("RFPN", "PanopticFPN", "PanopticResult")

__all__ = ["RFPN", "FeedForwardNet", "PanopticFPN", "PanopticResult", "PathfinderNet", "Prediction"]


def __getattr__(name: str) -> Any:
    if name in _PANOPTIC:
        return getattr(importlib.import_module("crbp.models.panoptic"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PANOPTIC])
