"""The plain C-RBP that speeds are measured against computes what crbp computes: same state, loss and gradients."""

import pytest
import torch

import crbp
from crbp.bench.measure import textbook
from crbp.cells import hgru
from crbp.losses import focal_loss
from crbp.models import PathfinderNet
from crbp.ops import _native, convolution, winograd

STEPS, TERMS, WEIGHT = 6, 5, 10.0
COMPILED = pytest.mark.skipif(_native.found() is None, reason="there is no C++ compiler here")


def both(channels, kernel_size, *, method="auto", fused=False):
    """crbp's net and the textbook's with the same weights, none at its start value, in float64."""
    rbp = crbp.RBP(crbp.Neumann(terms=TERMS), max_residual=float("inf"))
    cell = crbp.cells.HGRU(channels, kernel_size, norm_scale=2.0, fused=fused)
    cell.inhibition.method = cell.excitation.method = method
    ours = PathfinderNet(cell, crbp.Evolve(steps=STEPS, gradient=rbp)).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs = textbook().TextbookNet(channels, kernel_size).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.fixture
def nets():
    return both(4, 5)


@pytest.fixture
def batch():
    return images(12, 10)


def images(height, width):
    return torch.rand(2, 1, height, width, dtype=torch.float64), torch.rand(2, height, width) > 0.8


@pytest.fixture
def taken(monkeypatch):
    """The ways other than the direct one in which kernels have been applied so far."""
    found = set()
    by_fft, by_winograd = convolution.correlate, winograd.correlate

    def fft(image, transformed, frame, *rest):
        found.add("native fft" if frame.native else "fft")
        return by_fft(image, transformed, frame, *rest)

    def tiles(*arguments):
        found.add("winograd")
        return by_winograd(*arguments)

    monkeypatch.setattr(convolution, "correlate", fft)
    monkeypatch.setattr(winograd, "correlate", tiles)
    return found


def same(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10 * wanted.detach().abs().max().item())


def assert_one_training_step(ours, theirs, image, mask, weight):
    loss, gradients = textbook().training_step(theirs, image, mask, steps=STEPS, terms=TERMS, weight=weight)
    prediction = ours(image)
    penalty = crbp.lipschitz_penalty(prediction.run, reduction="mean_square")
    wanted = focal_loss(prediction.logits, mask) + weight * penalty
    wanted.backward()
    assert penalty > 0
    same(loss, wanted.detach())
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        same(gradients[name], parameter.grad)


def test_weights_go_both_ways(nets):
    ours, theirs = nets
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_the_state_is_the_same(nets, batch):
    ours, theirs = nets
    previous, last = theirs.run(batch[0], STEPS)
    run = ours(batch[0]).run
    same(run.state, last)
    same(theirs(batch[0], STEPS), ours(batch[0]).logits)
    assert not torch.allclose(previous, last)


@pytest.mark.parametrize("weight", [0.0, WEIGHT])
@pytest.mark.parametrize(
    ("method", "channels", "kernel_size", "size", "ways"),
    [
        ("auto", 4, 5, (12, 10), set()),
        pytest.param("auto", 4, 15, (16, 16), {"native fft"}, marks=COMPILED),
        pytest.param("fft", 4, 5, (12, 10), {"native fft"}, marks=COMPILED),
        pytest.param("winograd", 4, 3, (12, 10), {"winograd"}, marks=COMPILED),
    ],
)
def test_loss_and_gradients_are_the_same_by_every_method(taken, method, channels, kernel_size, size, ways, weight):
    assert_one_training_step(*both(channels, kernel_size, method=method), *images(*size), weight)
    assert taken == ways


def test_loss_and_gradients_are_the_same_without_a_compiler(taken, monkeypatch, batch):
    monkeypatch.setattr(convolution, "found", lambda: None)
    assert_one_training_step(*both(4, 5, method="fft"), *batch, WEIGHT)
    assert taken == {"fft"}


# Raised inside PyTorch while it compiles.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.slow
@COMPILED
def test_loss_and_gradients_are_the_same_by_fused_operations(taken, batch):
    hgru.compiled_stages.cache_clear()
    assert_one_training_step(*both(4, 5, method="fft", fused=True), *batch, WEIGHT)
    assert taken == {"native fft"}
    assert all(stage.compile_seconds > 0 for stage in hgru.compiled_stages("instance", 4))


def test_the_series_and_the_penalty_both_have_a_say(nets, batch):
    _, theirs = nets
    found = [
        textbook().training_step(theirs, *batch, steps=STEPS, terms=terms, weight=weight)[1]["cell.mu"].clone()
        for terms, weight in [(TERMS, WEIGHT), (TERMS, 0.0), (TERMS - 1, WEIGHT)]
    ]
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
