"""Images from a config: what the compiled part needs, its calls, and its failures in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crbp.data.pathfinder.config import PathfinderConfig, Split, stream_key

_BENDS = 49  # candidate angles of a dash, 2 degrees apart at the published continuity
_MAP_CELLS_PER_GAP = 3  # a coarser occupancy map would let dashes come visibly closer than the gap


class GenerationError(RuntimeError):
    """No scene was found in the number of tries the config allows."""


class Batch(NamedTuple):
    """Images and their answers: `images` (n, H, W) uint8, `masks` (n, H, W) bool, `labels` (n,) int64."""

    images: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Scene:
    """The geometry behind one image, in window pixels, (x, y) with y downwards.

    Attributes:
        contours: One array (n, 4) per contour, long ones first; each row the tail and the head of a dash.
        target: Index of the target among the contours.
        discs: Array (1 or 2, 2), the centres of the discs; the first is the target's.
        label: The class of the image.
        tries: Scenes tried, this one included.
    """

    contours: tuple[NDArray[np.float64], ...]
    target: int
    discs: NDArray[np.float64]
    label: int
    tries: int


class _Buffers(NamedTuple):
    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    labels: NDArray[np.int64]
    dashes: NDArray[np.float64]
    marks: NDArray[np.float64]
    targets: NDArray[np.int64]
    tallies: NDArray[np.int64]


def generate_batch(config: PathfinderConfig, *, split: Split, seed: int, start: int, count: int) -> Batch:
    """Make the images `start` … `start + count - 1` of a split.

    Each image is a function of (config, split, seed, its index) alone, the same on every machine and for
    every way of asking. Splits draw from streams of different keys and share no image.

    Raises:
        ValueError: `start` or `count` is negative, the split is unknown or the seed out of range.
        GenerationError: A scene did not fit in `config.image_tries` tries; the message says what to change.
        ImportError: The extra `crbp[data]` is not installed.
    """
    if start < 0 or count < 0:
        raise ValueError(f"start={start} and count={count} must not be negative")
    return generate(config, np.arange(start, start + count, dtype=np.int64), split=split, seed=seed)


def generate(config: PathfinderConfig, indices: NDArray[np.int64], *, split: Split, seed: int) -> Batch:
    """Make the images at `indices` (n,), in that order; see `generate_batch`."""
    made = _run(config, indices, split=split, seed=seed)
    return Batch(made.images, made.masks.view(np.bool_), made.labels)


def scene(config: PathfinderConfig, index: int, *, split: Split, seed: int) -> Scene:
    """Return the geometry of one image, to study or to test what `generate_batch` draws."""
    made = _run(config, np.array([index], dtype=np.int64), split=split, seed=seed)
    long = config.n_contours * config.contour_length
    contours = [
        *np.split(made.dashes[0, :long], config.n_contours),
        *(np.split(made.dashes[0, long:], config.n_distractors) if config.n_distractors else ()),
    ]
    return Scene(
        contours=tuple(contours),
        target=int(made.targets[0]),
        discs=made.marks[0, : _marks(config), :2],
        label=int(made.labels[0]),
        tries=int(made.tallies[0, 0]),
    )


def _run(config: PathfinderConfig, indices: NDArray[np.int64], *, split: Split, seed: int) -> _Buffers:
    from crbp.data.pathfinder import _kernels  # numba takes a second to import

    key = np.array(stream_key(config, split=split, seed=seed), dtype=np.uint64)
    plan, bends, tones = _plan(config)
    n, size = len(indices), config.image_size
    dashes = config.n_contours * config.contour_length + config.n_distractors * config.distractor_dashes
    made = _Buffers(
        images=np.empty((n, size, size), np.uint8),
        masks=np.empty((n, size, size), np.uint8),
        labels=np.zeros(n, np.int64),
        dashes=np.zeros((n, dashes, 4)),
        marks=np.zeros((n, 2, 3)),
        targets=np.zeros(n, np.int64),
        tallies=np.zeros((n, 3), np.int64),
    )
    failed = _kernels.fill(plan, bends, tones, key, np.ascontiguousarray(indices, np.int64), *made)
    if failed >= 0:
        raise GenerationError(_too_crowded(config, split, seed, int(indices[failed]), made.tallies[failed]))
    return made


def _too_crowded(config: PathfinderConfig, split: str, seed: int, index: int, tally: NDArray[np.int64]) -> str:
    tries, long, short = (int(value) for value in tally)
    if long >= short:
        what = f"a long contour (contour_length={config.contour_length}, n_contours={config.n_contours})"
        remedy = "lower contour_length or n_contours, or raise window"
    else:
        what = (
            f"a distractor (n_distractors={config.n_distractors} of {config.distractor_dashes} dashes, "
            f"seed_distance={config.seed_distance:g})"
        )
        remedy = "lower n_distractors, distractor_length or seed_distance, or raise window"
    return (
        f"image {index} of split {split!r}, seed {seed}: the picture is too crowded. In {tries} scenes {long} "
        f"starts of a long contour and {short} of a distractor failed, mostly {what}; {remedy} "
        f"(window={config.window}, padding={config.padding:g}, dash_margin={config.dash_margin:g}), "
        f"or allow more with contour_tries={config.contour_tries} and image_tries={config.image_tries}"
    )


@lru_cache(maxsize=64)
def _plan(config: PathfinderConfig) -> tuple[Any, NDArray[np.float64], NDArray[np.uint8]]:
    """Translate a config into what the compiled code reads."""
    from crbp.data.pathfinder import _kernels

    samples = math.ceil(config.anti_alias * config.window / config.image_size)
    plan = _kernels.Plan(
        window=float(config.window),
        padding=config.padding,
        length=config.dash_length,
        thickness=config.dash_thickness,
        margin=config.dash_margin,
        gap=config.contour_gap,
        seed_distance=config.seed_distance,
        radius=config.marker_radius,
        contours=config.n_contours,
        contour_dashes=config.contour_length,
        distractors=config.n_distractors,
        distractor_dashes=config.distractor_dashes,
        marks=_marks(config),
        dash_tries=config.dash_tries,
        contour_tries=config.contour_tries,
        image_tries=config.image_tries,
        cells=max(1, math.ceil(_MAP_CELLS_PER_GAP / config.contour_gap)),
        samples=samples,
        threshold=config.mask_threshold,
    )
    full = samples * samples
    tones = [int(255 * config.contrast * hits / full + 0.5) for hits in range(full + 1)]
    return plan, _bend_table(config.continuity), np.array(tones, np.uint8)


def _bend_table(continuity: float) -> NDArray[np.float64]:
    """Return the candidate angles of a dash as rows of (cosine, sine, cos²(continuity · angle))."""
    limit = 0.5 * math.pi / continuity
    angles = [limit * (2 * k / (_BENDS - 1) - 1) for k in range(_BENDS)]
    return np.array([(_cos(a), _sin(a), _cos(continuity * a) ** 2) for a in angles])


def _sin(x: float) -> float:
    """Sine for |x| ≤ π/2 by its series: the machine's own may differ in the last bit from another's."""
    total = term = x
    for k in range(3, 29, 2):
        term = -term * x * x / (k * (k - 1))
        total += term
    return total


def _cos(x: float) -> float:
    total = term = 1.0
    for k in range(2, 30, 2):
        term = -term * x * x / (k * (k - 1))
        total += term
    return total


def _marks(config: PathfinderConfig) -> int:
    return 2 if config.form == "classification" else 1
