"""The contour-tracing model: a bank of oriented filters, a recurrent cell, a readout of every pixel."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from crbp.cells._parts import Norm, make_norm
from crbp.evolve import Evolve, Run

CLASSES = 2  # background and target, in this order


class Cell(Protocol):
    """What the model asks of a recurrent cell: `crbp.cells` has three, and any module with these will do."""

    channels: int

    def __call__(self, state: Any, drive: Tensor) -> Any:
        """The next state."""

    def initial_state(self, drive: Tensor) -> Any:
        """The state to start from."""

    def readout_of(self, state: Any) -> Tensor:
        """The part ``(B, C, H, W)`` of a state that a readout sees."""


@dataclass(kw_only=True)
class Prediction:
    """What a model says of a batch of images.

    Attributes:
        logits: ``(B, 2, H, W)``, background and target.
        run: of the recurrent cell, for penalties and reports; None for a feed-forward model.
        steps: logits after every step, ``(steps, B, 2, H, W)``, where they were asked for.
    """

    logits: Tensor
    run: Run | None = None
    steps: Tensor | None = None


def gabor_bank(filters: int, size: int = 7, *, wavelength: float = 4.0, sigma: float = 1.8) -> Tensor:
    """Even and odd Gabor filters at evenly spaced orientations, of zero mean and unit norm.

    ``exp(−(x² + y²) / 2σ²) · cos(2π (x cos θ + y sin θ) / wavelength + ψ)`` with ψ = 0 and −π/2 in turn; lengths are in
    pixels.

    Returns:
        Tensor ``(filters, 1, size, size)``.
    """
    half = (size - 1) / 2
    y, x = torch.meshgrid(torch.arange(size) - half, torch.arange(size) - half, indexing="ij")
    index = torch.arange(filters)
    angle = (math.pi * (index // 2) / math.ceil(filters / 2)).view(-1, 1, 1)
    phase = (-math.pi / 2 * (index % 2)).view(-1, 1, 1)
    wave = torch.cos(2 * math.pi * (x * angle.cos() + y * angle.sin()) / wavelength + phase)
    bank = torch.exp(-(x.square() + y.square()) / (2 * sigma**2)) * wave
    bank = bank - bank.mean(dim=(1, 2), keepdim=True)
    bank /= torch.linalg.vector_norm(bank, dim=(1, 2), keepdim=True)
    return bank.unsqueeze(1)


def make_readout(channels: int, target_share: float) -> nn.Conv2d:
    """A 1×1 readout of two classes that starts by expecting ``target_share`` of the pixels on the target."""
    if not 0 < target_share < 1:
        raise ValueError(f"target_share must lie between 0 and 1, not {target_share!r}")
    readout = nn.Conv2d(channels, CLASSES, 1)
    assert readout.bias is not None
    with torch.no_grad():
        readout.bias.copy_(torch.tensor([math.log((1 - target_share) / target_share), 0.0]))
    return readout


class PathfinderNet(nn.Module):
    """A recurrent model that says of each pixel whether it lies on the marked contour.

    ``image → 7×7 Gabor-bank convolution → square → cell, run by evolve → norm → 1×1 readout``. With the paper's
    settings (25 channels, 15×15 kernels) it has 284 127 parameters with `HGRU` and 1 126 452 with `ConvLSTM`.

    Args:
        cell: the recurrent cell; its drive and state are ``(B, C, H, W)``.
        evolve: how many steps it takes and how they are differentiated.
        norm: normalisation before the readout; see `crbp.cells.HGRU`.
        norm_scale: start of its scales.
        filter_scale: norm of each filter at the start; the drive grows with its square. A small model on thin strokes
            learns sooner from 2 than from 1.
        target_share: share of target pixels that the readout starts from.

    Raises:
        ValueError: for values out of range.

    Source: Linsley et al., Stable and expressive recurrent vision models, NeurIPS 2020.
    """

    def __init__(
        self,
        cell: nn.Module,
        evolve: Evolve,
        *,
        norm: Norm = "instance",
        norm_scale: float = 1.0,
        filter_scale: float = 1.0,
        target_share: float = 0.01,
    ) -> None:
        super().__init__()
        if not (math.isfinite(filter_scale) and filter_scale > 0):
            raise ValueError(f"filter_scale must be finite and above 0, not {filter_scale!r}")
        channels: int = cell.channels  # type: ignore[assignment]  # a Cell, which nn.Module cannot say
        self.evolve = evolve
        self.filters = nn.Conv2d(1, channels, 7, padding="same")
        assert self.filters.bias is not None
        with torch.no_grad():
            self.filters.weight.copy_(filter_scale * gabor_bank(channels))
            self.filters.bias.zero_()
        self.cell: Cell = cell  # type: ignore[assignment]
        self.readout_norm = make_norm(norm, channels, scale=norm_scale)
        self.readout = make_readout(channels, target_share)

    def drive(self, image: Tensor) -> Tensor:
        """What the cell is shown at every step: ``(B, C, H, W)`` from images ``(B, 1, H, W)`` in [0, 1]."""
        squared: Tensor = self.filters(image).square()
        return squared

    def read(self, state: Any) -> Tensor:
        """Logits ``(B, 2, H, W)`` of a state."""
        logits: Tensor = self.readout(self.readout_norm(self.cell.readout_of(state)))
        return logits

    def forward(self, image: Tensor, *, steps: int | None = None, every_step: bool = False) -> Prediction:
        """Trace the contours of a batch.

        Args:
            image: ``(B, 1, H, W)`` in [0, 1].
            steps: run so many steps instead of the number that `evolve` has.
            every_step: return the logits after every step as well; their graph is that of the steps, so a loss on them
                needs a gradient method that keeps one, such as `crbp.BPTT`.
        """
        drive = self.drive(image)
        evolve = self.evolve if steps is None else replace(self.evolve, steps=steps)
        seen: list[Tensor] = []

        def step(state: Any) -> Any:
            new = self.cell(state, drive)
            if every_step:
                seen.append(self.read(new))
            return new

        run = evolve(step, self.cell.initial_state(drive))
        return Prediction(logits=self.read(run.state), run=run, steps=torch.stack(seen) if seen else None)
