"""Gradients of several processes beside those of one on the same images."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked_ranks import in_ranks
from tiny_contours import LEAF_SPEC, Lines, tiny_net
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import crbp
from crbp.losses import focal_loss
from crbp.models import PathfinderNet
from crbp.tasks.sampling import stacked

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks its processes"),
    pytest.mark.filterwarnings(LEAF_SPEC),
    # The processes are forked from one with a single thread of torch; Python cannot know that the others are idle.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]

SOLVERS = {
    "Neumann": crbp.Neumann(terms=15),
    "Anderson": crbp.Anderson(terms=100, tolerance=1e-12),
    "GMRES": crbp.GMRES(terms=60, tolerance=1e-12),
}
METHODS: dict[str, crbp.GradientMethod] = {
    "BPTT": crbp.BPTT(),
    "TruncatedBPTT": crbp.TruncatedBPTT(window=3),
    "CheckpointedBPTT": crbp.CheckpointedBPTT(),
    "OneStep": crbp.OneStep(),
    "Phantom": crbp.Phantom(window=3),
    **{f"RBP, {name}": crbp.RBP(solver) for name, solver in SOLVERS.items()},
}
REDUCTIONS = ("mean_square", "sum_square")


class Contracting(nn.Module):
    """A cell whose Jacobian is well below 1, so that every solver converges."""

    channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, state: Tensor, drive: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.kernel(state) + drive)

    def initial_state(self, drive: Tensor) -> Tensor:
        return torch.zeros_like(drive)

    def readout_of(self, state: Tensor) -> Tensor:
        return state


def settled_net(method: crbp.GradientMethod) -> PathfinderNet:
    torch.manual_seed(0)
    return PathfinderNet(Contracting(), crbp.Evolve(steps=12, gradient=method)).double()


def c_rbp_net() -> PathfinderNet:
    return tiny_net(crbp.RBP(crbp.Neumann(terms=3), on_divergence="fallback")).double()


def images(count: int) -> tuple[Tensor, Tensor]:
    image, mask = stacked(Lines().items("train", count, 0), count)
    return image.double(), mask


def gradient(
    net: Any, parts: list[tuple[Tensor, Tensor]], *, reduction: str | None = None, weight: float = 1.0
) -> dict[str, Tensor]:
    """The gradient of the mean loss of some batches, of which the processes are told at the last, as Lightning does."""
    net.zero_grad()
    for place, (image, mask) in enumerate(parts):
        waits = isinstance(net, DistributedDataParallel) and place < len(parts) - 1
        with net.no_sync() if waits else contextlib.nullcontext():
            prediction = net(image)
            loss = focal_loss(prediction.logits, mask)
            if reduction is not None:
                kind: Any = reduction
                loss = loss + weight * crbp.lipschitz_penalty(prediction.run, bound=0.0, reduction=kind)
            (loss / len(parts)).backward()
    return {name.removeprefix("module."): p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def of_every_method(rank: int, count: int, accumulated: int) -> dict[str, Any]:
    """The gradients of each method, and of C-RBP with each penalty that is a mean or a sum over images."""
    world = dist.get_world_size()
    image, mask = images(count)
    # As `EpochSampler` shares the images out: batch after batch of all processes, every `world`-th of them here.
    batches = zip(image.chunk(accumulated), mask.chunk(accumulated), strict=True)
    mine = [(image[rank::world], mask[rank::world]) for image, mask in batches]
    found = {name: gradient(DistributedDataParallel(settled_net(method)), mine) for name, method in METHODS.items()}
    for reduction in REDUCTIONS:
        # A sum over a process's images is one over all in the mean of the processes only once it is multiplied.
        weight = float(world * accumulated) if reduction == "sum_square" else 1.0
        net = DistributedDataParallel(c_rbp_net())
        found[f"C-RBP, {reduction}"] = gradient(net, mine, reduction=reduction, weight=weight)
    return found


@pytest.mark.parametrize(("processes", "accumulated"), [(2, 1), (4, 1), (2, 2)])
def test_processes_have_the_gradient_of_one_on_all_images(processes: int, accumulated: int, tmp_path: Path) -> None:
    ranks = in_ranks(processes, of_every_method, 8, accumulated, folder=tmp_path)
    alone = {name: gradient(settled_net(method), [images(8)]) for name, method in METHODS.items()}
    alone |= {f"C-RBP, {kind}": gradient(c_rbp_net(), [images(8)], reduction=kind) for kind in REDUCTIONS}
    for name, wanted in alone.items():
        for rank, found in enumerate(ranks):
            assert found[name].keys() == wanted.keys()
            for parameter, value in wanted.items():
                error = torch.linalg.vector_norm(found[name][parameter] - value) / torch.linalg.vector_norm(value)
                assert error < 1e-6, f"{name}, {parameter}, process {rank}: {error:.1e}"


def of_uneven_batches(rank: int) -> dict[str, Tensor]:
    image, mask = images(3)
    mine = slice(0, 2) if rank == 0 else slice(2, 3)
    return gradient(DistributedDataParallel(settled_net(crbp.OneStep())), [(image[mine], mask[mine])])


def test_uneven_batches_would_weigh_their_images_unequally(tmp_path: Path) -> None:
    """The mean over processes gives each process the same say; this is why training leaves uneven batches out."""
    found = in_ranks(2, of_uneven_batches, folder=tmp_path)[0]
    image, mask = images(3)
    net = settled_net(crbp.OneStep())
    two, one, all_three = (gradient(net, [(image[part], mask[part])]) for part in (slice(2), slice(2, 3), slice(3)))
    for name, value in found.items():
        torch.testing.assert_close(value, (two[name] + one[name]) / 2)
        torch.testing.assert_close(all_three[name], (2 * two[name] + one[name]) / 3)
    assert any(not torch.allclose(value, all_three[name], rtol=1e-3) for name, value in found.items())
