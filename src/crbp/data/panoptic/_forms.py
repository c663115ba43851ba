"""The outlines of the things, each class a function from random numbers to an outline about the origin."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crbp.data.panoptic import _paint

Points = NDArray[np.float64]
Vector = tuple[float, float]


class Stream:
    """The random numbers of one image, from the 64-bit words of a Philox counter, which no version of NumPy changes."""

    def __init__(self, key: int) -> None:
        self._bits = np.random.Philox(key=key)
        self._block: list[float] = []

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """The next number in [low, high)."""
        if not self._block:
            words = np.asarray(self._bits.random_raw(256), np.uint64)
            self._block = ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53).tolist()
        return low + (high - low) * self._block.pop()

    def whole(self, low: int, high: int) -> int:
        """The next whole number in low … high."""
        return low + int(self.uniform() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        """True with a probability."""
        return self.uniform() < probability

    def direction(self) -> Vector:
        """A unit vector of any angle; by rejection, since a library's sine may differ in the last bit."""
        while True:
            x, y = self.uniform(-1.0, 1.0), self.uniform(-1.0, 1.0)
            square = x * x + y * y
            if 0.01 < square <= 1.0:
                norm = math.sqrt(square)
                return x / norm, y / norm


class Form(NamedTuple):
    """An outline about the origin.

    `draw` fills a field of signed distances with it, moved to a place; `extent` is the radius about the origin that
    holds it; `spine` are points within it at which something laid across would cut it, none where it is compact.
    """

    draw: Callable[[NDArray[np.float32], int, int, float, Points], None]
    extent: float
    spine: Points


MARGIN = 5.0  # of a field about its outline, for the shadow
_NO_SPINE = np.zeros((0, 2))


def disc(stream: Stream, scale: float) -> Form:
    """A disc, a little stretched."""
    return _disc(stream, scale * stream.uniform(9.0, 24.0))


def square(stream: Stream, scale: float) -> Form:
    """A square, a little stretched."""
    return _polygon(stream, scale * stream.uniform(11.0, 29.0), _CORNERS[4])


def triangle(stream: Stream, scale: float) -> Form:
    """A triangle of three about equal sides."""
    return _polygon(stream, scale * stream.uniform(13.0, 31.0), _CORNERS[3])


def star(stream: Stream, scale: float) -> Form:
    """A star of five points."""
    points = _CORNERS[10].copy()
    points[1::2] *= stream.uniform(0.40, 0.48)
    return _polygon(stream, scale * stream.uniform(15.0, 33.0), points)


def cross(stream: Stream, scale: float) -> Form:
    """A cross of four arms."""
    arm = stream.uniform(0.24, 0.32)
    corner = np.array([(1.0, arm), (arm, arm), (arm, 1.0)])
    quarter = _rotated(corner, (0.0, 1.0))
    points = np.concatenate([corner, quarter, -corner, -quarter])
    return _polygon(stream, scale * stream.uniform(13.0, 30.0), points)


def crescent(stream: Stream, scale: float) -> Form:
    """A disc without another one."""
    radius, axis = scale * stream.uniform(15.0, 31.0), stream.direction()
    bite, offset = radius * stream.uniform(0.82, 0.95), radius * stream.uniform(0.45, 0.58)
    shift = np.array(axis) * offset
    middle = 0.5 * shift  # of the box about the crescent

    def draw(field: Any, left: int, top: int, pixel: float, at: Points) -> None:
        _paint.ellipse(field, left, top, pixel, at + middle, axis, radius, radius)
        hole = np.empty_like(field)
        _paint.ellipse(hole, left, top, pixel, at + middle + shift, axis, bite, bite)
        np.maximum(field, -hole, out=field)

    return Form(draw, radius + 0.5 * offset, _NO_SPINE)


def ring(stream: Stream, scale: float) -> Form:
    """A ring, a little stretched."""
    radius, axis, stretch = scale * stream.uniform(15.0, 36.0), stream.direction(), stream.uniform(1.0, 1.25)
    half = radius * stream.uniform(0.11, 0.15)
    a, b = radius - half, (radius - half) / stretch

    def draw(field: Any, left: int, top: int, pixel: float, at: Points) -> None:
        _paint.ellipse(field, left, top, pixel, at, axis, a, b)
        np.abs(field, out=field)
        np.subtract(field, half, out=field)

    x, y = axis
    spine = np.array([(a * x, a * y), (-b * y, b * x), (-a * x, -a * y), (b * y, -b * x)])
    return Form(draw, radius, spine)


def bar(stream: Stream, scale: float) -> Form:
    """A long straight bar with square ends."""
    half = scale * stream.uniform(26.0, 62.0)
    thin = scale * stream.uniform(3.5, 5.5)
    axis = stream.direction()
    points = _rotated(np.array([(half, thin), (half, -thin), (-half, -thin), (-half, thin)]), axis)
    spine = _rotated(half * np.array([(-0.5, 0.0), (-0.25, 0.0), (0.0, 0.0), (0.25, 0.0), (0.5, 0.0)]), axis)
    return Form(_draw_polygon(points), math.sqrt(half * half + thin * thin), spine)


