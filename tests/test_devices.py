"""That a training step runs where its model is: nothing of it is made on the CPU beside a model on another device.

PyTorch's device ``meta``, whose tensors have no values, stands in for a GPU. As there, an operation on tensors of two
devices is an error, and so is a kernel that is for the CPU alone. What it does not show: compiled stages, autocast, and
state of threads, of which backward passes on a GPU have their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import crbp
from crbp.bench.measure import textbook, training_step
from crbp.cells import GALAHGRU, HGRU, ConvGRU, ConvLSTM
from crbp.models import PathfinderNet
from crbp.ops import Conv2d


class Elsewhere(TorchDispatchMode):
    """Refuses what a GPU would; where values are read, or taken to the CPU, they are true, or one half."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype is torch.bool else 0.5
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.full(args[0].shape, 0.5, dtype=kwargs.get("dtype", args[0].dtype), device="cpu")
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor) and each.dim()]
        if len({each.device for each in tensors}) > 1:
            raise RuntimeError(f"{func} of tensors of two devices: {[(each.shape, each.device) for each in tensors]}")
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "autocast", lambda device, **_: nullcontext())  # which knows no such device
    with Elsewhere():
        yield


def images() -> tuple[Tensor, Tensor]:
    return torch.rand(2, 1, 20, 20, device="meta"), torch.rand(2, 20, 20, device="meta") > 0.5


def gradients_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_elsewhere(loss: Tensor, gradients: dict[str, Tensor], module: torch.nn.Module) -> None:
    assert loss.is_meta
    assert set(gradients) == {name for name, _ in module.named_parameters()}
    assert all(each.is_meta for each in gradients.values())


def test_what_a_gpu_would_refuse_is_refused() -> None:
    """What the others rest on."""
    for operation in (torch.add, torch.mm):
        with pytest.raises(RuntimeError, match="two devices"):
            operation(torch.rand(3, 3, device="meta"), torch.rand(3, 3))
    for_the_cpu = Conv2d(4, 4, 3, method="winograd").to("meta")
    with pytest.raises(ValueError, match="on a CPU"):
        for_the_cpu(torch.rand(1, 4, 8, 8, device="meta"))


GRADIENTS = [
    crbp.RBP(crbp.Neumann(terms=3)),
    crbp.RBP(crbp.Neumann(terms=3, tolerance=0.1)),
    crbp.RBP(crbp.GMRES(terms=3)),
    crbp.RBP(crbp.Anderson(terms=3)),
    crbp.BPTT(),
    crbp.TruncatedBPTT(window=2),
    crbp.CheckpointedBPTT(),
    crbp.OneStep(),
    crbp.Phantom(window=2, damping=0.5),
]


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
@pytest.mark.parametrize("method", ["auto", "direct", "fft"])
def test_every_gradient_and_convolution(gradient: crbp.GradientMethod, method: Any) -> None:
    net = PathfinderNet(HGRU(4, 5), crbp.Evolve(steps=4, gradient=gradient)).to("meta")
    assert isinstance(net.cell, HGRU)
    net.cell.inhibition.method = net.cell.excitation.method = method
    assert_elsewhere(*training_step(net, *images(), weight=10.0), net)


@pytest.mark.parametrize("cell", [HGRU, ConvGRU, ConvLSTM])
def test_every_cell_and_penalty(cell: Any) -> None:
    net = PathfinderNet(cell(4, 5), crbp.Evolve(steps=4, gradient=crbp.RBP(), tolerance=0.01)).to("meta")
    image, _ = images()
    prediction = net(image)
    assert prediction.run is not None
    penalties = (
        crbp.lipschitz_penalty(prediction.run)
        + crbp.residual_penalty(prediction.run)
        + crbp.spectral_penalty(prediction.run)
        + crbp.jacobian_frobenius_penalty(prediction.run)
    )
    loss = prediction.logits.square().mean() + penalties
    loss.backward()
    assert_elsewhere(loss, gradients_of(net), net)


def test_the_cell_of_masks() -> None:
    cell, drive = GALAHGRU(32).to("meta"), torch.rand(2, 32, 14, 14, device="meta")
    evolve = crbp.Evolve(steps=4, gradient=crbp.RBP())
    loss = evolve(lambda state: cell(state, drive), cell.initial_state(drive)).state.square().mean()
    loss.backward()
    assert_elsewhere(loss, gradients_of(cell), cell)


def test_what_speed_is_measured_against() -> None:
    net = textbook().TextbookNet(4, 5).to("meta")
    loss, gradients = textbook().training_step(net, *images(), steps=4, terms=3, weight=10.0)
    assert_elsewhere(loss, gradients, net)
