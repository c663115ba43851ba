"""A whole sequence as the state: running parity by a gated cell that listens to its left neighbour until all settle.

    python examples/sequence_gru.py            # under a minute of one core
    python examples/sequence_gru.py --small    # seconds

Each position has a bit and must say whether the number of ones up to it is odd. It sees its own bit, its own state and
that of the position to its left. An answer is certain once the one to the left is: certainty travels one position a
step, so that a longer sequence needs more steps, which the same weights take.

The cell is trained on short sequences twice, by C-RBP and by BPTT, from the same weights on the same batches.
"""

from __future__ import annotations

import torch
from _common import Inputs, Outcome, Settings, compare
from torch import Tensor, nn
from torch.nn import functional as F

import crbp

FULL = Settings(size=8, steps=12, larger=32, more=48, updates=250)
SMALL = Settings(size=3, steps=4, larger=6, more=8, updates=60, batch=16, tested=32)


def draw(batch: int, size: int, generator: torch.Generator) -> tuple[Inputs, Tensor]:
    """Random bits.

    Returns:
        The bits ``(B, L)``, and whether the number of ones up to each is odd, ``(B, L)``.
    """
    bits = torch.randint(2, (batch, size), generator=generator)
    return (bits.float(),), bits.cumsum(1) % 2


class RunningParity(nn.Module):
    """A GRU whose input is the state to the left, at every position at once."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.enter = nn.Linear(2, channels)
        self.gates = nn.Linear(3 * channels, 2 * channels)
        self.new = nn.Linear(3 * channels, channels)
        self.readout = nn.Linear(channels, 2)

    def step(self, h: Tensor, drive: Tensor) -> Tensor:
        """The next state of every position, ``(B, L, C)``."""
        left = F.pad(h, (0, 0, 1, 0))[:, :-1]
        update, reset = torch.sigmoid(self.gates(torch.cat([h, left, drive], -1))).chunk(2, -1)
        return torch.lerp(h, torch.tanh(self.new(torch.cat([reset * h, left, drive], -1))), update)

    def forward(self, bits: Tensor, evolve: crbp.Evolve) -> tuple[Tensor, crbp.Run]:
        """Logits ``(B, L, 2)``, and the run for penalties and report."""
        first = F.pad(torch.zeros_like(bits)[:, 1:], (1, 0), value=1.0)
        drive = self.enter(torch.stack([bits, first], -1))
        run = evolve(lambda h: self.step(h, drive), torch.zeros_like(drive))
        return self.readout(run.state), run


def main(argv: list[str] | None = None) -> dict[str, Outcome]:
    """Train both ways and print the table."""
    return compare(RunningParity, draw, full=FULL, small=SMALL, argv=argv)


if __name__ == "__main__":
    main()
