"""The compiled part: lays out a scene dash by dash and draws it.

Everything but the random stream is in this one file because a cached compilation is renewed when its own
file changes, not when the file of a function it calls does. Only +, −, ×, ÷ and √ are used on floats, which
IEEE 754 fixes to the last bit, so that an image is the same on every machine; no library's sine is.
"""

# mypy sees numba's decorator as untyped: the compiler, not mypy, checks the types in here.
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from math import ceil, floor, sqrt
from typing import NamedTuple

import numpy as np
from numba import njit

from crbp.data._compile import cached
from crbp.data._random import direction, start, uniform

# Columns of the `tally` array: scenes tried, long contours given up, distractors given up.
TRIES, LONG_FAILED, SHORT_FAILED = 0, 1, 2


class Plan(NamedTuple):
    """The numbers of a config that the compiled code reads; lengths in window pixels."""

    window: float
    padding: float
    length: float
    thickness: float
    margin: float
    gap: float
    seed_distance: float
    radius: float
    contours: int
    contour_dashes: int
    distractors: int
    distractor_dashes: int
    marks: int
    dash_tries: int
    contour_tries: int
    image_tries: int
    cells: int  # occupancy cells per window pixel and axis
    samples: int  # samples per image pixel and axis
    threshold: float


@njit(nogil=True)
def _stamp(occupied, plan, ax, ay, bx, by, radius, amount):  # type: ignore[no-untyped-def]
    """Add `amount` to the cells whose centre lies within `radius` of the segment from a to b."""
    cells, last = plan.cells, occupied.shape[0] - 1
    left = max(0, floor((min(ax, bx) - radius) * cells))
    right = min(last, floor((max(ax, bx) + radius) * cells))
    top = max(0, floor((min(ay, by) - radius) * cells))
    bottom = min(last, floor((max(ay, by) + radius) * cells))
    dx, dy = bx - ax, by - ay
    square = dx * dx + dy * dy
    for row in range(top, bottom + 1):
        py = (row + 0.5) / cells - ay
        for column in range(left, right + 1):
            px = (column + 0.5) / cells - ax
            along = px * dx + py * dy
            if along <= 0.0:
                distance = px * px + py * py
            elif along >= square:
                distance = (px - dx) * (px - dx) + (py - dy) * (py - dy)
            else:
                distance = px * px + py * py - along * along / square
            if distance <= radius * radius:
                occupied[row, column] += amount


@njit(nogil=True)
def _stamp_dash(occupied, plan, dash, amount):  # type: ignore[no-untyped-def]
    # One thickness more than the gap: half for this dash and half for the one that comes near, so that
    # a newcomer needs its axis alone to be free.
    reach = plan.gap + plan.thickness
    _stamp(occupied, plan, dash[0], dash[1], dash[2], dash[3], reach, amount)


@njit(nogil=True)
def _stamp_disc(occupied, plan, x, y, amount):  # type: ignore[no-untyped-def]
    _stamp(occupied, plan, x, y, x, y, plan.radius + plan.gap + 0.5 * plan.thickness, amount)


@njit(nogil=True)
def _taken(occupied, plan, x, y):  # type: ignore[no-untyped-def]
    """Whether a point lies in the border or on an occupied cell."""
    low, high = plan.padding, plan.window - plan.padding
    if not (low <= x <= high and low <= y <= high):
        return True
    return occupied[int(y * plan.cells), int(x * plan.cells)] > 0


@njit(nogil=True)
def _dash_fits(occupied, plan, dash):  # type: ignore[no-untyped-def]
    steps = ceil(plan.length * plan.cells * 1.5)
    for step in range(steps + 1):
        t = step / steps
        x = dash[0] + t * (dash[2] - dash[0])
        y = dash[1] + t * (dash[3] - dash[1])
        if _taken(occupied, plan, x, y):
            return False
    return True


