"""Where the states of a model go: principal axes of all states over time, and whether those at 4N are those at N."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from scipy.sparse.linalg import svds
from torch import Tensor

from crbp._checks import count
from crbp._tree import flatten_state
from crbp.analysis.trajectory import states_of
from crbp.models import PathfinderNet
from crbp.ops import shared_spectra

BUDGET = 2**30  # bytes of states kept at once


@dataclass(frozen=True, kw_only=True)
class StateSpace:
    """The states of ``B`` images over ``T`` steps, seen from the two axes along which they vary most.

    Attributes:
        coordinates: of every state along the axes, ``(T, B, 2)``.
        explained: share of all variance along each axis, ``(2,)``.
        trained: N, the steps trained for.
        moved: ``‖h_T − h_N‖ / ‖h_N‖`` of each image, ``(B,)``.
        statistic: of the two-sample Kolmogorov–Smirnov test between the coordinates of all images at step N and at
            step T, for each axis, ``(2,)``; 0 where they are distributed alike, 1 where they are apart.
        p_value: of the same test, ``(2,)``.
    """

    coordinates: Tensor
    explained: Tensor
    trained: int
    moved: Tensor
    statistic: Tensor
    p_value: Tensor


@torch.no_grad()
def state_space(net: PathfinderNet, image: Tensor, *, trained: int, steps: int) -> StateSpace:
    """Run a model for ``steps`` steps and find the principal axes of its states.

    The axes are those of the covariance of all states at all steps, each image and step one sample. Where the states
    of all images do not fit into a gibibyte, the first ones that do are taken, at least two.

    Args:
        net: a recurrent model; it is run as it stands.
        image: ``(B, 1, H, W)``, at least two.
        trained: N, at least 1.
        steps: T, above N.

    Raises:
        ValueError: if there are fewer than two images, or ``steps`` is not above ``trained``.
        FloatingPointError: if a state is not finite.
    """
    count("trained", trained)
    if steps <= trained:
        raise ValueError(f"steps must be above the {trained} trained for, not {steps}")
    if len(image) < 2:
        raise ValueError(f"at least 2 images are needed, not {len(image)}")
    elements = sum(leaf.numel() for leaf in flatten_state(net.cell.initial_state(net.drive(image[:1])))[0])
    image = image[: max(2, BUDGET // (4 * elements * steps))]
    states = torch.empty(steps, len(image), elements)
    with shared_spectra():
        for t, (_, state) in enumerate(states_of(net, image, steps=steps)):
            states[t] = torch.cat([leaf.flatten(1).float() for leaf in flatten_state(state)[0]], dim=1)
            if not bool(states[t].isfinite().all()):
                raise FloatingPointError(f"the state is not finite after step {t + 1}")
    before, after = states[trained - 1], states[-1]
    moved = (after - before).norm(dim=1) / before.norm(dim=1).clamp_min(torch.finfo(before.dtype).tiny)
    coordinates, explained = _principal_axes(states)
    tests = [
        stats.ks_2samp(coordinates[trained - 1, :, axis].numpy(), coordinates[-1, :, axis].numpy()) for axis in (0, 1)
    ]
    return StateSpace(
        coordinates=coordinates,
        explained=explained,
        trained=trained,
        moved=moved,
        statistic=torch.tensor([float(test.statistic) for test in tests]),
        p_value=torch.tensor([float(test.pvalue) for test in tests]),
    )


def _principal_axes(states: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates of ``(T, B, D)`` along the first two axes, ``(T, B, 2)``, and their shares of the variance.

    The states are centred in place.
    """
    samples = states.flatten(0, 1)
    samples -= samples.mean(dim=0)
    total = float(samples.square().sum())
    if total == 0:
        return torch.zeros(*states.shape[:2], 2), torch.zeros(2)
    start = np.random.default_rng(0).standard_normal(min(samples.shape)).astype(np.float32)
    left, sizes, _ = svds(samples.numpy(), k=2, v0=start)
    coordinates = torch.from_numpy(left[:, ::-1] * sizes[::-1])
    # The sign of an axis is arbitrary: its largest coordinate is to be positive, on every machine.
    largest = coordinates.gather(0, coordinates.abs().argmax(dim=0, keepdim=True))
    coordinates = coordinates * largest.sign()
    return coordinates.view(*states.shape[:2], 2), torch.from_numpy(sizes[::-1].copy()).square() / total
