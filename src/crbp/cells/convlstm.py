"""The convolutional LSTM: a cell whose state is a pair of tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crbp.cells._parts import check_cell, check_shapes, chronos_
from crbp.ops import Conv2d

State = tuple[Tensor, Tensor]


class ConvLSTM(nn.Module):
    """Convolutional LSTM without peepholes.

    ```
    i, f, o, a = W * [x, h] + b
    c' = σ(f) ⊙ c + σ(i) ⊙ tanh(a)
    h' = σ(o) ⊙ tanh(c')
    ```
    The state is the pair ``(h, c)``; both and the drive ``x`` are ``(B, C, H, W)``. The forget gate starts at the bias
    ``log U(1, horizon − 1)`` and the input gate at its negative.

    Args:
        channels: C.
        kernel_size: side of the square kernels, odd.
        horizon: longest time constant of the gates in steps, T_max. The number of steps trained for, or less: under
            `crbp.RBP` 3 learnt more on contours of 5 dashes (docs/diagnose.md).

    Raises:
        ValueError: for sizes out of range.

    Source: Shi et al., Convolutional LSTM network, NeurIPS 2015.
    """

    def __init__(self, channels: int, kernel_size: int, *, horizon: int = 20) -> None:
        super().__init__()
        check_cell(channels, kernel_size)
        self.channels = channels
        self.gates = Conv2d(2 * channels, 4 * channels, kernel_size, bias=True)
        nn.init.orthogonal_(self.gates.weight)
        assert self.gates.bias is not None
        nn.init.zeros_(self.gates.bias)
        with torch.no_grad():
            input_bias, forget_bias = self.gates.bias[:channels], self.gates.bias[channels : 2 * channels]
            chronos_(forget_bias, horizon)
            input_bias.copy_(-forget_bias)

    def initial_state(self, drive: Tensor) -> State:
        """The state to start from: two tensors of zeros of the shape of the drive ``(B, C, H, W)``."""
        return torch.zeros_like(drive), torch.zeros_like(drive)

    def forward(self, state: State, drive: Tensor) -> State:
        """One step: the next pair ``(h, c)``, each ``(B, C, H, W)``."""
        hidden, memory = state
        check_shapes(hidden, drive, self.channels)
        check_shapes(memory, drive, self.channels)
        entry, forget, output, new = self.gates(torch.cat([drive, hidden], dim=1)).chunk(4, dim=1)
        memory = torch.sigmoid(forget) * memory + torch.sigmoid(entry) * torch.tanh(new)
        return torch.sigmoid(output) * torch.tanh(memory), memory

    def readout_of(self, state: State) -> Tensor:
        """What a readout sees of the state: ``h``, ``(B, C, H, W)``."""
        return state[0]
