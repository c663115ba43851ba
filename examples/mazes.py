"""Mazes: find the way between two cells, on larger mazes with more steps than were trained.

    python examples/mazes.py            # about half an hour of one core
    python examples/mazes.py --small    # seconds

A maze is a random spanning tree on a grid of cells, drawn as an image; two cells are marked, and the pixels of the only
way between them are to be found. A pixel sees the eight around it. A dead end is closed pixel by pixel from its
end, so that a larger maze needs more steps, which the same weights take.

The network is trained on small mazes twice, by C-RBP and by BPTT, from the same weights on the same batches.
"""

from __future__ import annotations

import torch
from _common import Inputs, Outcome, Settings, compare
from torch import Tensor, nn
from torch.nn import functional as F

import crbp

# There are 6 912 mazes of 3×3 cells: a network trained on those learns them, not the rule. Of 4×4 there are 12 million.
FULL = Settings(size=4, steps=32, larger=6, more=96, updates=2500, rate=5e-3, batch=64, weight=0.01, terms=8)
SMALL = Settings(size=2, steps=4, larger=3, more=8, updates=40, batch=16, tested=32)
BESIDE = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]])[None, None]


def carve(size: int, generator: torch.Generator) -> Tensor:
    """One maze of ``size`` × ``size`` cells by Kruskal's algorithm on shuffled walls: 1 where a pixel is free."""
    width = 2 * size - 1
    free = torch.zeros(width, width)
    free[::2, ::2] = 1
    part = list(range(size * size))
    walls = [(row, column) for row in range(width) for column in range(width) if (row + column) % 2]
    for index in torch.randperm(len(walls), generator=generator).tolist():
        row, column = walls[index]
        one, other = part[row // 2 * size + column // 2], part[(row + 1) // 2 * size + (column + 1) // 2]
        if one != other:
            free[row, column] = 1
            part = [other if each == one else each for each in part]
    return free


def draw(batch: int, size: int, generator: torch.Generator) -> tuple[Inputs, Tensor]:
    """Random mazes of ``size`` × ``size`` cells, with two cells marked.

    Returns:
        The free pixels and the ends ``(B, H, W)``, and the way between the ends ``(B, H, W)``; H = W = 2 ``size`` − 1.
    """
    free = torch.stack([carve(size, generator) for _ in range(batch)])
    cells = torch.rand(batch, size * size, generator=generator).argsort(1).argsort(1) < 2
    ends = torch.zeros_like(free)
    ends[:, ::2, ::2] = cells.view(batch, size, size).float()
    way, before = free, torch.zeros_like(free)
    while not torch.equal(way, before):
        before = way
        way = free * way * (F.conv2d(way[:, None], BESIDE, padding=1)[:, 0] + ends > 1)
    return (free, ends), way.long()


class MazeSolver(nn.Module):
    """A gated 3×3 convolution, the same step as often as it takes."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.enter = nn.Conv2d(2, 2 * channels, 3, padding=1)
        self.around = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.mix = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.readout = nn.Linear(channels, 2)

    def step(self, h: Tensor, drive: Tensor) -> Tensor:
        """The next state of every pixel, ``(B, C, H, W)``."""
        gate, new = self.mix(torch.relu(self.around(h) + drive)).chunk(2, 1)
        return torch.lerp(h, torch.tanh(new), torch.sigmoid(gate))

    def forward(self, free: Tensor, ends: Tensor, evolve: crbp.Evolve) -> tuple[Tensor, crbp.Run]:
        """Logits ``(B, H, W, 2)``, and the run for penalties and report."""
        drive = self.enter(torch.stack([free, ends], 1))
        run = evolve(lambda h: self.step(h, drive), torch.zeros_like(drive.chunk(2, 1)[0]))
        return self.readout(run.state.permute(0, 2, 3, 1)), run


def main(argv: list[str] | None = None) -> dict[str, Outcome]:
    """Train both ways and print the table."""
    return compare(MazeSolver, draw, full=FULL, small=SMALL, argv=argv)


if __name__ == "__main__":
    main()
