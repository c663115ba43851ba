"""A graph network at equilibrium: the shortest path from a source to each node, is it even, odd, or is there none?

    python examples/graph_shortest_path.py            # under a minute of one core
    python examples/graph_shortest_path.py --small    # seconds

Nodes hear their neighbours again and again until nothing changes. News of the source travels one edge a step, so a
larger graph needs more steps, which the same weights take. The graphs are random and bipartite, so that the
lengths of neighbours never agree. A part that the source does not reach must stay silent for however long it runs:
there, dynamics that do not contract go wrong.

The network is trained on small graphs twice, by C-RBP and by BPTT, from the same weights on the same batches.
"""

from __future__ import annotations

import torch
from _common import Inputs, Outcome, Settings, compare
from torch import Tensor, nn

import crbp

FULL = Settings(size=12, steps=10, larger=48, more=40, updates=200)
SMALL = Settings(size=6, steps=5, larger=12, more=20, updates=40, batch=16, tested=32)
UNREACHED, EVEN, ODD = range(3)


def draw(batch: int, size: int, generator: torch.Generator) -> tuple[Inputs, Tensor]:
    """Random bipartite graphs of ``size`` nodes with two edges a node on average; node 0 is the source.

    Returns:
        The adjacency matrices ``(B, n, n)`` and the source ``(B, n)``, and the label of each node ``(B, n)``.
    """
    side = torch.rand(batch, size, generator=generator) < 0.5
    linked = torch.rand(batch, size, size, generator=generator) < 4 / size
    linked = (linked & (side[:, :, None] != side[:, None, :])).triu(1)
    edges = (linked | linked.transpose(1, 2)).float()
    source = torch.zeros(batch, size)
    source[:, 0] = 1
    label = torch.full((batch, size), UNREACHED)
    front = source > 0
    for length in range(size):
        label[front] = ODD if length % 2 else EVEN
        front = (torch.einsum("bij,bj->bi", edges, front.float()) > 0) & (label == UNREACHED)
    return (edges, source), label


class GraphNetwork(nn.Module):
    """Gated message passing, the same step as often as it takes."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.enter = nn.Linear(1, channels)
        self.message = nn.Linear(channels, channels, bias=False)
        self.gate = nn.Linear(3 * channels, channels)
        self.new = nn.Linear(2 * channels, channels)
        self.readout = nn.Linear(channels, 3)

    def step(self, h: Tensor, edges: Tensor, drive: Tensor) -> Tensor:
        """One round of messages: the next state of every node, ``(B, n, C)``."""
        heard = torch.tanh(edges @ self.message(h))
        gate = torch.sigmoid(self.gate(torch.cat([h, heard, drive], -1)))
        return torch.lerp(h, torch.tanh(self.new(torch.cat([heard, drive], -1))), gate)

    def forward(self, edges: Tensor, source: Tensor, evolve: crbp.Evolve) -> tuple[Tensor, crbp.Run]:
        """Logits ``(B, n, 3)``, and the run for penalties and report."""
        drive = self.enter(source[..., None])
        run = evolve(lambda h: self.step(h, edges, drive), torch.zeros_like(drive))
        return self.readout(run.state), run


def main(argv: list[str] | None = None) -> dict[str, Outcome]:
    """Train both ways and print the table."""
    return compare(GraphNetwork, draw, full=FULL, small=SMALL, argv=argv)


if __name__ == "__main__":
    main()
