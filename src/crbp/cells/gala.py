"""The hGRU with a gate of global and local attention: the mask head of the recurrent Panoptic FPN."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crbp._checks import count
from crbp.cells._parts import PointwiseConv2d, check_cell, check_shapes, chronos_
from crbp.ops import Conv2d, softplus


class GALAHGRU(nn.Module):
    """Horizontal gated recurrent unit whose first gate attends, the variant used for instance masks.

    ```
    channel = A1 φ(A0 h)                    what to attend to: 1×1, C → C/4 → C
    spatial = S1 * φ(S0 * h + b_s)          where: k×k, C → C/2 → 1
    g1 = σ(channel ⊙ spatial + b)           gate of what inhibits
    c1 = norm(W_inh * (g1 ⊙ h))
    z  = φ(x − c1 ⊙ (α h + μ))              inhibition
    g2 = σ(U z)                             gate of what is updated
    h̃  = φ(norm(W_exc * z))                 excitation
    h' = (1 − g2) ⊙ h + g2 ⊙ h̃
    ```
    ``h`` is the state and ``x`` the drive, both ``(B, C, H, W)``; ``φ`` is softplus, ``*`` a convolution that keeps the
    size, ``norm`` a group norm, and α, μ, b hold one number a channel. ``b`` starts at ``log U(1, horizon − 1)`` and
    the bias of ``U`` at its negative; kernels start Kaiming-normal. With 256 channels there are 1 576 256 parameters.

    Args:
        channels: C, a multiple of 4 and of ``groups``.
        kernel_size: side of the square kernels, odd.
        groups: of the group norms.
        norm_scale: start of the scales of the group norms.
        horizon: longest time constant of the gates in steps, T_max; the number of steps trained for.

    Raises:
        ValueError: for sizes out of range.

    Source: Linsley et al., Stable and expressive recurrent vision models, NeurIPS 2020, supplement.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        *,
        groups: int = 32,
        norm_scale: float = 0.1,
        horizon: int = 20,
    ) -> None:
        super().__init__()
        check_cell(channels, kernel_size)
        count("groups", groups)
        if channels % 4 or channels % groups:
            raise ValueError(f"channels must be a multiple of 4 and of groups={groups}, not {channels}")
        self.channels = channels
        self.inhibition = Conv2d(channels, channels, kernel_size)
        self.excitation = Conv2d(channels, channels, kernel_size)
        self.channel_squeeze = nn.Conv2d(channels, channels // 4, 1)
        self.channel_expand = nn.Conv2d(channels // 4, channels, 1, bias=False)
        self.spatial_squeeze = Conv2d(channels, channels // 2, kernel_size, bias=True)
        self.spatial_map = Conv2d(channels // 2, 1, kernel_size)
        self.attention_bias = nn.Parameter(torch.empty(channels, 1, 1))
        self.update_gate = PointwiseConv2d(channels)
        self.inhibition_norm = nn.GroupNorm(groups, channels)
        self.excitation_norm = nn.GroupNorm(groups, channels)
        self.alpha = nn.Parameter(torch.full((channels, 1, 1), 0.1))
        self.mu = nn.Parameter(torch.full((channels, 1, 1), 1.0))
        self._start(norm_scale, horizon)

    def _start(self, norm_scale: float, horizon: int) -> None:
        for layer in self.children():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        for norm in (self.inhibition_norm, self.excitation_norm):
            nn.init.constant_(norm.weight, norm_scale)
        chronos_(self.attention_bias, horizon)
        assert self.update_gate.bias is not None
        with torch.no_grad():
            self.update_gate.bias.copy_(-self.attention_bias.flatten())

    def initial_state(self, drive: Tensor) -> Tensor:
        """The state to start from: zeros of the shape of the drive ``(B, C, H, W)``."""
        return torch.zeros_like(drive)

    def forward(self, state: Tensor, drive: Tensor) -> Tensor:
        """One step: the next state, of the shape of ``state`` and ``drive``, ``(B, C, H, W)``."""
        check_shapes(state, drive, self.channels)
        channel = self.channel_expand(softplus(self.channel_squeeze(state)))
        spatial = self.spatial_map(softplus(self.spatial_squeeze(state)))
        attention = torch.sigmoid(torch.addcmul(self.attention_bias, channel, spatial))
        inhibition = self.inhibition_norm(self.inhibition(attention * state))
        inhibited = softplus(drive - inhibition * torch.addcmul(self.mu, self.alpha, state))
        update = torch.sigmoid(self.update_gate(inhibited))
        candidate = softplus(self.excitation_norm(self.excitation(inhibited)))
        # Under autocast these two may come in a lower precision, which lerp does not promote.
        return torch.lerp(state, candidate.type_as(state), update.type_as(state))

    def readout_of(self, state: Tensor) -> Tensor:
        """What a readout sees of the state: all of it, ``(B, C, H, W)``."""
        return state
