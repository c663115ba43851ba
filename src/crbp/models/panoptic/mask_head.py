"""The mask heads: four convolutions, or one recurrent cell in their place; and the targets of both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from crbp._checks import count, non_negative
from crbp.cells import GALAHGRU
from crbp.errors import DivergenceError
from crbp.evolve import Evolve, Run
from crbp.models.panoptic._pool import at_least_float32, roi_align

CONVOLUTIONS = 4


class MaskFeatures(NamedTuple):
    """What a mask head makes of pooled features ``(n, C, s, s)``.

    Attributes:
        features: ``(n, channels, s, s)``.
        run: of the recurrence, where there was one over all instances.
        steps: ``(n,)``, steps of each instance, where instances stop by themselves.
    """

    features: Tensor
    run: Run | None = None
    steps: Tensor | None = None


class MaskHead(nn.Module, ABC):
    """What comes between pooled features and the mask predictor."""

    @abstractmethod
    def forward(self, pooled: Tensor) -> MaskFeatures:
        """``(n, C, s, s)`` to `MaskFeatures`."""


class ConvolutionalMaskHead(MaskRCNNHeads, MaskHead):
    """Four 3×3 convolutions with ReLU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(in_channels, [channels] * CONVOLUTIONS, 1)

    def forward(self, pooled: Tensor) -> MaskFeatures:
        """``(n, C, s, s)`` to features of the same size."""
        features: Tensor = MaskRCNNHeads.forward(self, pooled)
        return MaskFeatures(features)


class RecurrentMaskHead(MaskHead):
    """One recurrent cell, driven by the pooled features, then a batch norm of its state over all instances.

    In training the run has all instances as one state. In evaluation each may stop by itself, see ``tolerance``.

    Args:
        channels: of the pooled features and of the cell.
        evolve: how many steps, and how they are differentiated.
        tolerance: in evaluation, freeze an instance once the relative residual ``‖h_t − h_{t−1}‖ / ‖h_t‖`` of its own
            state is at most this; None runs all of them as ``evolve`` says.
        norm_scale: start of the scales of the cell's group norms.
        horizon: longest time constant in steps that its gates start with, at least 3; None for the number of steps, or
            3 where that is less.

    Raises:
        ValueError: for values out of range.

    Source: Linsley et al., Stable and expressive recurrent vision models, NeurIPS 2020.
    """

    def __init__(
        self,
        channels: int,
        evolve: Evolve,
        *,
        tolerance: float | None = None,
        norm_scale: float = 0.1,
        horizon: int | None = None,
    ) -> None:
        super().__init__()
        if tolerance is not None:
            non_negative("tolerance", tolerance)
        if horizon is None:
            horizon = max(evolve.steps, 3)
        self.cell = GALAHGRU(channels, horizon=horizon, norm_scale=norm_scale)
        self.output_norm = nn.BatchNorm2d(channels)
        self.evolve, self.tolerance = evolve, tolerance

    @property
    def steps(self) -> int:
        """The most steps of a run."""
        return self.evolve.steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self.evolve = replace(self.evolve, steps=steps)

    def forward(self, pooled: Tensor) -> MaskFeatures:
        """``(n, C, s, s)`` to the normalised state of the same shape."""
        start = self.cell.initial_state(pooled)
        if len(pooled) == 0:
            # One step on no instance: every parameter still gets its gradient of zero, for which other processes wait.
            return MaskFeatures(self.output_norm(self.cell(start, pooled)))
        if self.training or self.tolerance is None:
            run = self.evolve(lambda state: self.cell(state, pooled), start)
            return MaskFeatures(self.output_norm(run.state), run)
        state, steps = settle_each(self.cell, start, pooled, steps=self.steps, tolerance=self.tolerance)
        self._check(state, self.steps)
        return MaskFeatures(self.output_norm(state), steps=steps)

    def unroll(self, pooled: Tensor, *, steps: int) -> Iterator[Tensor]:
        """The normalised state ``(n, C, s, s)`` after each of so many steps, whatever the tolerance.

        Raises:
            ValueError: for fewer steps than one.
            DivergenceError: once a state is not finite.
        """
        count("steps", steps)
        state = self.cell.initial_state(pooled)
        for taken in range(1, steps + 1):
            state = self.cell(state, pooled)
            self._check(state, taken)
            yield self.output_norm(state)

    def _check(self, state: Tensor, steps: int) -> None:
        if self.evolve.on_divergence == "raise" and not bool(state.isfinite().all()):
            raise DivergenceError(
                f"the state of an instance is not finite within {steps} steps: the dynamics do not contract, or an "
                "input is not finite; check the weights or take fewer steps"
            )


