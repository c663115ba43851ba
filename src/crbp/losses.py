"""Losses on maps of logits; they know nothing of the model that made them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crbp._checks import non_negative

__all__ = ["constant_loss", "evidence", "evidential_loss", "expected_probability", "focal_loss"]


def focal_loss(logits: Tensor, mask: Tensor, gamma: float = 2.0) -> Tensor:
    """Two-class softmax focal loss, averaged over all pixels.

    ``L = −mean[(1 − p)^γ log p]`` with ``p`` the softmax probability of a pixel's true class. The factor ``(1 − p)^γ``
    takes weight from pixels that are already right, which matters where the target covers a hundredth of the image.
    ``γ = 0`` is the cross-entropy. Computed in float32 at least, from logarithms throughout, so that neither the loss
    nor its gradient overflows.

    Args:
        logits: ``(B, 2, H, W)``, background and target.
        mask: ``(B, H, W)`` of bool, true on the target.
        gamma: γ, finite and at least 0.

    Returns:
        A scalar in nats.

    Raises:
        ValueError: if the shapes do not fit, the mask is not bool, or γ is out of range.

    Source: Lin et al., Focal loss for dense object detection, ICCV 2017.
    """
    non_negative("gamma", gamma)
    check_maps(logits, mask)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    background, target = F.log_softmax(wide, dim=1).unbind(dim=1)
    log_right = torch.where(mask, target, background)
    log_wrong = torch.where(mask, background, target)
    # As an exponential, (1 − p)^γ keeps a finite slope where 1 − p underflows; a power would not for γ < 1.
    return -(torch.exp(gamma * log_wrong) * log_right).mean()


def evidence(logits: Tensor) -> Tensor:
    """Evidence ``e = exp(clip(logit / 10, −10, 10))`` for each class; in float32 at least.

    ``α = e + 1`` are the parameters of a Dirichlet distribution over the probabilities of the classes.

    Source: Goetschalckx et al., Computing a human-like reaction time metric from stable recurrent vision models,
    NeurIPS 2023, arXiv 2306.11582.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide / 10).clamp(-10, 10).exp()


def expected_probability(logits: Tensor, *, dim: int = 1) -> Tensor:
    """Probability of each class that a network trained with `evidential_loss` expects: ``α_k / Σ_j α_j``.

    It is a good deal flatter than the softmax of the logits, and of the same order.

    Args:
        logits: with the classes along ``dim``.
        dim: of the classes.
    """
    alpha = evidence(logits) + 1
    return alpha / alpha.sum(dim=dim, keepdim=True)


def evidential_loss(logits: Tensor, mask: Tensor, kl_weight: float = 0.1) -> Tensor:
    """Two-class evidential loss, averaged over all pixels.

    ``L = mean[log Σ_k α_k − log α_true + λ · KL(Beta(1, α_wrong) ‖ Beta(1, 1))]`` with ``α`` as `evidence` has it and
    ``KL = log α_wrong + 1 / α_wrong − 1``. The first part is the negative logarithm of the expected probability of a
    pixel's true class; the second takes back evidence for the wrong one, so that a pixel of which nothing is known has
    little evidence at all, and not much for both. Logits beyond ±100, where the evidence is clipped, have no gradient.

    Args:
        logits: ``(B, 2, H, W)``, background and target.
        mask: ``(B, H, W)`` of bool, true on the target.
        kl_weight: λ, finite and at least 0.

    Returns:
        A scalar in nats.

    Raises:
        ValueError: if the shapes do not fit, the mask is not bool, or λ is out of range.

    Source: Sensoy et al., Evidential deep learning to quantify classification uncertainty, NeurIPS 2018, equation 3
    and the Kullback-Leibler term of its section 4, with the evidence of Goetschalckx et al., NeurIPS 2023, arXiv
    2306.11582.
    """
    non_negative("kl_weight", kl_weight)
    check_maps(logits, mask)
    background, target = (evidence(logits) + 1).unbind(dim=1)
    right, wrong = torch.where(mask, target, background), torch.where(mask, background, target)
    return ((right + wrong).log() - right.log() + kl_weight * (wrong.log() + 1 / wrong - 1)).mean()


def constant_loss(mask: Tensor, gamma: float = 2.0) -> Tensor:
    """The least focal loss of an answer that is the same for every pixel, to 1 %.

    With a share ``s`` of pixels on the target, ``min over p of −s (1 − p)^γ log p − (1 − s) p^γ log(1 − p)``.

    Args:
        mask: ``(B, H, W)`` of bool, true on the target.
        gamma: as in `focal_loss`.

    Returns:
        A scalar in nats; 0 where the mask is all true or all false.
    """
    share = mask.float().mean()
    p = torch.sigmoid(torch.linspace(-12, 12, 241, device=mask.device))
    cost = -share * (1 - p) ** gamma * p.log() - (1 - share) * p**gamma * torch.log1p(-p)
    return torch.where((share > 0) & (share < 1), cost.min(), 0)


def check_maps(logits: Tensor, mask: Tensor) -> None:
    """Raise unless ``logits`` are ``(B, 2, H, W)`` and ``mask`` is ``(B, H, W)`` of bool."""
    if logits.ndim != 4 or logits.shape[1] != 2:
        raise ValueError(f"logits must have shape (B, 2, H, W), not {tuple(logits.shape)}")
    if mask.dtype != torch.bool or mask.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"mask must be bool of shape {(logits.shape[0], *logits.shape[2:])} to fit the logits, not {mask.dtype} "
            f"of shape {tuple(mask.shape)}"
        )
