"""Train any recurrent PyTorch module at memory constant in the number of steps, with dynamics that stay stable."""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from crbp import cells, ops
from crbp.diagnostics import activation_memory, residual_curve, spectral_radius
from crbp.errors import (
    CrbpError,
    DivergenceError,
    DivergenceWarning,
    LearningWarning,
    NonFiniteError,
    NonFiniteWarning,
    SettingsError,
    StateError,
    StorageError,
)
from crbp.evolve import Evolve, Report, Run
from crbp.gradients import BPTT, RBP, CheckpointedBPTT, GradientMethod, OneStep, Phantom, TruncatedBPTT
from crbp.penalties import jacobian_frobenius_penalty, lipschitz_penalty, residual_penalty, spectral_penalty
from crbp.solvers import GMRES, Anderson, Neumann, Solver, StopReason

__version__ = "0.1.0"

__all__ = [
    "BPTT",
    "GMRES",
    "RBP",
    "Anderson",
    "CheckpointedBPTT",
    "CrbpError",
    "DivergenceError",
    "DivergenceWarning",
    "Evolve",
    "GradientMethod",
    "LearningWarning",
    "Neumann",
    "NonFiniteError",
    "NonFiniteWarning",
    "OneStep",
    "Phantom",
    "Report",
    "Run",
    "SettingsError",
    "Solver",
    "StateError",
    "StopReason",
    "StorageError",
    "TruncatedBPTT",
    "activation_memory",
    "cells",
    "jacobian_frobenius_penalty",
    "lipschitz_penalty",
    "ops",
    "residual_curve",
    "residual_penalty",
    "spectral_penalty",
    "spectral_radius",
]

# Imported on first use, since they need extras.
_EXTRAS = {
    **dict.fromkeys(("analysis", "export", "metrics", "tasks"), "train"),
    **{"data": "data", "hub": "hub", "models": "panoptic"},
}

if not TYPE_CHECKING:  # a type checker would take any name for one of them

    def __getattr__(name: str) -> ModuleType:
        if name in _EXTRAS:
            try:
                return import_module(f"crbp.{name}")
            except ModuleNotFoundError as error:
                if (error.name or "").split(".")[0] == "crbp":
                    raise
                raise ImportError(
                    f"crbp.{name} needs {error.name}, not installed here; run: pip install 'crbp[{_EXTRAS[name]}]'"
                ) from error
        raise AttributeError(f"module 'crbp' has no attribute {name!r}")
