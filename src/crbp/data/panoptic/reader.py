"""COCO panoptic from its official files: images, a JSON and a folder of PNGs."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crbp.data.errors import DataError
from crbp.data.panoptic.categories import Categories
from crbp.data.panoptic.dataset import PanopticDataset, Scene
from crbp.data.panoptic.formats import check_size, read_ids, read_image
from crbp.data.panoptic.records import Record, Records, find_categories, instance_image_ids, load, missing, problems
from crbp.data.panoptic.transforms import Transform

_CHECK = "run crbp data check, which lists all that is wrong"


class CocoPanoptic(PanopticDataset):
    """COCO panoptic 2017, or any set in its format, from the official files alone.

    ``CocoPanoptic("val2017", "annotations/panoptic_val2017.json")[0]`` is ``(image, target)``: image uint8
    ``(3, H, W)`` RGB and a `Target`. Instances, boxes, masks and semantic labels are derived from the PNG when an item
    is asked for. The JSON is read and checked here, once, and the files it names are looked for; they
    are opened when they are asked for. The order
    is that of the JSON's annotations; an image without annotation is no item.

    Args:
        images: folder of the images.
        panoptic: the panoptic JSON.
        labels: folder of its PNGs; beside the JSON, of the same name without ``.json``, by default.
        instances: COCO's `instances_*.json`, where there is one. It then decides which images `filter_empty` keeps.
        categories: a `Categories`, or a JSON of them; those of the panoptic JSON by default.
        transform: chooses size and flip of each image, such as `Augment`; None keeps every image as it is.
        filter_empty: leave out the images without an instance, crowds not counted, as detectron2 does for training.

    Attributes:
        dropped: number of images that `filter_empty` left out.

    Raises:
        DataError: a file is missing or wrong: raised here for the JSON, and for an image or PNG when it is asked for;
            names file and id.

    Source: Kirillov et al., Panoptic Segmentation, CVPR 2019.
    """

    def __init__(
        self,
        images: str | Path,
        panoptic: str | Path,
        *,
        labels: str | Path | None = None,
        instances: str | Path | None = None,
        categories: Categories | str | Path | None = None,
        transform: Transform | None = None,
        filter_empty: bool = False,
    ) -> None:
        self.images, self.json = Path(images), Path(panoptic)
        self.labels = labels_folder(panoptic) if labels is None else Path(labels)
        self.instances = None if instances is None else Path(instances)
        for folder in (self.images, self.labels):
            if not folder.is_dir():
                raise DataError(folder, "there is no such folder", "give the folders of the images and of the PNGs")
        content = load(self.json)
        super().__init__(find_categories(self.json, content, categories), transform)
        found = list(islice(problems(self.json, content, self.categories), 1))
        if found:
            raise DataError(found[0].where, f"{found[0].id}: {found[0].what}", _CHECK)
        self._records = Records(content)
        self._check_files()
        self._kept = self._choose(filter_empty)
        self.dropped = len(self._records) - len(self._kept)
        if not len(self._kept):
            raise DataError(
                self.json,
                f"no image of {len(self._records)} has things, crowds not counted",
                "filter_empty=False (--data.source.filter_empty false) keeps all",
            )

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """The numbers of the images in the data set, ``(n,)``."""
        return self._records.image_ids[self._kept]

    def name(self, index: int) -> str:
        """File name of the image at a place."""
        return self._record(index).image

    def scene(self, index: int) -> Scene:
        """The image at a place with its segments, before it is resized.

        Raises:
            DataError: image or PNG is missing, broken, or not what the JSON says; names file and id.
        """
        record = self._record(index)
        path = self.labels / record.labels
        told = record.image_id, record.height, record.width
        ids = read_ids(path, told=told)
        places = find_places(path, ids, record.ids)
        image = read_image(self.images / record.image)
        check_size(self.images / record.image, "image", (image.height, image.width), told)
        return Scene(record.image_id, image, places, record.ids, record.category_ids, record.crowd)

    def __repr__(self) -> str:
        return f"CocoPanoptic({str(self.json)!r}, {len(self)} images, {len(self.categories)} categories)"

    def _record(self, index: int) -> Record:
        found: Record = self._records[int(self._kept[self.resolve(index)])]
        return found

    def _check_files(self) -> None:
        for folder, names in ((self.images, self._records.images), (self.labels, self._records.labels)):
            absent = missing(folder, names)
            if absent:
                image = f"of image {self._records.image_ids[absent[0]]}"
                count = f", the first of {len(absent)} of {len(names)}" if len(absent) > 1 else ""
                raise DataError(folder / names[absent[0]], f"the file {image} is missing{count}", _CHECK)

    def _choose(self, filter_empty: bool) -> NDArray[np.int64]:
        if not filter_empty:
            return np.arange(len(self._records))
        if self.instances is None:
            return np.flatnonzero(self._records.has_instance(self.categories))
        return np.flatnonzero(np.isin(self._records.image_ids, instance_image_ids(self.instances)))


def labels_folder(panoptic: str | Path) -> Path:
    """The folder in which the official sets have the PNGs of a panoptic JSON."""
    return Path(panoptic).with_suffix("")


def find_places(path: str | Path, ids: NDArray[np.int32], known: NDArray[np.int32]) -> NDArray[Any]:
    """The `places` of a PNG whose numbers are those that the JSON names, one for one.

    Raises:
        DataError: a pixel has a number that is not known, or a known number has no pixel; names file and number.
    """
    places, strangers = locate(ids, known)
    if strangers.any():
        raise DataError(path, f"the PNG has the segment {ids[strangers][0]}, which the JSON does not name", _CHECK)
    empty = np.flatnonzero(np.bincount(places.ravel(), minlength=len(known) + 1)[1:] == 0)
    if len(empty):
        raise DataError(path, f"no pixel has the segment {known[empty[0]]} that the JSON names", _CHECK)
    return places


def locate(ids: NDArray[np.int32], known: NDArray[np.int32]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Of every pixel's number ``(H, W)`` its place in `known` (n,), counted from 1, and whether it is not there.

    The place of void, and of a number that is not there, is 0.
    """
    # Void is a number like the others here: one table for all, searched in order.
    numbers = np.concatenate([np.zeros(1, np.int32), known])
    order = np.argsort(numbers)
    at = np.minimum(np.searchsorted(numbers, ids, sorter=order), len(numbers) - 1)
    places: NDArray[Any] = order.astype(np.uint8 if len(numbers) <= 256 else np.int32)[at]
    strangers = numbers[places] != ids
    places[strangers] = 0
    return places, strangers
