"""C-RBP written down plainly from the paper: what `crbp bench` measures crbp against. Every line is eager PyTorch.

Linsley et al., Stable and expressive recurrent vision models, NeurIPS 2020. Parameters have the names and shapes of
`crbp.models.PathfinderNet` around `crbp.cells.HGRU`, so that one loads the other's `state_dict`. Of the two ways to
write an instance norm this takes the faster on a CPU, `GroupNorm(C, C)`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HGRUCell(nn.Module):
    """One step of the hGRU, ``(B, C, H, W)`` to the same shape."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.inhibition = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.excitation = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.inhibition_gate = nn.Conv2d(channels, channels, 1)
        self.update_gate = nn.Conv2d(channels, channels, 1)
        self.inhibition_norm = nn.GroupNorm(channels, channels)
        self.excitation_norm = nn.GroupNorm(channels, channels)
        self.alpha = nn.Parameter(torch.full((channels, 1, 1), 0.1))
        self.mu = nn.Parameter(torch.full((channels, 1, 1), 1.0))
        self.kappa = nn.Parameter(torch.full((channels, 1, 1), 0.5))
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), 1.0))
        self.omega = nn.Parameter(torch.full((channels, 1, 1), 0.5))

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """``h'`` from the state ``h`` and the drive ``x``."""
        g1 = torch.sigmoid(self.inhibition_gate(h))
        c1 = self.inhibition_norm(self.inhibition(g1 * h))
        z = F.softplus(x - F.softplus(c1 * (self.alpha * h + self.mu)))
        g2 = torch.sigmoid(self.update_gate(z))
        c2 = self.excitation_norm(self.excitation(z))
        candidate = F.softplus(self.kappa * z + self.gamma * c2 + self.omega * z * c2)
        return F.softplus((1 - g2) * h + g2 * candidate)


class TextbookNet(nn.Module):
    """Filter bank → square → hGRU → norm → 1×1 readout; images ``(B, 1, H, W)`` to logits ``(B, 2, H, W)``."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.filters = nn.Conv2d(1, channels, 7, padding=3)
        self.cell = HGRUCell(channels, kernel_size)
        self.readout_norm = nn.GroupNorm(channels, channels)
        self.readout = nn.Conv2d(channels, 2, 1)

    def run(self, image: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """``h_{N−1}`` and ``h_N``, with a graph of the last step only."""
        x = self.filters(image) ** 2
        h = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(steps - 1):
                h = self.cell(h, x)
        previous = h.detach().requires_grad_()
        return previous, self.cell(previous, x)

    def read(self, h: Tensor) -> Tensor:
        """Logits of a state."""
        return self.readout(self.readout_norm(h))

    @torch.no_grad()
    def forward(self, image: Tensor, steps: int) -> Tensor:
        """Logits after so many steps, without a graph."""
        return self.read(self.run(image, steps)[1])


class RBP(torch.autograd.Function):
    """Identity forward; backward turns ``g`` into the Neumann series ``Σ_{k=0..K} (Jᵀ)ᵏ g``."""

    @staticmethod
    def forward(ctx, terms: int, previous: Tensor, last: Tensor) -> Tensor:
        """``h_N``, of which the loss is taken."""
        ctx.terms = terms
        ctx.save_for_backward(previous, last)
        return last.detach()

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[None, None, Tensor]:
        """The series, one vector-Jacobian product a term."""
        previous, last = ctx.saved_tensors
        total = term = g
        for _ in range(ctx.terms):
            (term,) = torch.autograd.grad(last, previous, term, retain_graph=True)
            total = total + term
        return None, None, total


def lipschitz_penalty(previous: Tensor, last: Tensor, bound: float = 0.9) -> Tensor:
    """``mean((1ᵀJ − bound)₊²)``."""
    (columns,) = torch.autograd.grad(last, previous, torch.ones_like(last), create_graph=True)
    return F.relu(columns - bound).square().mean()


def focal_loss(logits: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """``−mean((1 − p)^γ log p)`` of the true class; mask ``(B, H, W)`` of bool."""
    log_p = -F.cross_entropy(logits, mask.long(), reduction="none")
    return -((1 - log_p.exp()) ** gamma * log_p).mean()


def training_step(
    net: TextbookNet, image: Tensor, mask: Tensor, *, steps: int, terms: int, weight: float, gamma: float = 2.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, ``focal + weight · penalty``, and the gradient of every parameter by name."""
    net.zero_grad()
    previous, last = net.run(image, steps)
    loss = focal_loss(net.read(RBP.apply(terms, previous, last)), mask, gamma)
    if weight:
        loss = loss + weight * lipschitz_penalty(previous, last)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in net.named_parameters()}