@njit(nogil=True)
def _disc_fits(occupied, plan, x, y):  # type: ignore[no-untyped-def]
    """Whether a disc at a contour's end would keep the gap to all dashes on the occupancy map."""
    radius = plan.radius - 0.5 * plan.thickness
    last = occupied.shape[0] - 1
    for row in range(max(0, int((y - radius) * plan.cells)), min(last, int((y + radius) * plan.cells)) + 1):
        py = (row + 0.5) / plan.cells - y
        for column in range(max(0, int((x - radius) * plan.cells)), min(last, int((x + radius) * plan.cells)) + 1):
            px = (column + 0.5) / plan.cells - x
            if px * px + py * py <= radius * radius and occupied[row, column] > 0:
                return False
    return True


@njit(nogil=True)
def _place(dash, plan, x, y, dx, dy):  # type: ignore[no-untyped-def]
    """Put the dash that leaves the pivot (x, y) in direction (dx, dy): the margin first, then the stroke."""
    dash[0] = x + plan.margin * dx
    dash[1] = y + plan.margin * dy
    dash[2] = x + (plan.margin + plan.length) * dx
    dash[3] = y + (plan.margin + plan.length) * dy


@njit(nogil=True)
def _extend(occupied, plan, bends, weights, state, dash, x, y, dx, dy):  # type: ignore[no-untyped-def]
    """Place a dash at the pivot (x, y), bent from (dx, dy) by a drawn angle; return it and its direction."""
    reach = plan.margin + plan.length
    total = 0.0
    for k in range(bends.shape[0]):
        hx = dx * bends[k, 0] - dy * bends[k, 1]
        hy = dx * bends[k, 1] + dy * bends[k, 0]
        free = not _taken(occupied, plan, x + reach * hx, y + reach * hy)
        weights[k] = bends[k, 2] if free else 0.0
        total += weights[k]
    for _ in range(plan.dash_tries):
        if total <= 1e-9:
            break
        level = uniform(state) * total
        chosen = -1
        for k in range(bends.shape[0]):
            if weights[k] > 0.0:
                chosen = k  # the last free one, should rounding leave a rest of `level`
                level -= weights[k]
                if level < 0.0:
                    break
        hx = dx * bends[chosen, 0] - dy * bends[chosen, 1]
        hy = dx * bends[chosen, 1] + dy * bends[chosen, 0]
        norm = sqrt(hx * hx + hy * hy)  # or the length of the direction would drift along the contour
        hx, hy = hx / norm, hy / norm
        _place(dash, plan, x, y, hx, hy)
        if _dash_fits(occupied, plan, dash):
            return True, hx, hy
        total -= weights[chosen]
        weights[chosen] = 0.0
    return False, dx, dy


@njit(nogil=True)
def _seed(occupied, plan, state, seeds, n_seeds):  # type: ignore[no-untyped-def]
    """Draw a starting point; return whether it keeps its distance to the others."""
    span = plan.window - 2.0 * plan.padding
    x = plan.padding + span * uniform(state)
    y = plan.padding + span * uniform(state)
    seeds[n_seeds, 0], seeds[n_seeds, 1] = x, y
    for k in range(n_seeds):
        ex, ey = x - seeds[k, 0], y - seeds[k, 1]
        if ex * ex + ey * ey < plan.seed_distance * plan.seed_distance:
            return False
    return not _taken(occupied, plan, x, y)


@njit(nogil=True)
def _grow(occupied, plan, bends, weights, state, seed, dashes, long):  # type: ignore[no-untyped-def]
    """Grow one contour from `seed` into `dashes`; leave the occupancy map as it was on failure.

    A dash enters the map only once its successor stands, as a contour must not block its own next step.
    Both ends of a long contour keep room for a disc: were it one end only, the free room would tell which.
    """
    n = dashes.shape[0]
    x, y = seed[0], seed[1]
    dx, dy = direction(state)
    _place(dashes[0], plan, x, y, dx, dy)
    fits = _dash_fits(occupied, plan, dashes[0])
    if fits and long:
        fits = _disc_fits(occupied, plan, dashes[0, 0], dashes[0, 1])
    if not fits:
        return False
    placed = 1
    while placed < n:
        step = plan.length + 2.0 * plan.margin
        x, y = x + step * dx, y + step * dy
        fits, dx, dy = _extend(occupied, plan, bends, weights, state, dashes[placed], x, y, dx, dy)
        if fits and long and placed == n - 1:
            fits = _disc_fits(occupied, plan, dashes[placed, 2], dashes[placed, 3])
        if not fits:
            for k in range(placed - 1):
                _stamp_dash(occupied, plan, dashes[k], -1)
            if long and placed > 1:
                _stamp_disc(occupied, plan, dashes[0, 0], dashes[0, 1], -1)
            return False
        _stamp_dash(occupied, plan, dashes[placed - 1], 1)
        if long and placed == 1:
            _stamp_disc(occupied, plan, dashes[0, 0], dashes[0, 1], 1)
        placed += 1
    _stamp_dash(occupied, plan, dashes[n - 1], 1)
    if long:
        _stamp_disc(occupied, plan, dashes[n - 1, 2], dashes[n - 1, 3], 1)
    return True


