"""Penalties as values of a training configuration: which one, how much of it, with what settings."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

import crbp
from crbp._checks import choice, count, share
from crbp.penalties import Reduction


@dataclass(frozen=True, kw_only=True)
class Penalty(ABC):
    """A penalty on the dynamics that training adds to its loss, ``weight`` times.

    Raises:
        ValueError: unless the weight is finite and above 0; to train without a penalty, pass none.
    """

    weight: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight must be finite and above 0, not {self.weight!r}; leave the penalty out for none")

    @abstractmethod
    def __call__(self, run: crbp.Run) -> Tensor:
        """The penalty of one run, before it is weighted; a scalar."""


@dataclass(frozen=True, kw_only=True)
class LipschitzPenalty(Penalty):
    """The Lipschitz coefficient penalty, ``weight · mean((1ᵀJ − bound)₊²)`` as it is set here.

    Args:
        weight: what the penalty is multiplied by.
        bound: see `crbp.lipschitz_penalty`.
        reduction: see `crbp.lipschitz_penalty`.

    Raises:
        ValueError: for values out of range.

    Source: Linsley et al., Stable and expressive recurrent vision models, NeurIPS 2020.
    """

    bound: float = 0.9
    reduction: Reduction = "mean_square"

    def __post_init__(self) -> None:
        super().__post_init__()
        share("bound", self.bound)
        choice("reduction", self.reduction, get_args(Reduction))

    def __call__(self, run: crbp.Run) -> Tensor:
        """``crbp.lipschitz_penalty`` of the run."""
        return crbp.lipschitz_penalty(run, bound=self.bound, reduction=self.reduction)


@dataclass(frozen=True, kw_only=True)
class FrobeniusPenalty(Penalty):
    """The squared Frobenius norm of the last step's Jacobian per state unit, estimated from random vectors.

    Args:
        weight: what the penalty is multiplied by.
        samples: see `crbp.jacobian_frobenius_penalty`.

    Raises:
        ValueError: for values out of range.

    Source: Bai et al., Stabilizing equilibrium models by Jacobian regularization, arXiv 2106.14342.
    """

    samples: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        count("samples", self.samples)

    def __call__(self, run: crbp.Run) -> Tensor:
        """``crbp.jacobian_frobenius_penalty`` of the run."""
        return crbp.jacobian_frobenius_penalty(run, samples=self.samples)
