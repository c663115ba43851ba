"""The images of the app: made by the generator, drawn by hand, or read from a file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from crbp.data._foreign import open_image
from crbp.data.errors import DataError
from crbp.data.pathfinder import GenerationError, PathfinderConfig, generate_batch
from crbp.errors import CrbpError

SIZES = (32, 160)  # least and most pixels of a side
FRAMES = {"48 × 48, as the models were trained": "small9", "150 × 150, as published": "pf14"}
# Of the first image: one on which the two models that come first part after N.
FIRST: dict[str, Any] = {
    "frame": next(iter(FRAMES)), "length": 9, "distractors": 6, "distractor_length": 3, "straightness": 2.2, "seed": 2,
}  # fmt: skip

_SAMPLES = 8  # per pixel and axis of a drawing
_STROKES, _POINTS = 64, 4096  # the most of a drawing
_SOLID = 1.0  # dashes, the least length of a stroke


class ImageError(CrbpError, ValueError):
    """What was asked for is no image that the app can show a model."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image to show a model.

    Attributes:
        image: ``(1, 1, H, W)`` in [0, 1].
        mask: the target, ``(1, H, W)`` of bool; None where it is not known.
        told: what the reader should know of it.
    """

    image: Tensor
    mask: Tensor | None
    told: str = ""


def made(
    *, frame: str, length: int, distractors: int, distractor_length: int, straightness: float, seed: int
) -> Picture:
    """An image of the generator's, of its test split.

    Args:
        frame: one of `FRAMES`.
        length: dashes of the two long contours, one of which is marked.
        distractors: short contours.
        distractor_length: dashes of each.
        straightness: a contour bends by at most π / (2 · this) from dash to dash.
        seed: another one gives another image.

    Raises:
        ImageError: if a setting is out of range, or there is no room for so many dashes.
    """
    if frame not in FRAMES:
        raise ImageError(f"picture: {frame!r} is unknown; choose one of {', '.join(FRAMES)}")
    try:
        config = PathfinderConfig.preset(
            FRAMES[frame],
            contour_length=_whole("contour length", length),
            n_distractors=_whole("distractors", distractors),
            distractor_length=_whole("dashes of a distractor", distractor_length),
            continuity=straightness,
            image_tries=10,  # the published 50 would keep a crowded picture waiting
        )
        batch = generate_batch(config, split="test", seed=_whole("seed", seed), start=0, count=1)
    except GenerationError:
        raise ImageError(
            f"{length} dashes and {distractors} distractors of {distractor_length} do not fit into the picture of seed "
            f"{seed}; choose fewer or shorter ones, or another seed"
        ) from None
    except ValueError as error:
        raise ImageError(str(error)) from error
    image = torch.from_numpy(batch.images).unsqueeze(1).float() / 255
    return Picture(image=image, mask=torch.from_numpy(batch.masks))


def drawn(strokes: str | None, *, frame: str) -> Picture:
    """A drawing as the generator would render it: each stroke a contour of dashes, a disc at the start of the first.

    Args:
        strokes: JSON, of each stroke its points ``[x, y]``, shares of the side of the picture.
        frame: one of `FRAMES`.

    Raises:
        ImageError: if there is no stroke of at least one dash, or they are no strokes.
    """
    if frame not in FRAMES:
        raise ImageError(f"picture: {frame!r} is unknown; choose one of {', '.join(FRAMES)}")
    config = PathfinderConfig.preset(FRAMES[frame])
    lines = [line * config.window for line in _strokes(strokes)]
    lines = [line for line in lines if _lengths(line).sum() >= _SOLID * config.dash_length]
    if not lines:
        raise ImageError(
            "the drawing is empty: draw a line with the pencil, or with the arrow keys after pressing the space bar"
        )
    target = _rendered(lines[:1], config, disc=True)
    others = _rendered(lines[1:], config, disc=False)
    image = torch.from_numpy(np.maximum(target, others)).float()[None, None]
    return Picture(image=image, mask=torch.from_numpy(target > config.mask_threshold)[None])


def uploaded(file: str | Path | None, *, size: int, name: str | None = None) -> Picture:
    """A file as a grey picture, its longer side brought to ``size`` pixels; dark strokes on a bright ground inverted.

    Args:
        file: of an image.
        size: in pixels, within `SIZES`.
        name: to call it in messages; None for its own.

    Raises:
        ImageError: if there is none, it cannot be read, or it is too narrow.
    """
    if file is None:
        raise ImageError("there is no file yet: choose one, a PNG or JPEG of bright strokes on a dark ground")
    if isinstance(size, bool) or not isinstance(size, int) or not SIZES[0] <= size <= SIZES[1]:
        raise ImageError(f"size={size!r} is not a whole number of {SIZES[0]} to {SIZES[1]} pixels; choose one within")
    name = name or Path(file).name
    try:
        with open_image(file, "the image", "choose a PNG, JPEG, WebP, BMP or TIFF file") as opened:
            opened.draft("L", (2 * SIZES[1], 2 * SIZES[1]))  # decodes a photograph at a fraction of its size
            grey = _grey(ImageOps.exif_transpose(opened))
    except DataError as error:
        raise ImageError(f"{name}: {error.what.split(' (', 1)[0]}; {error.remedy}") from error
    scale = size / max(grey.size)
    width, height = (max(1, round(side * scale)) for side in grey.size)
    if min(width, height) < SIZES[0] // 4:
        raise ImageError(
            f"{name} is {grey.width} × {grey.height} pixels, too narrow to trace anything in; crop it squarer"
        )
    pixels = np.asarray(grey.resize((width, height), Image.Resampling.BOX), np.float32) / 255
    if np.ptp(pixels) == 0:
        raise ImageError(f"{name} is of one grey: there is nothing in it to trace; choose another")
    told = f"{name}, shown to the models as {width} × {height} pixels"
    if float(np.median(pixels)) > 0.5:
        pixels, told = 1 - pixels, f"{told}, inverted: the models know bright strokes on a dark ground"
    return Picture(image=torch.from_numpy(pixels)[None, None], mask=None, told=f"{told}.")


def _grey(image: Image.Image) -> Image.Image:
    """An image in 8 bits of grey; what has more is scaled to its range, and what is transparent put on a ground."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, np.float64)
        if not np.isfinite(values).all():
            raise ImageError("the image has values that are not finite; choose another")
        return Image.fromarray((255 * (values - values.min()) / max(float(np.ptp(values)), 1e-300)).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("L")
    grey, alpha = image.convert("LA").split()
    weight, shade = np.asarray(alpha, np.float64) / 255, np.asarray(grey, np.float64)
    ground = 0.0 if (weight * shade).sum() > 127 * weight.sum() else 255.0  # strokes stand out from it
    return Image.fromarray(np.rint(weight * shade + (1 - weight) * ground).astype(np.uint8))


def _whole(name: str, value: float) -> int:
    if isinstance(value, bool) or value is None or not float(value).is_integer():
        raise ImageError(f"{name}={value!r} is no whole number; give one")
    return int(value)


def _strokes(text: str | None) -> list[NDArray[np.float64]]:
    """The points ``(n, 2)`` of each stroke."""
    try:
        found: Any = json.loads(text or "[]")
        if len(found) > _STROKES or any(len(stroke) > _POINTS for stroke in found):
            raise ImageError(
                f"the drawing has more than {_STROKES} strokes or a stroke of more than {_POINTS} points; draw less"
            )
        lines = [np.asarray(stroke, np.float64).reshape(-1, 2) for stroke in found if stroke]
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError("the drawing is no list of strokes; clear it and draw again") from error
    if any(not np.isfinite(line).all() for line in lines):
        raise ImageError("the drawing has points that are no numbers; clear it and draw again")
    return [line.clip(0, 1) for line in lines]


def _lengths(line: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths: NDArray[np.float64] = np.linalg.norm(np.diff(line, axis=0), axis=1)
    return lengths


def dashes(line: NDArray[np.float64], *, length: float, gap: float) -> list[tuple[float, ...]]:
    """The dashes ``(x, y, x, y)`` along a line of points ``(n, 2)``, from its start on, as many as fit."""
    along = np.concatenate([[0.0], np.cumsum(_lengths(line))])
    found: list[tuple[float, ...]] = []
    for k in range(math.floor((along[-1] + gap) / (length + gap) + 1e-9)):
        ends = np.minimum((k * (length + gap), k * (length + gap) + length), along[-1])
        (ax, bx), (ay, by) = (np.interp(ends, along, line[:, axis]) for axis in (0, 1))
        found.append((float(ax), float(ay), float(bx), float(by)))
    return found


def _rendered(lines: Sequence[NDArray[np.float64]], config: PathfinderConfig, *, disc: bool) -> NDArray[np.float32]:
    """Coverage ``(H, W)`` of the dashes of lines in window pixels."""
    size = config.image_size
    scale = _SAMPLES * size / config.window
    canvas = Image.new("L", (_SAMPLES * size, _SAMPLES * size))
    pen = ImageDraw.Draw(canvas)
    for line in lines:
        for dash in dashes(line, length=config.dash_length, gap=2 * config.dash_margin):
            pen.line([scale * value for value in dash], fill=255, width=round(scale * config.dash_thickness))
    if disc:
        (x, y), radius = (scale * lines[0][0]).tolist(), scale * config.marker_radius
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float32) / np.float32(255)
