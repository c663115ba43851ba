"""The compiled part of the shapes: distances to outlines, textures, and pixels.

Coordinates are in units of which a picture is `WINDOW` wide, x to the right and y down; `pixel` is the side of a pixel
in them. Only +, −, ×, ÷, √ and floor are used on floats, which IEEE 754 fixes to the last bit, so that an image is the
same on every machine.
"""

# mypy sees numba's decorator as untyped: the compiler, not mypy, checks the types in here.
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from math import floor, sqrt

import numpy as np
from numba import njit

from crbp.data._compile import cached

WINDOW = 192.0
FAR = 1e3

PLAIN, STRIPES, CHECKS, DOTS, BLOTCHES, WAVES = range(6)
# Entries of a texture: what `_tone` reads, then the two colours between which a tone lies.
KIND, ALONG_X, ALONG_Y, PERIOD, PHASE_U, PHASE_V, DUTY, SALT, COLOUR, SECOND = 0, 1, 2, 3, 4, 5, 6, 7, 8, 11
TEXTURE = 14  # their number
# Entries of an edge: darkening and width of the line inside, darkening and reach of the shadow outside, and the noise
# that leaves gaps in both.
LINE, LINE_WIDTH, SHADOW, REACH, EDGE_SALT = range(5)
EDGE = 5

_M1, _M2, _M3 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S40 = np.uint64(27), np.uint64(30), np.uint64(40)


@njit(nogil=True)
def _lattice(column, row, salt):  # type: ignore[no-untyped-def]
    """A number in [0, 1) for a point of a lattice."""
    z = np.uint64(column + 65536) * _M1 + np.uint64(row + 65536) * _M2 + np.uint64(salt) * _M3
    z = (z ^ (z >> _S30)) * _M2
    z = (z ^ (z >> _S27)) * _M3
    return np.float64((z ^ (z >> _S30)) >> _S40) / 16777216.0


@njit(nogil=True)
def _noise(x, y, salt):  # type: ignore[no-untyped-def]
    """Smooth noise in [0, 1) that varies over a length of 1."""
    column, row = floor(x), floor(y)
    fx, fy = x - column, y - row
    fx, fy = fx * fx * (3.0 - 2.0 * fx), fy * fy * (3.0 - 2.0 * fy)
    top = _lattice(column, row, salt) * (1.0 - fx) + _lattice(column + 1, row, salt) * fx
    bottom = _lattice(column, row + 1, salt) * (1.0 - fx) + _lattice(column + 1, row + 1, salt) * fx
    return top * (1.0 - fy) + bottom * fy


@njit(nogil=True)
def _between(values, x, y):  # type: ignore[no-untyped-def]
    """What `_noise` is between the points of a lattice, of a table of values at them."""
    column, row = floor(x), floor(y)
    fx, fy = x - column, y - row
    fx, fy = fx * fx * (3.0 - 2.0 * fx), fy * fy * (3.0 - 2.0 * fy)
    top = values[row, column] * (1.0 - fx) + values[row, column + 1] * fx
    bottom = values[row + 1, column] * (1.0 - fx) + values[row + 1, column + 1] * fx
    return top * (1.0 - fy) + bottom * fy


@njit(nogil=True)
def _clip(value):  # type: ignore[no-untyped-def]
    return min(1.0, max(0.0, value))


@njit(nogil=True)
def _tone(texture, x, y, pixel):  # type: ignore[no-untyped-def]
    """How much of its second colour a texture has at a point, its own edges softened over a pixel."""
    kind, period = int(texture[KIND]), texture[PERIOD]
    cos, sin = texture[ALONG_X], texture[ALONG_Y]
    u = (x * cos + y * sin) / period + texture[PHASE_U]
    v = (y * cos - x * sin) / period + texture[PHASE_V]
    soft = pixel / period
    if kind == BLOTCHES:
        return _clip(0.5 + 5.0 * (_noise(1.6 * u, 1.6 * v, texture[SALT]) - 0.5))
    if kind == PLAIN:  # a slow change from one side of the picture to the other
        return _clip(0.3 + 0.4 * ((x * cos + y * sin) / WINDOW))
    if kind == WAVES:
        swing = 0.35 * v - floor(0.35 * v) - 0.5
        u += texture[DUTY] * 6.0 * swing * (1.0 - 2.0 * abs(swing))
    across = abs(u - floor(u) - 0.5)
    if kind in (STRIPES, WAVES):
        return _clip(0.5 - (across - 0.25) / soft)
    down = abs(v - floor(v) - 0.5)
    if kind == CHECKS:
        a, b = _clip(0.5 + (across - 0.25) / soft), _clip(0.5 + (down - 0.25) / soft)
        return a + b - 2.0 * a * b
    return _clip(0.5 - (sqrt(across * across + down * down) - 0.5 * texture[DUTY]) / soft)


@cached
def ground(image, places, pixel, sites, textures, wobble, salt):  # type: ignore[no-untyped-def]
    """Fill `image` (H, W, 3) and `places` (H, W) with the regions nearest to `sites` (n, 2), their borders wavy."""
    shifts = np.empty((2, 9, 9))  # noise of a lattice that spans the picture, drawn once and not for every pixel
    for k in range(2):
        for i in range(9):
            for j in range(9):
                shifts[k, i, j] = wobble * (_lattice(j, i, salt + k) - 0.5)
    for row in range(places.shape[0]):
        for column in range(places.shape[1]):
            x, y = (column + 0.5) * pixel, (row + 0.5) * pixel
            wx, wy = x + _between(shifts[0], x / 30.0, y / 30.0), y + _between(shifts[1], x / 30.0, y / 30.0)
            best, nearest = FAR * FAR, 0
            for k in range(len(sites)):
                square = (wx - sites[k, 0]) ** 2 + (wy - sites[k, 1]) ** 2
                if square < best:
                    best, nearest = square, k
            places[row, column] = nearest + 1
            texture = textures[nearest]
            tone = _tone(texture, x, y, pixel)
            for c in range(3):
                image[row, column, c] = texture[COLOUR + c] * (1.0 - tone) + texture[SECOND + c] * tone


