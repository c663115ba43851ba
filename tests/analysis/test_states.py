from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import crbp
from crbp.analysis import state_space
from crbp.analysis.measured import analyse
from crbp.models import PathfinderNet


class Spiral(nn.Module):
    """A state that goes ``angle`` around the origin of one plane at every step, its length times ``factor``."""

    channels = 1

    def __init__(self, factor: float, angle: float) -> None:
        super().__init__()
        self.factor, self.angle = factor, torch.tensor(angle)

    def initial_state(self, drive: Tensor) -> Tensor:
        state = torch.zeros_like(drive)
        state[..., 0, 0] = 1.0 + 0.1 * torch.arange(len(drive))[:, None]
        return state

    def forward(self, state: Tensor, drive: Tensor) -> Tensor:
        x, y = state[..., 0, 0], state[..., 0, 1]
        cos, sin = self.angle.cos(), self.angle.sin()
        new = torch.zeros_like(state)
        new[..., 0, 0], new[..., 0, 1] = self.factor * (cos * x - sin * y), self.factor * (sin * x + cos * y)
        return new

    def readout_of(self, state: Tensor) -> Tensor:
        return state


def spiral(factor: float, angle: float = 0.7, steps: int = 4) -> PathfinderNet:
    return PathfinderNet(Spiral(factor, angle), crbp.Evolve(steps=steps))  # type: ignore[arg-type]


IMAGES = torch.rand(5, 1, 8, 8)


def test_two_axes_hold_what_moves_in_a_plane() -> None:
    found = state_space(spiral(0.9), IMAGES, trained=4, steps=16)
    assert found.coordinates.shape == (16, 5, 2)
    torch.testing.assert_close(found.explained.sum(), torch.tensor(1.0))
    # A projection onto the plane keeps distances.
    state = torch.stack([torch.tensor([0.9**t * (1.0 + 0.1 * i) for i in range(5)]) for t in range(1, 17)])
    lengths = (found.coordinates - found.coordinates.mean((0, 1))).norm(dim=2)
    angles = 0.7 * torch.arange(1, 17)[:, None]
    points = torch.stack([state * angles.cos(), state * angles.sin()], dim=2)
    torch.testing.assert_close(lengths, (points - points.mean((0, 1))).norm(dim=2), rtol=1e-4, atol=1e-4)


def test_what_stands_still_has_not_moved_and_what_runs_off_has() -> None:
    still = state_space(spiral(1.0, angle=0.0), IMAGES, trained=4, steps=16)
    torch.testing.assert_close(still.moved, torch.zeros(5))
    torch.testing.assert_close(still.statistic, torch.zeros(2))
    away = state_space(spiral(1.5), IMAGES, trained=4, steps=16)
    assert float(away.moved.min()) > 10
    assert float(away.statistic.max()) == 1.0
    assert float(away.p_value.min()) < 0.05


def test_a_state_that_is_not_finite_is_named() -> None:
    with pytest.raises(FloatingPointError, match="after step 2"):
        state_space(spiral(1e30), IMAGES, trained=1, steps=4)


@pytest.mark.parametrize(
    ("images", "trained", "steps", "message"),
    [(1, 4, 16, "at least 2 images"), (5, 4, 4, "above the 4"), (5, 0, 4, "trained")],
)
def test_too_little_is_refused(images: int, trained: int, steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        state_space(spiral(0.9), IMAGES[:images], trained=trained, steps=steps)


def test_states_too_large_to_keep_are_of_fewer_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crbp.analysis.states.BUDGET", 3 * 16 * 64 * 4)
    assert state_space(spiral(0.9), IMAGES, trained=4, steps=16).coordinates.shape == (16, 3, 2)


@pytest.mark.filterwarnings("ignore::crbp.DivergenceWarning")
def test_a_model_that_runs_off_is_analysed_all_the_same() -> None:
    net = spiral(1e30)
    found = analyse(net, IMAGES, torch.rand(5, 8, 8) > 0.5)
    assert found.states is None
    assert bool(found.radius.isinf().all())
    assert found.numbers()["stable_share"] == 0
    assert json.loads(json.dumps(found.numbers(), allow_nan=False))["residual_at_end"] is None


def test_a_tolerance_does_not_end_an_analysis_early() -> None:
    net = spiral(0.5)
    net.evolve = crbp.Evolve(steps=4, tolerance=10.0)
    assert len(analyse(net, IMAGES, torch.rand(5, 8, 8) > 0.5).trajectory.f1) == 16