@torch.no_grad()
def settle_each(
    cell: Callable[[Tensor, Tensor], Tensor], state: Tensor, drive: Tensor, *, steps: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Run a cell without a graph until each row's own state has settled; only rows that still move are computed.

    Args:
        cell: maps a state and a drive, ``(n, …)`` each, to the next state; rows must not see one another.
        state: where to start.
        drive: what the cell is shown at every step.
        steps: the most steps.
        tolerance: a row stops once ``‖h_t − h_{t−1}‖ / ‖h_t‖`` of its own is at most this.

    Returns:
        The states, and the steps that each row took, ``(n,)``.

    Raises:
        ValueError: for values out of range.
    """
    count("steps", steps)
    non_negative("tolerance", tolerance)
    final = state.clone()
    taken = torch.zeros(len(state), dtype=torch.long, device=state.device)
    moving = torch.arange(len(state), device=state.device)
    for _ in range(steps):
        before, state = state, cell(state, drive).to(final.dtype)
        taken[moving] += 1
        settled = _residuals(before, state) <= tolerance  # which a value that is not finite never does
        if bool(settled.any()):
            final[moving[settled]] = state[settled]
            moving, state, drive = moving[~settled], state[~settled], drive[~settled]
            if len(moving) == 0:
                break
    final[moving] = state
    return final, taken


def _residuals(before: Tensor, after: Tensor) -> Tensor:
    """``‖h_t − h_{t−1}‖ / ‖h_t‖`` of each row; 0 where nothing moved and 1 where it became zero."""
    moved = at_least_float32(after - before).flatten(1).norm(dim=1)
    scale = at_least_float32(after).flatten(1).norm(dim=1)
    scale = torch.where(scale > 0, scale, moved)
    return torch.where(moved == 0, moved, moved / scale)


class MaskPredictor(MaskRCNNPredictor):
    """A deconvolution to twice the size with ReLU, and logits of each thing class, started as detectron2 does."""

    def __init__(self, channels: int, things: int) -> None:
        super().__init__(channels, channels, things)
        nn.init.zeros_(self.conv5_mask.bias)
        nn.init.normal_(self.mask_fcn_logits.weight, std=0.001)
        nn.init.zeros_(self.mask_fcn_logits.bias)


def mask_targets(masks: Tensor, boxes: Tensor, matched: Tensor, size: int) -> Tensor:
    """What the mask head is to say within each box: the object's bitmap there, averaged over cells, from one half on.

    Args:
        masks: ``(objects, H, W)`` of bool.
        boxes: ``(n, 4)``, corners in pixels.
        matched: ``(n,)``, the object of each box.
        size: side of the targets.

    Returns:
        ``(n, size, size)`` of bool.
    """
    if len(boxes) == 0:
        return torch.zeros(0, size, size, dtype=torch.bool, device=boxes.device)
    rows = torch.cat([matched[:, None].to(boxes.dtype), boxes], dim=1)
    soft = roi_align(masks[:, None].to(boxes.dtype), rows, size, 1.0)
    return soft[:, 0] >= 0.5


def mask_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy of the masks of the right classes; zero, on the graph, where there is none.

    Args:
        logits: ``(n, things, m, m)``.
        labels: ``(n,)``, the right classes.
        targets: ``(n, m, m)`` of bool.
    """
    own = at_least_float32(logits[torch.arange(len(labels), device=labels.device), labels])
    loss = F.binary_cross_entropy_with_logits(own, targets.to(own.dtype), reduction="sum")
    return loss / max(targets.numel(), 1)