@cached
def polygon(field, left, top, pixel, points):  # type: ignore[no-untyped-def]
    """Fill `field` (h, w), whose corner pixel is (top, left), with signed distances to a polygon, inside negative."""
    n = len(points)
    for row in range(field.shape[0]):
        y = (top + row + 0.5) * pixel
        for column in range(field.shape[1]):
            x = (left + column + 0.5) * pixel
            best, inside = FAR * FAR, False
            for k in range(n):
                ax, ay = points[k - 1, 0], points[k - 1, 1]
                bx, by = points[k, 0], points[k, 1]
                best = min(best, _square_to(x, y, ax, ay, bx, by))
                if (ay > y) != (by > y) and ((x - ax) * (by - ay) < (bx - ax) * (y - ay)) == (by > ay):
                    inside = not inside
            field[row, column] = -sqrt(best) if inside else sqrt(best)


@cached
def path(field, left, top, pixel, points, radius, margin):  # type: ignore[no-untyped-def]
    """Like `polygon`, of all that lies within `radius` of a chain of segments; exact up to `margin` outside."""
    field[:] = FAR
    reach = radius + margin
    for k in range(1, len(points)):
        ax, ay = points[k - 1, 0], points[k - 1, 1]
        bx, by = points[k, 0], points[k, 1]
        first = max(0, floor((min(ax, bx) - reach) / pixel) - left)
        last = min(field.shape[1] - 1, floor((max(ax, bx) + reach) / pixel) - left)
        for row in range(
            max(0, floor((min(ay, by) - reach) / pixel) - top),
            min(field.shape[0] - 1, floor((max(ay, by) + reach) / pixel) - top) + 1,
        ):
            y = (top + row + 0.5) * pixel
            for column in range(first, last + 1):
                x = (left + column + 0.5) * pixel
                distance = sqrt(_square_to(x, y, ax, ay, bx, by)) - radius
                field[row, column] = min(field[row, column], distance)


@cached
def ellipse(field, left, top, pixel, centre, axis, a, b):  # type: ignore[no-untyped-def]
    """Like `polygon`, of an ellipse with half axes `a` along `axis` and `b` across; near its outline to first order."""
    for row in range(field.shape[0]):
        y = (top + row + 0.5) * pixel - centre[1]
        for column in range(field.shape[1]):
            x = (left + column + 0.5) * pixel - centre[0]
            u, v = (x * axis[0] + y * axis[1]) / a, (y * axis[0] - x * axis[1]) / b
            level = sqrt(u * u + v * v)
            slope = sqrt((u / a) ** 2 + (v / b) ** 2)
            field[row, column] = level * (level - 1.0) / slope if slope > 1e-9 else -min(a, b)


@njit(nogil=True)
def _square_to(x, y, ax, ay, bx, by):  # type: ignore[no-untyped-def]
    dx, dy, px, py = bx - ax, by - ay, x - ax, y - ay
    along = _clip((px * dx + py * dy) / max(dx * dx + dy * dy, 1e-12))
    px -= along * dx
    py -= along * dy
    return px * px + py * py


@cached
def covered(field, left, top, places, counts):  # type: ignore[no-untyped-def]
    """Add to `counts` the pixels of every place that the inside of `field` covers; return those of it all."""
    total = 0
    for row in range(field.shape[0]):
        for column in range(field.shape[1]):
            if field[row, column] < 0.0:
                total += 1
                r, c = top + row, left + column
                if 0 <= r < places.shape[0] and 0 <= c < places.shape[1]:
                    counts[places[r, c]] += 1
    return total


@cached
def paint(image, places, pixel, field, left, top, place, texture, edge):  # type: ignore[no-untyped-def]
    """Paint the inside of `field`, softened over a pixel, and mark it with `place`; 0 marks nothing."""
    for row in range(max(0, -top), min(field.shape[0], places.shape[0] - top)):
        y = (top + row + 0.5) * pixel
        for column in range(max(0, -left), min(field.shape[1], places.shape[1] - left)):
            distance = field[row, column]
            if distance >= edge[REACH] and distance >= pixel:
                continue
            x = (left + column + 0.5) * pixel
            r, c = top + row, left + column
            if distance < 0.0 and place > 0:
                places[r, c] = place
            alpha = _clip(0.5 - distance / pixel)
            gaps = 1.0
            if distance > -edge[LINE_WIDTH] - pixel:
                gaps = _clip(3.0 * _noise(x / 9.0, y / 9.0, edge[EDGE_SALT]) - 1.0)
            line = edge[LINE] * gaps * _clip(0.5 + (distance + edge[LINE_WIDTH]) / pixel)
            shadow = edge[SHADOW] * gaps * _clip(1.0 - max(distance, 0.0) / edge[REACH])
            tone = _tone(texture, x, y, pixel)
            for k in range(3):
                colour = (texture[COLOUR + k] * (1.0 - tone) + texture[SECOND + k] * tone) * (1.0 - line)
                image[r, c, k] = image[r, c, k] * (1.0 - shadow) * (1.0 - alpha) + colour * alpha
