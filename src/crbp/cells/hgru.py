"""The horizontal gated recurrent unit: a model of the horizontal connections of visual cortex."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from crbp._checks import choice
from crbp.cells._parts import Norm, PointwiseConv2d, check_cell, check_shapes, chronos_, make_norm, normalise
from crbp.ops import Conv2d, Fused, softplus

Fusion = bool | Literal["eager"]
Stage = Callable[..., Tensor]


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
        fused: compile what lies between the convolutions, see `crbp.ops.Fused`: half a minute at the first steps, a
            third of it where the compiler's cache on disk is filled, for faster ones after. It pays at sizes where a
            step takes milliseconds. ``"eager"`` saves memory without a compiler: half of what autograd
            keeps of each step of BPTT, in 1.1 to 1.2 times the time of a cell that is not fused.

    Raises:
        ValueError: for sizes out of range, an unknown norm or another value of ``fused``.

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
        fused: Fusion = False,
    ) -> None:
        super().__init__()
        check_cell(channels, kernel_size)
        choice("fused", fused, (False, True, "eager"))
        self.channels, self.norm, self.fused = channels, norm, fused
        self.inhibition = Conv2d(channels, channels, kernel_size)
        self.excitation = Conv2d(channels, channels, kernel_size)
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
        (gate, inhibit, excite), with_norms = self._stages()
        gated = gate(self.inhibition_gate(state), state)
        inhibiting = _normed(self.inhibition(gated), self.inhibition_norm, with_norms)
        inhibited = inhibit(state, drive, self.alpha, self.mu, *inhibiting)
        exciting = _normed(self.excitation(inhibited), self.excitation_norm, with_norms)
        update = self.update_gate(inhibited)
        return excite(state, inhibited, update, self.kappa, self.gamma, self.omega, *exciting)

    def _stages(self) -> tuple[tuple[Stage, Stage, Stage], bool]:
        """What lies between the convolutions, and whether it begins with the norms."""
        if self.fused == "eager":
            return eager_stages(self.channels), False
        if self.fused and type(self.inhibition_norm) in FUSIBLE and type(self.excitation_norm) in FUSIBLE:
            return compiled_stages(self.norm, self.channels), True
        return (_gate, _inhibit, _excite), False

    def readout_of(self, state: Tensor) -> Tensor:
        """What a readout sees of the state: all of it, ``(B, C, H, W)``."""
        return state


# What `normalise` computes; a norm put in place of these, such as one synchronised over processes, is called as it is.
FUSIBLE = (nn.GroupNorm, nn.BatchNorm2d, nn.Identity)


def _normed(x: Tensor, norm: nn.Module, with_norms: bool) -> tuple[Tensor, ...]:
    """The normalised values, or, where what follows begins with the norm, all that it takes to compute them."""
    return (x, *norm.parameters()) if with_norms else (norm(x),)


def _gate(gate: Tensor, state: Tensor) -> Tensor:
    return torch.sigmoid(gate) * state


def _inhibit(state: Tensor, drive: Tensor, alpha: Tensor, mu: Tensor, inhibiting: Tensor) -> Tensor:
    return softplus(drive - softplus(inhibiting * torch.addcmul(mu, alpha, state)))


def _excite(
    state: Tensor,
    inhibited: Tensor,
    update: Tensor,
    kappa: Tensor,
    gamma: Tensor,
    omega: Tensor,
    exciting: Tensor,
) -> Tensor:
    candidate = softplus(torch.addcmul(kappa * inhibited, exciting, torch.addcmul(gamma, omega, inhibited)))
    # Under autocast these two may come in a lower precision, which lerp does not promote.
    return softplus(torch.lerp(state, candidate.type_as(state), torch.sigmoid(update).type_as(state)))


@cache
def eager_stages(_channels: int) -> tuple[Fused, Fused, Fused]:
    """The three stages between norms and convolutions, not compiled: those of cells of one width, as shapes differ."""
    return Fused(_gate, compiled=False), Fused(_inhibit, compiled=False), Fused(_excite, compiled=False)


@cache
def compiled_stages(norm: Norm, channels: int) -> tuple[Fused, Fused, Fused]:
    """The three stages between the convolutions, each with the normalisation of what it starts from."""
    normalised = normalise(norm, channels)

    def inhibit(state: Tensor, drive: Tensor, alpha: Tensor, mu: Tensor, *inhibiting: Tensor) -> Tensor:
        return _inhibit(state, drive, alpha, mu, normalised(*inhibiting))

    def excite(
        state: Tensor, inhibited: Tensor, update: Tensor, kappa: Tensor, gamma: Tensor, omega: Tensor, *exciting: Tensor
    ) -> Tensor:
        return _excite(state, inhibited, update, kappa, gamma, omega, normalised(*exciting))

    return Fused(_gate), Fused(inhibit), Fused(excite)
