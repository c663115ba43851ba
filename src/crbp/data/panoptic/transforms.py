"""Resize and flip as values, their random numbers a function of seed, epoch and image, for runs that resume exactly."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crbp._checks import count, share

SHORTEST = tuple(range(640, 801, 32))


class View(NamedTuple):
    """What is done to one image: the size it gets, and whether left and right are swapped after that."""

    height: int
    width: int
    flip: bool


class Transform(Protocol):
    """Chooses the view of an image."""

    def view(self, height: int, width: int, *, epoch: int, index: int) -> View:
        """The view of the image at `index` of the data set, of the given size, in an epoch."""


@dataclass(frozen=True)
class Keep:
    """Every image as it is."""

    def view(self, height: int, width: int, *, epoch: int, index: int) -> View:
        """The size that the image has."""
        return View(height, width, False)


@dataclass(frozen=True, kw_only=True)
class Resize:
    """One size of the shorter side, for evaluation; see `shortest_edge`.

    Args:
        shortest: of the shorter side, in pixels.
        longest: limit of the longer side, in pixels.

    Raises:
        ValueError: a size is below 1, or the limit is below the shorter side.
    """

    shortest: int = 800
    longest: int = 1333

    def __post_init__(self) -> None:
        _check_sizes((self.shortest,), self.longest)

    def view(self, height: int, width: int, *, epoch: int, index: int) -> View:
        """The size that `shortest_edge` gives."""
        return View(*shortest_edge(height, width, shortest=self.shortest, longest=self.longest), False)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """The shorter side drawn from several sizes, then left and right swapped at random, for training.

    What is drawn for an image is a function of ``(seed, epoch, index)`` alone.

    Args:
        shortest: sizes of the shorter side to draw from, in pixels.
        longest: limit of the longer side, in pixels.
        flip: probability of a swap, in [0, 1].
        seed: of the draws.

    Raises:
        ValueError: there is no size, one is below 1, the limit is below one of them, or `flip` is out of range.

    Source: detectron2, ResizeShortestEdge and RandomFlip.
    """

    shortest: tuple[int, ...] = SHORTEST
    longest: int = 1333
    flip: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shortest", tuple(self.shortest))  # a YAML file gives a list
        _check_sizes(self.shortest, self.longest)
        share("flip", self.flip, closed=True)
        count("seed", self.seed, at_least=0)

    def view(self, height: int, width: int, *, epoch: int, index: int) -> View:
        """The size and the flip drawn for an image."""
        digest = hashlib.blake2b(f"{self.seed} {epoch} {index}".encode(), digest_size=16).digest()
        first, second = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
        shortest = self.shortest[first * len(self.shortest) >> 64]
        flip = second < self.flip * 2.0**64
        return View(*shortest_edge(height, width, shortest=shortest, longest=self.longest), flip)


def shortest_edge(height: int, width: int, *, shortest: int, longest: int) -> tuple[int, int]:
    """Height and width of an image resized so that its shorter side is `shortest`, the longer at most `longest`.

    Each side is rounded as ``int(x + 0.5)``; in the order of operations it follows the source, so that equal images get
    equal sizes.

    Source: detectron2, ResizeShortestEdge.
    """
    scale = shortest / min(height, width)
    new_height, new_width = (float(shortest), scale * width) if height < width else (scale * height, float(shortest))
    if max(new_height, new_width) > longest:
        scale = longest / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    return max(1, int(new_height + 0.5)), max(1, int(new_width + 0.5))


def view_image(image: Image.Image, view: View) -> NDArray[np.uint8]:
    """An image ``(H, W, 3)`` as a view shows it, bilinear with Pillow's filter against aliasing."""
    pixels: NDArray[np.uint8] = np.array(image.resize((view.width, view.height), Image.Resampling.BILINEAR))
    return _flipped(pixels, view)


def view_labels(labels: NDArray[Any], view: View) -> NDArray[Any]:
    """A map of numbers ``(H, W)``, uint8 or int32, as a view shows it: each pixel takes the nearest number.

    Resizing a map of segment numbers once gives the same as resizing every segment's mask.
    """
    if (view.height, view.width) == labels.shape:
        return _flipped(labels, view)
    sized = Image.fromarray(labels).resize((view.width, view.height), Image.Resampling.NEAREST)
    return _flipped(np.array(sized), view)


def _flipped(pixels: NDArray[Any], view: View) -> NDArray[Any]:
    return np.ascontiguousarray(pixels[:, ::-1]) if view.flip else pixels


def _check_sizes(shortest: tuple[int, ...], longest: int) -> None:
    if not shortest:
        raise ValueError("shortest is empty; give at least one size of the shorter side, such as (800,)")
    for size in shortest:
        count("shortest", size)
    count("longest", longest)
    if longest < max(shortest):
        raise ValueError(f"longest={longest} is below shortest={max(shortest)}; raise it")
