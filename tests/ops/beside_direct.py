"""A way to convolve beside the direct one: the result and both gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def assert_direct(
    convolve: Callable[[Tensor, Tensor], Tensor], image: Tensor, weight: Tensor, *, precision: float, threads: int
) -> None:
    """Fail unless result and gradients agree to ``precision`` of their norm, on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours, theirs = convolve(image, weight), F.conv2d(image, weight, padding="same")
        assert relative(ours.detach(), theirs.detach()) < precision
        gradient = torch.randn_like(theirs)
        for got, wanted in zip(
            torch.autograd.grad(ours, (image, weight), gradient),
            torch.autograd.grad(theirs, (image, weight), gradient),
            strict=True,
        ):
            assert relative(got, wanted) < precision
    finally:
        torch.set_num_threads(before)