@njit(nogil=True)
def _layout(occupied, plan, bends, weights, state, seeds, dashes, tally):  # type: ignore[no-untyped-def]
    """Grow all contours, the long ones first; return whether a scene was found in the tries allowed."""
    for _ in range(plan.image_tries):
        tally[TRIES] += 1
        occupied[:] = 0
        first = 0
        done = True
        for contour in range(plan.contours + plan.distractors):
            long = contour < plan.contours
            count = plan.contour_dashes if long else plan.distractor_dashes
            done = False
            for _ in range(plan.contour_tries):
                if _seed(occupied, plan, state, seeds, contour) and _grow(
                    occupied, plan, bends, weights, state, seeds[contour], dashes[first : first + count], long
                ):
                    done = True
                    break
                tally[LONG_FAILED if long else SHORT_FAILED] += 1
            if not done:
                break
            first += count
        if done:
            return True
    return False


@njit(nogil=True)
def _mark(plan, state, dashes, marks):  # type: ignore[no-untyped-def]
    """Choose the target and put the disc(s): rows of (x, y, contour); return the target and the label."""
    target = int(uniform(state) * plan.contours)
    end = int(uniform(state) * 2.0)
    label = 0
    for k in range(plan.marks):
        contour = target
        if k == 1:
            label = int(uniform(state) * 2.0)
            if label == 1:
                end = 1 - end
            else:
                contour = (target + 1 + int(uniform(state) * (plan.contours - 1))) % plan.contours
                end = int(uniform(state) * 2.0)
        tip = dashes[contour * plan.contour_dashes + end * (plan.contour_dashes - 1)]
        marks[k, 0], marks[k, 1], marks[k, 2] = tip[2 * end], tip[2 * end + 1], contour
    return target, label


@njit(nogil=True)
def _box(coverage, plan, low, high):  # type: ignore[no-untyped-def]
    """Return the first and the last pixel, along one axis, of a stretch of the window."""
    size = coverage.shape[1]
    scale = size / plan.window
    return max(0, floor(low * scale)), min(size - 1, floor(high * scale))


@njit(nogil=True)
def _draw_dash(coverage, plan, dash, disc, target):  # type: ignore[no-untyped-def]
    """Count the samples in a dash but outside the disc (x, y, radius²) on it, so that none counts twice."""
    dx = (dash[2] - dash[0]) / plan.length
    dy = (dash[3] - dash[1]) / plan.length
    half = 0.5 * plan.thickness
    left, right = _box(coverage, plan, min(dash[0], dash[2]) - half, max(dash[0], dash[2]) + half)
    top, bottom = _box(coverage, plan, min(dash[1], dash[3]) - half, max(dash[1], dash[3]) + half)
    scale = plan.window / coverage.shape[1]
    pitch = scale / plan.samples
    for row in range(top, bottom + 1):
        for column in range(left, right + 1):
            hits = 0
            for i in range(plan.samples):
                y = row * scale + (i + 0.5) * pitch
                for j in range(plan.samples):
                    x = column * scale + (j + 0.5) * pitch
                    px, py = x - dash[0], y - dash[1]
                    ex, ey = x - disc[0], y - disc[1]
                    along = px * dx + py * dy
                    across = px * dy - py * dx
                    in_dash = 0.0 <= along <= plan.length and -half <= across <= half
                    if in_dash and ex * ex + ey * ey > disc[2]:
                        hits += 1
            coverage[0, row, column] += hits
            if target:
                coverage[1, row, column] += hits


