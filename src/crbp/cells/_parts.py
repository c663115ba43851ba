"""What the cells share: normalisation by name, the chronos start of a gate, checks of their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from crbp._checks import choice, count

Norm = Literal["instance", "batch", "group", "none"]


def make_norm(name: Norm, channels: int, *, scale: float = 1.0) -> nn.Module:
    """A normalisation of ``(B, C, H, W)`` with a scale and a shift per channel.

    Args:
        name: ``"instance"`` takes mean and variance over each image and channel and does not couple the images of a
            batch; ``"batch"`` always uses the statistics of the batch at hand, as the paper's code does, so that a
            prediction depends on what else is in the batch; ``"group"`` takes them over an image and groups of up to
            eight channels; ``"none"`` is the identity.
        channels: C.
        scale: start value of the scales.

    Raises:
        ValueError: for an unknown name.
    """
    choice("norm", name, get_args(Norm))
    if name == "none":
        return nn.Identity()
    if name == "instance":
        # The same numbers as nn.InstanceNorm2d, which is slower on a CPU.
        norm: nn.Module = nn.GroupNorm(channels, channels)
    elif name == "batch":
        norm = nn.BatchNorm2d(channels, track_running_stats=False)
    else:
        norm = nn.GroupNorm(_groups(channels), channels)
    assert isinstance(norm.weight, Tensor)
    nn.init.constant_(norm.weight, scale)
    return norm


def normalise(name: Norm, channels: int) -> Callable[..., Tensor]:
    """What `make_norm` makes as a function ``x, scale, shift → y``, in operations that fuse with their neighbours."""
    if name == "none":
        return lambda x: x
    groups = {"instance": channels, "batch": channels, "group": _groups(channels)}[name]
    axes = (0, 2, 3, 4) if name == "batch" else (2, 3, 4)

    def normalised(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        grouped = x.view(batch, groups, channels // groups, height, width)
        centred = grouped - grouped.mean(axes, keepdim=True)
        variance = centred.square().mean(axes, keepdim=True)  # two plain sums; var_mean is slower once compiled
        white: Tensor = (centred * torch.rsqrt(variance + 1e-5)).view(x.shape)
        return white * scale[:, None, None] + shift[:, None, None]

    return normalised


def _groups(channels: int) -> int:
    return next(g for g in range(max(channels // 8, 1), 0, -1) if channels % g == 0)


class PointwiseConv2d(nn.Conv2d):
    """A 1×1 convolution with bias, as one matrix product an image on a CPU, where that is faster."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 1)
        nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same shape."""
        if x.device.type != "cpu":
            return super().forward(x)
        assert self.bias is not None
        batch, channels = x.shape[:2]
        weight = self.weight.view(1, channels, channels).expand(batch, channels, channels)
        return torch.baddbmm(self.bias[:, None], weight, x.flatten(2)).view(x.shape)


def chronos_(bias: Tensor, horizon: int) -> Tensor:
    """Fill a gate's bias with ``log U(1, horizon − 1)``, in place: time constants spread over the run.

    A gate that forgets with ``1 − σ(b)`` holds its state for about ``exp(b)`` steps.

    Raises:
        ValueError: if the horizon is below 3 steps, which leaves no range.

    Source: Tallec and Ollivier, Can recurrent neural networks warp time?, ICLR 2018.
    """
    count("horizon", horizon, at_least=3)
    with torch.no_grad():
        return bias.uniform_(1, horizon - 1).log_()


def check_cell(channels: int, kernel_size: int) -> None:
    """Raise unless the sizes make a cell whose convolutions keep the image size."""
    count("channels", channels)
    count("kernel_size", kernel_size)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, so that a step keeps the image size, not {kernel_size}")


def check_shapes(state: Tensor, drive: Tensor, channels: int) -> None:
    """Raise unless state and drive are both ``(B, channels, H, W)``."""
    if drive.ndim != 4 or drive.shape[1] != channels or state.shape != drive.shape:
        raise ValueError(
            f"state and drive must both have shape (B, {channels}, H, W), not {tuple(state.shape)} and "
            f"{tuple(drive.shape)}"
        )