def snake(stream: Stream, scale: float) -> Form:
    """A long thing that winds, round at its ends."""
    step = scale * 6.0
    heading, turn = stream.direction(), stream.uniform(-0.35, 0.35)
    points = [(0.0, 0.0)]
    for _ in range(stream.whole(13, 24)):
        turn = 0.75 * turn + stream.uniform(-0.22, 0.22)
        heading = _turned(heading, turn)
        points.append((points[-1][0] + step * heading[0], points[-1][1] + step * heading[1]))
    return _chain(points, scale * stream.uniform(2.8, 4.6))


def spiral(stream: Stream, scale: float) -> Form:
    """A band wound up about two times, its windings as far apart as it is thick."""
    thick = scale * stream.uniform(2.2, 3.2)
    heading, side = stream.direction(), 1.0 if stream.chance(0.5) else -1.0
    pitch = thick * stream.uniform(4.2, 5.0)
    count = stream.whole(36, 46)
    points = []
    for k in range(count):
        heading = _turned(heading, side * 0.34)
        radius = (0.4 + 0.34 * k / (2.0 * math.pi)) * pitch
        points.append((radius * heading[0], radius * heading[1]))
    return _chain(points, thick)


def stroke(stream: Stream) -> Form:
    """A thin line that is no thing: clutter."""
    step, heading, turn = stream.uniform(3.0, 8.0), stream.direction(), stream.uniform(-0.3, 0.3)
    points = [(0.0, 0.0)]
    for _ in range(stream.whole(3, 6)):
        heading = _turned(heading, turn)
        points.append((points[-1][0] + step * heading[0], points[-1][1] + step * heading[1]))
    return _chain(points, stream.uniform(0.45, 0.9))


FORMS: dict[str, Callable[[Stream, float], Form]] = {
    "disc": disc,
    "square": square,
    "triangle": triangle,
    "star": star,
    "cross": cross,
    "crescent": crescent,
    "ring": ring,
    "bar": bar,
    "snake": snake,
    "spiral": spiral,
}
COMPACT = ("disc", "square", "triangle", "star", "cross", "crescent")


def _disc(stream: Stream, radius: float) -> Form:
    axis, stretch = stream.direction(), stream.uniform(1.0, 1.25)

    def draw(field: Any, left: int, top: int, pixel: float, at: Points) -> None:
        _paint.ellipse(field, left, top, pixel, at, axis, radius, radius / stretch)

    return Form(draw, radius, _NO_SPINE)


def _polygon(stream: Stream, radius: float, points: Points) -> Form:
    """A polygon within the unit circle, made larger, squeezed along one direction and turned."""
    axis, squeeze = stream.direction(), 1.0 / stream.uniform(1.0, 1.2)
    points = _rotated(points, stream.direction())
    along = (1.0 - squeeze) * (points[:, 0] * axis[0] + points[:, 1] * axis[1])
    points = points - along[:, None] * np.array(axis)
    points = radius * points
    return Form(_draw_polygon(points), float(np.sqrt((points**2).sum(axis=1).max())), _NO_SPINE)


def _draw_polygon(points: Points) -> Callable[[NDArray[np.float32], int, int, float, Points], None]:
    def draw(field: Any, left: int, top: int, pixel: float, at: Points) -> None:
        _paint.polygon(field, left, top, pixel, points + at)

    return draw


def _chain(chain: list[Vector], radius: float) -> Form:
    points = np.array(chain)
    points -= 0.5 * (points.min(axis=0) + points.max(axis=0))

    def draw(field: Any, left: int, top: int, pixel: float, at: Points) -> None:
        _paint.path(field, left, top, pixel, points + at, radius, MARGIN)

    middle = points[len(points) // 4 : -(len(points) // 4)]
    return Form(draw, float(np.sqrt((points**2).sum(axis=1).max())) + radius, middle)


def _regular(corners: int) -> Points:
    """The corners of a regular polygon on the unit circle, by square roots, which are the same everywhere."""
    cos = {3: -0.5, 4: 0.0, 10: 0.25 * (1.0 + math.sqrt(5.0))}[corners]
    step = cos, math.sqrt(1.0 - cos * cos)
    points = [np.array([(1.0, 0.0)])]
    for _ in range(corners - 1):
        points.append(_rotated(points[-1], step))
    return np.concatenate(points)


def _rotated(points: Points, heading: Vector) -> Points:
    """Points turned as the x axis is to a direction; not by matrix product, which may round otherwise elsewhere."""
    x, y = points[:, 0], points[:, 1]
    return np.stack([x * heading[0] - y * heading[1], x * heading[1] + y * heading[0]], axis=1)


def _turned(heading: Vector, angle: float) -> Vector:
    """A direction turned by about an angle: (1 − t², 2t) / (1 + t²) is a rotation made of fractions alone."""
    square = 0.25 * angle * angle
    cos, sin = (1.0 - square) / (1.0 + square), angle / (1.0 + square)
    return heading[0] * cos - heading[1] * sin, heading[0] * sin + heading[1] * cos


_CORNERS = {corners: _regular(corners) for corners in (3, 4, 10)}
