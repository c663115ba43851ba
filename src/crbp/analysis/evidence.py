"""The evidential reading of logits: how unsure each step of a run is, and how long the run takes to become sure."""

from __future__ import annotations

import torch
from torch import Tensor

from crbp._checks import count
from crbp.losses import evidence


def evidential_uncertainty(logits: Tensor, *, dim: int = 1) -> Tensor:
    """Uncertainty ``ε = K / Σ_k α_k`` of ``K`` classes, with ``α = e + 1`` and ``e = exp(clip(logit / 10, −10, 10))``.

    ``α`` are the parameters of a Dirichlet distribution over the probabilities of the classes; without evidence, all
    ``e = 0``, ``ε`` is 1, and it falls to 0 with evidence for any class. It means what it says of models that were
    trained with `crbp.losses.evidential_loss`. Of others it is a monotone reading of how large their logits are.

    Args:
        logits: with the classes along ``dim``.
        dim: of the classes; left out of the result.

    Returns:
        Tensor of the shape of the logits without ``dim``, in (0, 1).

    Source: Goetschalckx et al., Computing a human-like reaction time metric from stable recurrent vision models,
    NeurIPS 2023, arXiv 2306.11582.
    """
    return logits.shape[dim] / (evidence(logits) + 1).sum(dim=dim)


def reaction_time(uncertainty: Tensor, *, dim: int = 0) -> Tensor:
    """The reaction-time measure ``ξ = ∫ ε(t) dt`` from step 1 to step T, by the trapezoid rule.

    Steps are the unit of time. A run that is unsure for long has a large ``ξ``; of runs of the same ``T`` alone it can
    be compared.

    Args:
        uncertainty: ``ε`` after step 1 … T along ``dim``, as `evidential_uncertainty` gives it.
        dim: of the steps; left out of the result.

    Raises:
        ValueError: if there are fewer than two steps.

    Source: Goetschalckx et al., NeurIPS 2023, arXiv 2306.11582.
    """
    count("steps", uncertainty.shape[dim], at_least=2)
    return torch.trapezoid(uncertainty, dim=dim)
