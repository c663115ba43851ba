"""Follow a model step by step, far beyond the steps it was trained for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from crbp._checks import count
from crbp._tree import flatten_state, norm
from crbp.models import PathfinderNet


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What a model did over ``T`` steps, averaged over a set of images.

    Attributes:
        f1: F1 over all pixels of all images after step 1 … T, ``(T,)``.
        residual: relative residual ``‖h_t − h_{t−1}‖ / ‖h_t‖`` of step 1 … T, mean over images, ``(T,)``.
    """

    f1: Tensor
    residual: Tensor


@torch.no_grad()
def follow(net: PathfinderNet, batches: Iterable[tuple[Tensor, Tensor]], *, steps: int) -> Trajectory:
    """Run a model for ``steps`` steps and read it out after each.

    Args:
        net: a recurrent model; it is run as it stands, in training or evaluation mode.
        batches: pairs of images ``(B, 1, H, W)`` and masks ``(B, H, W)`` of bool.
        steps: how far to run.

    Raises:
        ValueError: if ``steps`` is below 1 or there is no image.
    """
    count("steps", steps)
    hits, marked, residual, images = torch.zeros(steps), torch.zeros(steps), torch.zeros(steps), 0
    wanted = 0
    for image, mask in batches:
        drive = net.drive(image)
        state = net.cell.initial_state(drive)
        for t in range(steps):
            new = net.cell(state, drive)
            residual[t] += _residual_per_image(state, new).sum().cpu()
            state = new
            traced = net.read(state).argmax(dim=1).bool()
            hits[t] += (traced & mask).sum().cpu()
            marked[t] += traced.sum().cpu()
        images += len(image)
        wanted += int(mask.sum())
    if images == 0:
        raise ValueError("there is no image to follow; give at least one batch")
    return Trajectory(f1=2 * hits / (marked + wanted).clamp_min(1), residual=residual / images)


def _residual_per_image(old: object, new: object) -> Tensor:
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
        probability: of the target after step 1 … T, ``(T, H, W)``.
        threshold: above which a pixel counts as traced.

    Returns:
        ``(H, W)`` of whole numbers 1 … T, and 0 where the pixel is not traced at the end.
    """
    traced = probability > threshold
    lasting = traced.flip(0).long().cumprod(dim=0).sum(dim=0)
    return torch.where(lasting > 0, len(probability) - lasting + 1, 0)
