"""Shapes: a synthetic panoptic set, made when asked for or written in COCO's format, in the same pixels."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crbp._checks import choice, count
from crbp.data._extras import require
from crbp.data.panoptic._looks import ACROSS, ALIKE, Looks
from crbp.data.panoptic.categories import Categories
from crbp.data.panoptic.dataset import PanopticDataset, Scene
from crbp.data.panoptic.transforms import Transform

require("numba")

from crbp.data.panoptic import _layout  # noqa: E402

Split = Literal["train", "val"]
SIZES = (128, 512)
ZOOMS = (1.0, 2.0)
MOST = 64  # objects of an image; more find no place

CATEGORIES = Categories(
    {"id": id, "name": name, "isthing": int(id <= len(_layout.THINGS))}
    for id, name in enumerate((*_layout.THINGS, *_layout.STUFF), start=1)
)
_NUMBERS = {category.name: category.id for category in CATEGORIES.entries}


class Shapes(PanopticDataset):
    """Textured shapes that overlap, on regions of texture: ``(image, target)`` as `CocoPanoptic` gives them.

    Ten classes of things are told by their shape: disc, square, triangle, star, cross, crescent, ring, bar, snake and
    spiral. Six of stuff are told by their texture: plain, stripes, checks, dots, blotches and waves. Things have those
    textures too, drawn independent of class, and some the colours of the ground, so that local looks tell neither
    class nor border. Things overlap neighbours that look the same; long ones pass under others that cut them in two;
    thin lines that are no thing lie over all. At least 40 % of every thing is visible. One image in ten has a crowd.

    Things that look ``"plain"`` have one colour each, which makes their shapes easier to see; they still overlap others
    of the same colour. ``"coloured"`` ones have besides, as much in the world does, a colour by which their class is
    told, and overlap others of their class. With ``zoom`` a picture shows less of the same world, in which all is as
    many times as large. The more things are ``alike``, the more come in heaps of one look, where the surroundings of a
    pixel do not tell which thing it belongs to.

    Image i is a function of ``(size, objects, looks, zoom, alike, seed, split, i)`` alone, and what `write_shapes`
    writes.

    Args:
        size: height and width in pixels, 128 to 512; the picture is the same in kind, with more pixels.
        split: ``"train"`` or ``"val"``, which share no image.
        images: number of images.
        objects: least and most things of an image; one that finds no place where enough of all can be seen is left out.
        looks: of things, ``"textured"``, ``"plain"`` or ``"coloured"``.
        zoom: how many times as large everything is, 1 to 2.
        alike: share of the things proposed that are laid over one that looks the same, 0 to 0.75; where no long one is
            there to lay another across, which a quarter of them is for, those are laid so as well.
        seed: another seed gives other images.
        transform: chooses size and flip of each image; None keeps every image as it is.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        size: int = 192,
        *,
        split: Split = "train",
        images: int = 10_000,
        objects: tuple[int, int] = (6, 14),
        looks: Looks = "textured",
        zoom: float = 1.0,
        alike: float = ALIKE,
        seed: int = 0,
        transform: Transform | None = None,
    ) -> None:
        _check(size, objects, looks, zoom, alike, seed)
        choice("split", split, get_args(Split))
        count("images", images)
        super().__init__(CATEGORIES, transform)
        self.size, self.split, self.objects, self.seed = size, split, (objects[0], objects[1]), seed
        self.looks, self.zoom, self.alike = looks, float(zoom), float(alike)
        self._images = images

    def __len__(self) -> int:
        return self._images

    def scene(self, index: int) -> Scene:
        """The image at a place with its segments; its number is the place + 1."""
        index = self.resolve(index)
        drawn = _layout.draw(
            self.size,
            self.objects,
            looks=self.looks,
            zoom=self.zoom,
            alike=self.alike,
            seed=self.seed,
            split=self.split,
            index=index,
        )
        numbers = np.array([_NUMBERS[name] for name in drawn.names], np.int32)
        crowd = np.array(drawn.crowd, np.bool_)
        return Scene(index + 1, Image.fromarray(drawn.image), drawn.places, segment_ids(numbers), numbers, crowd)

    def __repr__(self) -> str:
        return f"Shapes({self.size} px, split={self.split!r}, images={len(self)}, seed={self.seed})"


def _check(size: int, objects: tuple[int, int], looks: Looks, zoom: float, alike: float, seed: int) -> None:
    """Raise ValueError unless images with these settings can be made."""
    if isinstance(size, bool) or not isinstance(size, int) or not SIZES[0] <= size <= SIZES[1]:
        raise ValueError(f"size must be a whole number of {SIZES[0]} to {SIZES[1]} pixels, not {size!r}")
    if len(objects) != 2 or not 1 <= objects[0] <= objects[1] <= MOST:
        raise ValueError(f"objects must be the least and the most things of an image, 1 to {MOST}, not {objects!r}")
    choice("looks", looks, get_args(Looks))
    if isinstance(zoom, bool) or not isinstance(zoom, int | float) or not ZOOMS[0] <= zoom <= ZOOMS[1]:
        raise ValueError(f"zoom must be a number of {ZOOMS[0]:g} to {ZOOMS[1]:g}, not {zoom!r}")
    if isinstance(alike, bool) or not isinstance(alike, int | float) or not 0.0 <= alike <= 1.0 - ACROSS:
        raise ValueError(f"alike must be a share of 0 to {1.0 - ACROSS:g}, not {alike!r}")
    count("seed", seed, at_least=0)


def segment_ids(category_ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """A number for each segment of an image, ``(n,)``: its colour in the PNG, near that of its category, none twice."""
    found = []
    for k, category in enumerate(category_ids.tolist()):
        # Of 7³ shades of a thing, more than an image has places, those of neighbours in the list are far apart.
        step = 100 * k % 343 if CATEGORIES.isthing(category) else 0
        shade = [min(value, 231) - 24 for value in CATEGORIES.colour(category)]
        shade = [value + 8 * (step // 7**place % 7) for place, value in enumerate(shade)]
        found.append(shade[0] | shade[1] << 8 | shade[2] << 16)
    return np.array(found, np.int32)