@njit(nogil=True)
def _draw_disc(coverage, plan, disc, target):  # type: ignore[no-untyped-def]
    left, right = _box(coverage, plan, disc[0] - plan.radius, disc[0] + plan.radius)
    top, bottom = _box(coverage, plan, disc[1] - plan.radius, disc[1] + plan.radius)
    scale = plan.window / coverage.shape[1]
    pitch = scale / plan.samples
    for row in range(top, bottom + 1):
        for column in range(left, right + 1):
            hits = 0
            for i in range(plan.samples):
                ey = row * scale + (i + 0.5) * pitch - disc[1]
                for j in range(plan.samples):
                    ex = column * scale + (j + 0.5) * pitch - disc[0]
                    if ex * ex + ey * ey <= disc[2]:
                        hits += 1
            coverage[0, row, column] += hits
            if target:
                coverage[1, row, column] += hits


@njit(nogil=True)
def _render(coverage, plan, dashes, marks, target, tones, image, mask):  # type: ignore[no-untyped-def]
    """Draw a scene: `image` from the share of samples covered, `mask` from the target's share."""
    coverage[:] = 0
    disc = np.empty(3)
    for n in range(dashes.shape[0]):
        contour = n // plan.contour_dashes if n < plan.contours * plan.contour_dashes else -1
        disc[0], disc[1], disc[2] = 0.0, 0.0, -1.0
        for k in range(plan.marks):
            place = n - int(marks[k, 2]) * plan.contour_dashes
            first, last = place == 0, place == plan.contour_dashes - 1
            if contour == marks[k, 2] and (
                (first and marks[k, 0] == dashes[n, 0]) or (last and marks[k, 0] == dashes[n, 2])
            ):
                disc[0], disc[1], disc[2] = marks[k, 0], marks[k, 1], plan.radius * plan.radius
        _draw_dash(coverage, plan, dashes[n], disc, contour == target)
    disc[2] = plan.radius * plan.radius
    for k in range(plan.marks):
        disc[0], disc[1] = marks[k, 0], marks[k, 1]
        _draw_disc(coverage, plan, disc, marks[k, 2] == target)
    full = plan.samples * plan.samples
    for row in range(coverage.shape[1]):
        for column in range(coverage.shape[2]):
            image[row, column] = tones[min(full, coverage[0, row, column])]
            mask[row, column] = coverage[1, row, column] > plan.threshold * full


@cached
def fill(plan, bends, tones, key, indices, images, masks, labels, dashes, marks, targets, tallies):  # type: ignore[no-untyped-def]
    """Make the scenes `indices` and draw them; return the first position that failed, or −1.

    Shapes: bends (K, 3) float64, the cosine, sine and weight of each angle; tones (samples² + 1,) uint8;
    key (2,) uint64; indices (n,) int64; images and masks (n, H, W) uint8; labels and targets (n,) int64;
    dashes (n, D, 4) float64, tail and head of each dash; marks (n, 2, 3) float64, (x, y, contour) of each
    disc; tallies (n, 3) int64.
    """
    side = ceil(plan.window) * plan.cells
    occupied = np.zeros((side + 1, side + 1), np.int16)
    coverage = np.zeros((2, images.shape[1], images.shape[2]), np.int32)
    weights = np.zeros(bends.shape[0])
    seeds = np.zeros((plan.contours + plan.distractors, 2))
    state = np.zeros(3, np.uint64)
    for n in range(indices.shape[0]):
        start(state, key, indices[n])
        if not _layout(occupied, plan, bends, weights, state, seeds, dashes[n], tallies[n]):
            return n
        targets[n], labels[n] = _mark(plan, state, dashes[n], marks[n])
        _render(coverage, plan, dashes[n], marks[n], targets[n], tones, images[n], masks[n])
    return -1
