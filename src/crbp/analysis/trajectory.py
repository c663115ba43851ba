"""Follow a model step by step, far beyond the steps it was trained for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import crbp
from crbp._checks import count
from crbp._temporarily import temporarily
from crbp._tree import flatten_state, norm
from crbp.losses import expected_probability
from crbp.models import PathfinderNet
from crbp.ops import shared_spectra

BATCH = 32  # images at once


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What a model did over ``T`` steps.

    Attributes:
        f1: F1 over all pixels of all images after step 1 … T, ``(T,)``.
        residual: relative residual ``‖h_t − h_{t−1}‖ / ‖h_t‖`` of step 1 … T, mean over images, ``(T,)``.
        probability: of the target on the first images after step 1 … T, ``(T, B, H, W)``.
    """

    f1: Tensor
    residual: Tensor
    probability: Tensor

    def arrival(self, steps: int) -> Tensor:
        """Step from which on each pixel of the first images stays traced within ``steps``, ``(B, H, W)``."""
        return arrival_steps(self.probability[:steps])


def states_of(net: PathfinderNet, image: Tensor, *, steps: int) -> Iterator[tuple[Any, Any]]:
    """The states before and after each step."""
    drive = net.drive(image)
    state = net.cell.initial_state(drive)
    for _ in range(steps):
        new = net.cell(state, drive)
        yield state, new
        state = new


@torch.no_grad()
def follow(
    net: PathfinderNet, image: Tensor, mask: Tensor, *, steps: int, shown: int = 0, evidential: bool = False
) -> Trajectory:
    """Run a model for ``steps`` steps and read it out after each.

    Args:
        net: a recurrent model; it is run as it stands, in training or evaluation mode.
        image: ``(B, 1, H, W)``.
        mask: ``(B, H, W)`` of bool.
        steps: how far to run.
        shown: of how many images, up to one batch of 32, the probabilities are kept.
        evidential: whether the model was trained with `crbp.losses.evidential_loss`, whose probabilities are the
            expected ones; those of others are the softmax.

    Raises:
        ValueError: if ``steps`` is below 1, there is no image, or more are to be shown than a batch has.
    """
    count("steps", steps)
    count("shown", shown, at_least=0)
    if shown > min(BATCH, len(image)):
        raise ValueError(f"shown must be at most {min(BATCH, len(image))}, not {shown}")
    if len(image) == 0:
        raise ValueError("there is no image to follow; give at least one")
    hits, marked, residual = torch.zeros(steps), torch.zeros(steps), torch.zeros(steps)
    probability = torch.zeros(steps, shown, *mask.shape[1:])
    with shared_spectra():
        for first, (some, wanted) in enumerate(zip(torch.split(image, BATCH), torch.split(mask, BATCH), strict=True)):
            for t, (before, state) in enumerate(states_of(net, some, steps=steps)):
                residual[t] += _residual_per_image(before, state).sum().cpu()
                logits = net.read(state)
                traced = logits.argmax(dim=1).bool()
                hits[t] += (traced & wanted).sum().cpu()
                marked[t] += traced.sum().cpu()
                if first == 0:
                    read = logits[:shown]
                    probability[t] = (expected_probability(read) if evidential else read.softmax(dim=1))[:, 1].cpu()
    f1 = 2 * hits / (marked + int(mask.sum())).clamp_min(1)
    return Trajectory(f1=f1, residual=residual / len(image), probability=probability)


