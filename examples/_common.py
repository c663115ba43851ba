"""What the examples share: train a module by C-RBP and by BPTT on the same batches, measure both, print the table."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import crbp

Inputs = tuple[Tensor, ...]
Draw = Callable[[int, int, torch.Generator], tuple[Inputs, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How an example trains and what it is tested on.

    Attributes:
        size: of the instances trained on, in the unit of the example.
        steps: the N trained for.
        larger: size of the larger instances.
        more: steps that these are given.
        updates: of the optimiser.
        rate: peak learning rate.
        batch: instances of one update.
        tested: instances of each test.
        weight: of the penalties of C-RBP.
        terms: of the Neumann series of C-RBP, at most.
        seed: of weights and data.
    """

    size: int
    steps: int
    larger: int
    more: int
    updates: int
    rate: float = 1e-2
    batch: int = 32
    tested: int = 256
    weight: float = 1.0
    terms: int = 15
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one way of training came to.

    Attributes:
        losses: of each update, without penalties.
        accuracy: share of right labels at N, at 4N, and on larger instances with more steps.
        solved: share of the larger instances that have no wrong label.
        residual: relative residual of the last step at 4N.
        stable: share of instances whose spectral radius at 4N is below 1.
        kept: bytes that autograd keeps for one update at N and at 4N.
        seconds: of the processor, spent in training.
    """

    losses: list[float]
    accuracy: tuple[float, float, float]
    solved: float
    residual: float
    stable: float
    kept: tuple[int, int]
    seconds: float


def objective(
    net: nn.Module, inputs: Inputs, target: Tensor, evolve: crbp.Evolve, weight: float
) -> tuple[Tensor, Tensor]:
    """The loss, and what is minimised: the same, with the penalties of C-RBP where their ``weight`` is above 0."""
    logits, run = net(*inputs, evolve)
    loss = F.cross_entropy(logits.flatten(0, -2), target.flatten())
    if weight == 0:
        return loss, loss
    contraction = crbp.lipschitz_penalty(run, reduction="mean_square")
    return loss, loss + weight * (contraction + crbp.residual_penalty(run) + crbp.spectral_penalty(run))


def train(net: nn.Module, draw: Draw, settings: Settings, evolve: crbp.Evolve, weight: float) -> list[float]:
    """Train a module in place; returns the loss of each update."""
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.Adam(net.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.rate, total_steps=settings.updates, pct_start=0.1)
    losses = []
    for update in range(settings.updates):
        inputs, target = draw(settings.batch, settings.size, generator)
        # Strong penalties from the start slow learning.
        ramp = 100 ** min(update / (0.8 * settings.updates) - 1, 0)
        loss, total = objective(net, inputs, target, evolve, weight * ramp)
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        rate.step()
        losses.append(loss.item())
    return losses


def kept(net: nn.Module, draw: Draw, settings: Settings, evolve: crbp.Evolve, weight: float) -> int:
    """Bytes that autograd keeps for one update, parameters and data aside."""
    inputs, target = draw(settings.batch, settings.size, torch.Generator().manual_seed(settings.seed))
    with crbp.activation_memory(exclude=[*net.parameters(), *inputs, target]) as memory:
        total = objective(net, inputs, target, evolve, weight)
    del total
    return memory.bytes


@torch.no_grad()
def score(net: nn.Module, draw: Draw, settings: Settings, steps: int, size: int) -> tuple[float, float, crbp.Run]:
    """Share of right labels, share of instances without a wrong one, and the run."""
    inputs, target = draw(settings.tested, size, torch.Generator().manual_seed(settings.seed + 1))
    logits, run = net(*inputs, crbp.Evolve(steps=steps))
    right = (logits.argmax(-1) == target).flatten(1)
    return right.float().mean().item(), right.all(1).float().mean().item(), run


def measure(build: Callable[[], nn.Module], draw: Draw, settings: Settings, *, contract: bool) -> Outcome:
    """Train by C-RBP (``contract``) or by BPTT, from the same weights on the same batches, and measure."""
    torch.manual_seed(settings.seed)
    net = build()
    gradient = crbp.RBP(crbp.Neumann(terms=settings.terms), on_divergence="fallback") if contract else crbp.BPTT()
    evolve = crbp.Evolve(steps=settings.steps, gradient=gradient)
    weight = settings.weight if contract else 0.0
    start = time.process_time()
    losses = train(net, draw, settings, evolve, weight)
    seconds = time.process_time() - start
    far = 4 * settings.steps
    near, _, _ = score(net, draw, settings, settings.steps, settings.size)
    later, _, run = score(net, draw, settings, far, settings.size)
    larger, solved, _ = score(net, draw, settings, settings.more, settings.larger)
    radius = crbp.spectral_radius(run, per_sample=True).radius
    return Outcome(
        losses=losses,
        accuracy=(near, later, larger),
        solved=solved,
        residual=run.report.residual,
        stable=(radius < 1).float().mean().item(),
        kept=(
            kept(net, draw, settings, evolve, weight),
            kept(net, draw, settings, replace(evolve, steps=far), weight),
        ),
        seconds=seconds,
    )


def guessing(draw: Draw, settings: Settings) -> float:
    """Share of right labels on the larger instances when all get the commonest."""
    _, target = draw(settings.tested, settings.larger, torch.Generator().manual_seed(settings.seed + 1))
    return target.flatten().bincount().max().item() / target.numel()


def table(settings: Settings, crbp_: Outcome, bptt: Outcome, guessed: float) -> str:
    """Both outcomes side by side, in Markdown."""
    far = 4 * settings.steps
    both = (crbp_, bptt)
    rows = [
        ("", "C-RBP", "BPTT"),
        ("---", "---", "---"),
        (f"right at N = {settings.steps}", *(f"{one.accuracy[0]:.3f}" for one in both)),
        (f"right at 4N = {far}", *(f"{one.accuracy[1]:.3f}" for one in both)),
        (
            f"right at size {settings.larger}, {settings.more} steps (commonest label: {guessed:.3f})",
            *(f"{one.accuracy[2]:.3f}" for one in both),
        ),
        ("of these, without a mistake", *(f"{one.solved:.0%}" for one in both)),
        ("relative residual at 4N", *(f"{one.residual:.1e}" for one in both)),
        ("spectral radius below 1 at 4N", *(f"{one.stable:.0%}" for one in both)),
        ("kept by autograd at N, at 4N (KiB)", *(", ".join(f"{size / 1024:.0f}" for size in one.kept) for one in both)),
        ("training, seconds of one core", *(f"{one.seconds:.0f}" for one in both)),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def compare(
    build: Callable[[], nn.Module],
    draw: Draw,
    *,
    full: Settings,
    small: Settings,
    argv: list[str] | None = None,
) -> dict[str, Outcome]:
    """Train both ways, print the table, and return what it says, by gradient."""
    parser = argparse.ArgumentParser(description="Train one module by C-RBP and by BPTT, and print what came of it.")
    parser.add_argument("--small", action="store_true", help="a run of seconds, to see that it works")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = replace(small if given.small else full, seed=given.seed)
    found = {name: measure(build, draw, settings, contract=name == "C-RBP") for name in ("C-RBP", "BPTT")}
    print(table(settings, found["C-RBP"], found["BPTT"], guessing(draw, settings)))
    return found
