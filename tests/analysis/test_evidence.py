"""The evidential reading of logits is the formula, and says what it should where the answer is known."""

import math

import pytest
import torch

from crbp.analysis import evidential_uncertainty, reaction_time


def test_uncertainty_is_the_formula():
    logits = torch.tensor([[3.0, -20.0], [-400.0, 7.0], [500.0, 0.0]])  # three classes, two pixels
    found = evidential_uncertainty(logits, dim=0)
    for pixel in range(2):
        evidence = [math.exp(min(10, max(-10, value / 10))) for value in logits[:, pixel].tolist()]
        assert found[pixel].item() == pytest.approx(3 / sum(e + 1 for e in evidence), rel=1e-5)


def test_uncertainty_falls_with_evidence_and_stays_within_its_bounds():
    size = torch.tensor([-1e9, -100.0, -10.0, 0.0, 10.0, 100.0, 1e9])
    found = evidential_uncertainty(torch.stack([size, torch.zeros_like(size)], dim=1))
    assert (found.diff() <= 0).all()
    assert (found > 0).all()
    assert (found < 1).all()
    assert found[3].item() == pytest.approx(0.5)  # one unit of evidence for each of two classes
    nothing = evidential_uncertainty(torch.full((1, 4, 2, 2), -1e9))
    torch.testing.assert_close(nothing, torch.full((1, 2, 2), 1 / (1 + math.exp(-10))))


def test_reaction_time_is_the_area_under_a_line():
    steps = torch.arange(1.0, 9.0)
    line = torch.stack([2.0 + 0 * steps, steps], dim=1)  # (T, 2): exact for the trapezoid rule
    torch.testing.assert_close(reaction_time(line), torch.tensor([14.0, (64 - 1) / 2]))
    torch.testing.assert_close(reaction_time(line.T, dim=1), reaction_time(line))


def test_reaction_time_is_linear_so_that_of_a_mean_is_the_mean():
    pixels = torch.rand(6, 5, 4)
    torch.testing.assert_close(reaction_time(pixels).mean(), reaction_time(pixels.mean(dim=(1, 2))))


def test_one_step_has_no_reaction_time():
    with pytest.raises(ValueError, match="at least 2, not 1"):
        reaction_time(torch.rand(1, 3))