@torch.no_grad()
def late_radius(net: PathfinderNet, image: Tensor, *, steps: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Spectral radius of the step's Jacobian after ``steps`` steps, one an image, and whether each has converged.

    An image whose state is not finite has the radius inf, which has not converged.

    Args:
        net: a recurrent model; a tolerance does not end its run early here.
        image: ``(B, 1, H, W)``.
        steps: how far to run.
        seed: of the power iteration's first vectors.

    Returns:
        ``(B,)`` and ``(B,)`` of bool, see `crbp.spectral_radius`.
    """
    radius = torch.full((len(image),), torch.inf)
    converged = torch.zeros(len(image), dtype=torch.bool)
    with temporarily(net, evolve=replace(net.evolve, tolerance=None, on_divergence="warn")):
        for places in torch.split(torch.arange(len(image), device=image.device), BATCH):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", crbp.DivergenceWarning)  # told by the radius
                run = net(image[places], steps=steps).run
                if not bool(_finite(run).all()):
                    # One by one: by FFT what is not finite spreads to the other image of a pair.
                    alone = [_finite(net(image[place][None], steps=steps).run) for place in places]
                    places = places[torch.cat(alone)]
                    if len(places) == 0:
                        continue
                    run = net(image[places], steps=steps).run
            generator = torch.Generator(image.device).manual_seed(seed)
            found = crbp.spectral_radius(run, per_sample=True, generator=generator)
            places, good = places.cpu(), found.radius.isfinite().cpu()
            radius[places[good]], converged[places[good]] = found.radius.cpu()[good], found.converged.cpu()[good]
    return radius, converged


def _finite(run: Any) -> Tensor:
    """Whether the state of each image is finite, ``(B,)``."""
    return torch.stack([leaf.isfinite().flatten(1).all(1) for leaf in flatten_state(run.state)[0]]).all(0)


def penalty_curve(net: PathfinderNet, image: Tensor, *, steps: int, bound: float = 0.9) -> Tensor:
    """Lipschitz coefficient penalty of every step, ``mean((1ᵀJ_t − bound)⁺²)``: `crbp.lipschitz_penalty` over time.

    Args:
        net: a recurrent model; it is run as it stands.
        image: ``(B, 1, H, W)``, at least one.
        steps: how far to run.
        bound: λ in [0, 1), the share by which a change of the state may persist.

    Returns:
        ``(steps,)``, not finite from the step on at which the state is not.

    Raises:
        ValueError: if ``steps`` is below 1, there is no image, or the bound lies outside [0, 1).
    """
    count("steps", steps)
    if len(image) == 0:
        raise ValueError("there is no image to follow; give at least one")
    found = torch.zeros(steps)
    one = crbp.Evolve(steps=1, on_divergence="warn")
    with torch.no_grad(), shared_spectra(), warnings.catch_warnings():
        warnings.simplefilter("ignore", crbp.DivergenceWarning)  # told by the curve
        for some in torch.split(image, BATCH):
            drive = net.drive(some)
            state = net.cell.initial_state(drive)
            for t in range(steps):
                run = one(partial(_driven, net, drive), state)
                found[t] += len(some) * crbp.lipschitz_penalty(run, bound=bound, reduction="mean_square").cpu()
                state = run.state
    return found / len(image)


def _driven(net: PathfinderNet, drive: Tensor, state: Any) -> Any:
    return net.cell(state, drive)


def _residual_per_image(old: Any, new: Any) -> Tensor:
    before, _ = flatten_state(old)
    after, _ = flatten_state(new)
    residuals = []
    for i in range(len(after[0])):
        moved = norm(tuple(b[i] - a[i] for a, b in zip(before, after, strict=True)))
        residuals.append(moved / norm(tuple(leaf[i] for leaf in after)).clamp_min(torch.finfo(moved.dtype).tiny))
    return torch.stack(residuals)


def arrival_steps(probability: Tensor, *, threshold: float = 0.5) -> Tensor:
    """Step from which on each pixel stays on the traced contour.

    Args:
        probability: of the target after step 1 … T, ``(T, …)``.
        threshold: above which a pixel counts as traced.

    Returns:
        ``(…)`` of whole numbers 1 … T, and 0 where the pixel is not traced at the end.
    """
    traced = probability > threshold
    lasting = traced.flip(0).long().cumprod(dim=0).sum(dim=0)
    return torch.where(lasting > 0, len(probability) - lasting + 1, 0)
