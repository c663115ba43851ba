"""The convolutional GRU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crbp.cells._parts import check_cell, check_shapes, chronos_
from crbp.ops import Conv2d


class ConvGRU(nn.Module):
    """Convolutional gated recurrent unit.

    ```
    r, u = σ(W_g * [x, h] + b_g)            reset and update gate
    h̃    = tanh(W_c * [x, r ⊙ h] + b_c)
    h'   = (1 − u) ⊙ h + u ⊙ h̃
    ```
    State ``h`` and drive ``x`` are ``(B, C, H, W)``. The update gate starts at the bias ``−log U(1, horizon − 1)``.

    Args:
        channels: C.
        kernel_size: side of the square kernels, odd.
        horizon: longest time constant of the update gate in steps, T_max.

    Raises:
        ValueError: for sizes out of range.

    Source: Ballas et al., Delving deeper into convolutional networks for learning video representations, ICLR 2016.
    """

    def __init__(self, channels: int, kernel_size: int, *, horizon: int = 20) -> None:
        super().__init__()
        check_cell(channels, kernel_size)
        self.channels = channels
        self.gates = Conv2d(2 * channels, 2 * channels, kernel_size, bias=True)
        self.candidate = Conv2d(2 * channels, channels, kernel_size, bias=True)
        for conv in (self.gates, self.candidate):
            nn.init.orthogonal_(conv.weight)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        assert self.gates.bias is not None
        with torch.no_grad():
            update_bias = self.gates.bias[channels:]
            chronos_(update_bias, horizon).neg_()

    def initial_state(self, drive: Tensor) -> Tensor:
        """The state to start from: zeros of the shape of the drive ``(B, C, H, W)``."""
        return torch.zeros_like(drive)

    def forward(self, state: Tensor, drive: Tensor) -> Tensor:
        """One step: the next state, of the shape of ``state`` and ``drive``, ``(B, C, H, W)``."""
        check_shapes(state, drive, self.channels)
        reset, update = torch.sigmoid(self.gates(torch.cat([drive, state], dim=1))).chunk(2, dim=1)
        candidate = torch.tanh(self.candidate(torch.cat([drive, reset * state], dim=1)))
        # Under autocast these two may come in a lower precision, which lerp does not promote.
        return torch.lerp(state, candidate.type_as(state), update.type_as(state))

    def readout_of(self, state: Tensor) -> Tensor:
        """What a readout sees of the state: all of it, ``(B, C, H, W)``."""
        return state
