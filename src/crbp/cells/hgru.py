"""The horizontal gated recurrent unit: a model of the horizontal connections of visual cortex."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crbp.cells._parts import Norm, PointwiseConv2d, check_cell, check_shapes, chronos_, make_norm


class HGRU(nn.Module):
    """Horizontal gated recurrent unit, the variant used for contour tracing.

    ```
    g1 = σ(U1 h)                            gate of what inhibits
    c1 = norm(W_inh * (g1 ⊙ h))
    z  = φ(x − φ(c1 ⊙ (α h + μ)))           inhibition
    g2 = σ(U2 z)                            gate of what is updated
    c2 = norm(W_exc * z)
    h̃  = φ(κ z + γ c2 + ω z ⊙ c2)           excitation
    h' = φ((1 − g2) ⊙ h + g2 ⊙ h̃)
    ```
    ``h`` is the state and ``x`` the drive, both ``(B, C, H, W)``; ``φ`` is softplus, ``*`` a convolution that keeps the
    size, ``U1`` and ``U2`` are 1×1 convolutions with bias, and α, μ, κ, γ, ω hold one number a channel. Gate 1 starts
    at the bias ``log U(1, horizon − 1)`` and gate 2 at its negative.

    Args:
        channels: C.
        kernel_size: side of the two square kernels, odd.
        norm: normalisation of ``c1`` and ``c2``: ``"instance"``, ``"batch"`` (reproduces the paper, and couples the
            images of a batch), ``"group"`` or ``"none"``.
        norm_scale: start of the normalisation's scales; the paper's is 0.1, with which a small model hardly starts.
        horizon: longest time constant of the gates in steps, T_max; the number of steps trained for.

    Raises:
        ValueError: for sizes out of range or an unknown norm.

    Source: Linsley et al., Stable and expressive recurrent vision models, NeurIPS 2020, supplement.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        norm: Norm = "instance",
        norm_scale: float = 0.1,
        horizon: int = 20,
    ) -> None:
        super().__init__()
        check_cell(channels, kernel_size)
        self.channels = channels
        self.inhibition = nn.Conv2d(channels, channels, kernel_size, padding="same", bias=False)
        self.excitation = nn.Conv2d(channels, channels, kernel_size, padding="same", bias=False)
        self.inhibition_gate = PointwiseConv2d(channels)
        self.update_gate = PointwiseConv2d(channels)
        self.inhibition_norm = make_norm(norm, channels, scale=norm_scale)
        self.excitation_norm = make_norm(norm, channels, scale=norm_scale)
        self.alpha = nn.Parameter(torch.full((channels, 1, 1), 0.1))
        self.mu = nn.Parameter(torch.full((channels, 1, 1), 1.0))
        self.kappa = nn.Parameter(torch.full((channels, 1, 1), 0.5))
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), 1.0))
        self.omega = nn.Parameter(torch.full((channels, 1, 1), 0.5))
        for conv in (self.inhibition, self.excitation):
            nn.init.orthogonal_(conv.weight)
        assert self.inhibition_gate.bias is not None
        assert self.update_gate.bias is not None
        chronos_(self.inhibition_gate.bias, horizon)
        with torch.no_grad():
            self.update_gate.bias.copy_(-self.inhibition_gate.bias)

    def initial_state(self, drive: Tensor) -> Tensor:
        """The state to start from: zeros of the shape of the drive ``(B, C, H, W)``."""
        return torch.zeros_like(drive)

    def forward(self, state: Tensor, drive: Tensor) -> Tensor:
        """One step: the next state, of the shape of ``state`` and ``drive``, ``(B, C, H, W)``."""
        check_shapes(state, drive, self.channels)
        gated = torch.sigmoid(self.inhibition_gate(state)) * state
        inhibiting = self.inhibition_norm(self.inhibition(gated))
        inhibited = F.softplus(drive - F.softplus(inhibiting * torch.addcmul(self.mu, self.alpha, state)))
        update = torch.sigmoid(self.update_gate(inhibited))
        exciting = self.excitation_norm(self.excitation(inhibited))
        candidate = torch.addcmul(self.kappa * inhibited, exciting, torch.addcmul(self.gamma, self.omega, inhibited))
        candidate = F.softplus(candidate)
        # Under autocast these two may come in a lower precision, which lerp does not promote.
        return F.softplus(torch.lerp(state, candidate.type_as(state), update.type_as(state)))

    def readout_of(self, state: Tensor) -> Tensor:
        """What a readout sees of the state: all of it, ``(B, C, H, W)``."""
        return state
