"""The plain C-RBP that speeds are measured against computes what crbp computes: same state, loss and gradients."""

import pytest
import torch

import crbp
from crbp.bench.measure import textbook
from crbp.losses import focal_loss
from crbp.models import PathfinderNet

STEPS, TERMS, WEIGHT = 6, 5, 10.0


@pytest.fixture
def nets():
    """crbp's net and the textbook's with the same weights, none at its start value, in float64."""
    rbp = crbp.RBP(crbp.Neumann(terms=TERMS), max_residual=float("inf"))
    ours = PathfinderNet(crbp.cells.HGRU(4, 5, norm_scale=2.0), crbp.Evolve(steps=STEPS, gradient=rbp)).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs = textbook().TextbookNet(4, 5).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.fixture
def batch():
    return torch.rand(2, 1, 12, 10, dtype=torch.float64), torch.rand(2, 12, 10) > 0.8


def same(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10 * wanted.detach().abs().max().item())


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
def test_loss_and_gradients_are_the_same(nets, batch, weight):
    ours, theirs = nets
    image, mask = batch
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


def test_the_series_and_the_penalty_both_have_a_say(nets, batch):
    _, theirs = nets
    found = [
        textbook().training_step(theirs, *batch, steps=STEPS, terms=terms, weight=weight)[1]["cell.mu"].clone()
        for terms, weight in [(TERMS, WEIGHT), (TERMS, 0.0), (TERMS - 1, WEIGHT)]
    ]
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
