"""An implicit layer in a transformer: one block of attention and MLP, iterated until it settles, follows pointers.

    python examples/transformer_layer.py            # under a minute of one core
    python examples/transformer_layer.py --small    # seconds

Each token has a name, the name of its parent, and, where it is a root and so its own parent, a label. Every token must
say the label of its root. One pass of the block can ask the parent; a longer chain needs more passes, which the
same weights take. The order of the tokens and their names are shuffled: only the names tell who is whose parent.

Who listens to whom depends on names alone, so the attention weights are made once, outside the step: the gradient
reaches whatever a step closes over. The block is trained on short chains twice, by C-RBP and by BPTT, from the same
weights on the same batches.
"""

from __future__ import annotations

import torch
from _common import Inputs, Outcome, Settings, compare
from torch import Tensor, nn

import crbp

NAMES, LABELS, ROOTS = 12, 4, 2
FULL = Settings(size=6, steps=6, larger=12, more=24, updates=200, rate=5e-3)
SMALL = Settings(size=3, steps=2, larger=4, more=4, updates=40, batch=16, tested=32)


def draw(batch: int, size: int, generator: torch.Generator) -> tuple[Inputs, Tensor]:
    """Random forests of two trees: the parent of a node is one of the two before it.

    Returns:
        The names, the parents' names and the labels shown (``LABELS`` where none is), and the labels of the roots, each
        ``(B, n)``.
    """
    name = torch.rand(batch, NAMES, generator=generator).argsort(1)[:, :size]
    node = torch.arange(size)
    parent = node - torch.randint(1, 3, (batch, size), generator=generator)
    parent[:, :ROOTS] = node[:ROOTS]
    label = torch.randint(LABELS, (batch, size), generator=generator)
    root = parent
    for _ in range(size):
        root = parent.gather(1, root)
    tokens = (name, name.gather(1, parent), torch.where(parent == node, label, LABELS))
    order = torch.rand(batch, size, generator=generator).argsort(1)
    return tuple(each.gather(1, order) for each in tokens), label.gather(1, root).gather(1, order)


class ImplicitTransformer(nn.Module):
    """One block, post-normalised, which is given the tokens anew at every step."""

    def __init__(self, channels: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.name = nn.Embedding(NAMES, channels)
        self.parent = nn.Embedding(NAMES, channels)
        self.shown = nn.Embedding(LABELS + 1, channels)
        self.ask = nn.Linear(channels, 2 * channels, bias=False)
        self.tell = nn.Linear(channels, channels, bias=False)
        self.hear = nn.Linear(channels, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.readout = nn.Linear(channels, LABELS)

    def attention(self, tokens: Tensor) -> Tensor:
        """Who listens to whom, ``(B, heads, n, n)``: a matter of names, so the same at every step."""
        query, key = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.ask(tokens).chunk(2, -1))
        return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)

    def step(self, h: Tensor, weights: Tensor, drive: Tensor) -> Tensor:
        """The next state of every token, ``(B, n, C)``."""
        told = self.tell(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        heard = self.norms[0](drive + self.hear((weights @ told).transpose(1, 2).flatten(2)))
        return self.norms[1](heard + self.mlp(heard))

    def forward(self, names: Tensor, parents: Tensor, shown: Tensor, evolve: crbp.Evolve) -> tuple[Tensor, crbp.Run]:
        """Logits ``(B, n, LABELS)``, and the run for penalties and report."""
        tokens = self.name(names) + self.parent(parents)
        weights, drive = self.attention(tokens), tokens + self.shown(shown)
        run = evolve(lambda h: self.step(h, weights, drive), torch.zeros_like(drive))
        return self.readout(run.state), run


def main(argv: list[str] | None = None) -> dict[str, Outcome]:
    """Train both ways and print the table."""
    return compare(ImplicitTransformer, draw, full=FULL, small=SMALL, argv=argv)


if __name__ == "__main__":
    main()
