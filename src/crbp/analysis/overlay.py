"""One picture of a panoptic prediction: the image under translucent segments, with contours, names and a legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor

_Array = NDArray[Any]
_Colour = tuple[int, int, int]
_WHITE: _Colour = (255, 255, 255)
_BLACK: _Colour = (0, 0, 0)
_INK: _Colour = (25, 25, 25)
_SHADES = (  # what the segments of one class are mixed with, from the largest on
    (_WHITE, 0.0),
    (_BLACK, 0.3),
    (_WHITE, 0.4),
    (_BLACK, 0.5),
    (_WHITE, 0.2),
    (_BLACK, 0.15),
    (_WHITE, 0.6),
    (_BLACK, 0.4),
)
_LONGEST = 4096  # pixels that an enlarged picture may have along a side


class _Segment(NamedTuple):
    place: int
    category: int
    colour: _Colour
    box: tuple[slice, slice]
    area: int


def overlay(
    image: Tensor | _Array,
    panoptic_map: Tensor | _Array,
    segments: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    colours: Mapping[int, _Colour],
    *,
    opacity: float = 0.5,
    shortest: int = 480,
) -> Image.Image:
    """Draw the segments over the image, each with its contour and, where there is room, the name of its class.

    Segments of one class differ in shade; void keeps the image as it is. A strip below names every class in sight, and
    how many segments it has. Small pictures are first enlarged by a whole factor, so that contours stay on the edges
    of pixels and names can be read. Equal arguments make equal pictures.

    Args:
        image: ``(H, W, 3)`` of uint8, red, green and blue.
        panoptic_map: ``(H, W)`` of integers, the id of the segment of each pixel; 0 is void.
        segments: mappings with ``id`` and ``category_id``, as in COCO's ``segments_info``.
        names: category id → name.
        colours: category id → red, green and blue of 0 to 255.
        opacity: of the segments, from 0, where only contours show, to 1, where the image does not.
        shortest: the least length of the picture's short side in pixels, legend apart, unless the long side would be
            enlarged beyond 4096.

    Raises:
        ValueError: shapes or types are others, the opacity is out of range, a segment's class has no name or colour, or
            the map has an id that no segment has.
    """
    pixels, ids = np.asarray(image), np.asarray(panoptic_map)
    _check(pixels, ids, opacity)
    numbers, places = np.unique(ids, return_inverse=True)
    places = places.reshape(ids.shape).astype(np.int32)
    found = _find(numbers, places, segments, names, colours)
    scale = max(1, min(-(-shortest // min(ids.shape)), _LONGEST // max(ids.shape)))
    picture = Image.fromarray(_paint(_enlarge(pixels, scale), _enlarge(places, scale), numbers, found, opacity))
    font = font_of(max(11, round(min(picture.size) / 36)))
    _write_names(picture, places, found, names, font, scale)
    return _with_legend(picture, found, names, colours, font)


def _enlarge(array: _Array, scale: int) -> _Array:
    return np.repeat(np.repeat(array, scale, axis=0), scale, axis=1)


def font_of(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's own font: the same everywhere, and with more letters than Pillow's."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def _check(pixels: _Array, ids: _Array, opacity: float) -> None:
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise ValueError(f"the image must be (H, W, 3) of uint8, not {pixels.shape} of {pixels.dtype}")
    if ids.shape != pixels.shape[:2] or ids.dtype.kind not in "iu":
        raise ValueError(
            f"the map must be {pixels.shape[:2]} of integers, as the image is, not {ids.shape} of {ids.dtype}"
        )
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must lie in [0, 1], not {opacity!r}")


def _find(
    numbers: _Array,
    places: _Array,
    segments: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    colours: Mapping[int, _Colour],
) -> list[_Segment]:
    """The segments that have pixels, the largest first, with their boxes and shades; ``numbers[places]`` is the map."""
    boxes = ndimage.find_objects(places + 1)
    area = np.bincount(places.ravel())
    categories = {int(segment["id"]): int(segment["category_id"]) for segment in segments}
    seen: dict[int, int] = {}
    found = []
    for place in np.argsort(-area, kind="stable").tolist():
        number = int(numbers[place])
        if number == 0:
            continue
        if number not in categories:
            raise ValueError(f"the map has the id {number}, which no segment has; name it, or set its pixels to 0")
        category = categories[number]
        if category not in names or category not in colours:
            raise ValueError(f"category {category} of segment {number} needs a name and a colour; add them")
        other, share = _SHADES[seen.get(category, 0) % len(_SHADES)]
        seen[category] = seen.get(category, 0) + 1
        shade = _mix(colours[category], other, share)
        found.append(_Segment(place, category, shade, boxes[place], int(area[place])))
    return found


def _paint(pixels: _Array, places: _Array, numbers: _Array, found: Sequence[_Segment], opacity: float) -> _Array:
    """Fill the segments, and draw their contours within them, so that neighbours have one each."""
    fill, edge = np.zeros((2, len(numbers), 3), np.float32)
    for segment in found:
        fill[segment.place], edge[segment.place] = segment.colour, _mix(segment.colour, _WHITE, 0.6)
    width = 2 * max(1, round(min(places.shape) / 500)) + 1
    border = ndimage.maximum_filter(places, width) != ndimage.minimum_filter(places, width)
    inside = (numbers != 0)[places]
    canvas = pixels.astype(np.float32)
    canvas[inside] += opacity * (fill[places[inside]] - canvas[inside])
    canvas[inside & border] = edge[places[inside & border]]
    return canvas.round().astype(np.uint8)


def _mix(colour: _Colour, other: _Colour, share: float) -> _Colour:
    red, green, blue = (round((1 - share) * a + share * b) for a, b in zip(colour, other, strict=True))
    return red, green, blue


def _write_names(
    picture: Image.Image,
    places: _Array,
    found: Sequence[_Segment],
    names: Mapping[int, str],
    font: ImageFont.FreeTypeFont,
    scale: int,
) -> None:
    """Write the names, of large segments first; one that does not fit its segment, or meets another, is left out."""
    draw = ImageDraw.Draw(picture)
    taken: list[tuple[float, float, float, float]] = []
    for segment in found:
        (top, left), radius = _middle(places[segment.box] == segment.place)
        if scale * radius < 0.75 * font.size:
            continue
        name = names[segment.category]
        x, y = scale * (left + segment.box[1].start + 0.5), scale * (top + segment.box[0].start + 0.5)
        box = draw.textbbox((x, y), name, font, "mm", stroke_width=2)
        right, down = (
            max(0, 2 - box[side]) - max(0, box[side + 2] - picture.size[side] + 2) for side in (0, 1)
        )  # back into the picture
        box = (box[0] + right, box[1] + down, box[2] + right, box[3] + down)
        if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            continue
        taken.append(box)
        draw.text((x + right, y + down), name, _WHITE, font, "mm", stroke_width=2, stroke_fill=_INK)


def _middle(inside: _Array) -> tuple[tuple[int, int], float]:
    """The pixel farthest from the outside, and how far it is; of several, the one nearest to the middle of them."""
    distance = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
    far = np.argwhere(distance >= distance.max() - 0.5)
    top, left = far[np.argmin(((far - far.mean(0)) ** 2).sum(1))].tolist()
    return (top, left), float(distance.max())


def _with_legend(
    picture: Image.Image,
    found: Sequence[_Segment],
    names: Mapping[int, str],
    colours: Mapping[int, _Colour],
    font: ImageFont.FreeTypeFont,
) -> Image.Image:
    """Put a white strip below, with the classes in sight, the one with the most pixels first, in rows."""
    if not found:
        return picture
    area: dict[int, int] = {}
    count: dict[int, int] = {}
    for segment in found:
        area[segment.category] = area.get(segment.category, 0) + segment.area
        count[segment.category] = count.get(segment.category, 0) + 1
    size = round(font.size)
    row, gap = round(1.7 * size), round(0.5 * size)
    places, x, y = [], gap, gap
    for category in sorted(area, key=lambda category: (-area[category], category)):
        text = names[category] + (f" × {count[category]}" if count[category] > 1 else "")
        width = round(size + gap + font.getlength(text))
        if x > gap and x + width + gap > picture.width:
            x, y = gap, y + row
        places.append((x, y, category, text))
        x += width + 3 * gap
    strip = Image.new("RGB", (picture.width, picture.height + y + row), _WHITE)
    strip.paste(picture)
    draw = ImageDraw.Draw(strip)
    for x, y, category, text in places:
        y += picture.height
        draw.rectangle((x, y, x + size, y + size), tuple(colours[category]), _INK)
        draw.text((x + size + gap, y + size / 2), text, _INK, font, "lm")
    return strip
