from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence

from crbp.losses import evidential_loss, expected_probability, focal_loss


def maps(scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, 5, 4, dtype=torch.float64, generator=generator) * scale
    return logits, torch.rand(3, 5, 4, generator=generator) > 0.7


def test_without_focus_it_is_the_cross_entropy() -> None:
    logits, mask = maps()
    torch.testing.assert_close(focal_loss(logits, mask, gamma=0.0), F.cross_entropy(logits, mask.long()))


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_equation(gamma: float) -> None:
    logits, mask = maps()
    p = logits.softmax(1).gather(1, mask.long()[:, None])
    torch.testing.assert_close(focal_loss(logits, mask, gamma), -((1 - p) ** gamma * p.log()).mean())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradient(gamma: float) -> None:
    logits, mask = maps()
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, mask, gamma), logits.requires_grad_())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_extreme_logits_keep_loss_and_gradient_finite(gamma: float) -> None:
    logits = torch.tensor([[-300.0, 300.0], [300.0, -300.0]]).view(1, 2, 1, 2).requires_grad_()
    loss = focal_loss(logits, torch.tensor([[[True, True]]]), gamma)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    torch.testing.assert_close(loss.detach(), torch.tensor(300.0))  # one pixel right, one wrong by 600 nats


def test_classes_are_symmetric() -> None:
    logits, mask = maps()
    torch.testing.assert_close(focal_loss(logits, mask), focal_loss(logits.flip(1), ~mask))


def test_half_precision_is_computed_in_full() -> None:
    logits, mask = maps()
    low = logits.bfloat16()
    torch.testing.assert_close(focal_loss(low, mask), focal_loss(low.float(), mask), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("logits", "mask", "gamma", "message"),
    [
        (torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2).bool(), 2.0, "logits must have shape"),
        (torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 3).bool(), 2.0, "mask must be bool of shape"),
        (torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2), 2.0, "mask must be bool of shape"),
        (torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2).bool(), -1.0, "gamma must be finite"),
    ],
)
def test_mistakes(logits: Tensor, mask: Tensor, gamma: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        focal_loss(logits, mask, gamma)


@pytest.mark.parametrize("kl_weight", [0.0, 0.1, 1.0])
def test_evidential_loss_is_the_one_of_dirichlet_distributions(kl_weight: float) -> None:
    logits, mask = maps(30.0)
    alpha = (logits / 10).clamp(-10, 10).exp().movedim(1, -1) + 1
    truth = F.one_hot(mask.long(), 2)
    risk = -((alpha / alpha.sum(-1, keepdim=True)) * truth).sum(-1).log()
    kept = Dirichlet(truth + (1 - truth) * alpha)
    wanted = risk + kl_weight * kl_divergence(kept, Dirichlet(torch.ones_like(alpha)))
    torch.testing.assert_close(evidential_loss(logits, mask, kl_weight), wanted.mean())


def test_expected_probability_is_what_the_evidential_loss_is_of() -> None:
    logits, mask = maps(30.0)
    probability = expected_probability(logits).movedim(1, -1)
    torch.testing.assert_close(probability.sum(-1), torch.ones_like(probability[..., 0]))
    right = probability.gather(-1, mask.long()[..., None])
    torch.testing.assert_close(evidential_loss(logits, mask, 0.0), -right.log().mean())
    assert torch.equal(probability.argmax(-1), logits.argmax(1))


def test_evidential_gradient() -> None:
    logits, mask = maps(30.0)
    assert torch.autograd.gradcheck(lambda x: evidential_loss(x, mask, 0.3), logits.requires_grad_())


def test_extreme_evidence_keeps_loss_and_gradient_finite() -> None:
    logits = torch.tensor([[-1e6, 1e6], [1e6, -1e6]]).view(1, 2, 1, 2).requires_grad_()
    loss = evidential_loss(logits, torch.tensor([[[True, True]]]), 0.0)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    torch.testing.assert_close(loss.detach(), torch.tensor(5.0), atol=1e-3, rtol=0)  # e is at most exp(10)


def test_evidence_for_the_wrong_class_costs_more_with_more_weight() -> None:
    wrong = torch.tensor([30.0, -30.0]).view(1, 2, 1, 1)
    right = wrong.flip(1)
    mask = torch.ones(1, 1, 1, dtype=torch.bool)
    assert evidential_loss(wrong, mask, 1.0) > evidential_loss(wrong, mask, 0.0) + 1
    assert abs(evidential_loss(right, mask, 1.0) - evidential_loss(right, mask, 0.0)) < 0.01


def test_evidential_mistakes() -> None:
    with pytest.raises(ValueError, match="kl_weight must be finite"):
        evidential_loss(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2).bool(), -1.0)
    with pytest.raises(ValueError, match="logits must have shape"):
        evidential_loss(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2).bool())
