"""The panoptic JSON: what can be wrong with it, and its content as a few arrays.

Arrays, because half a gigabyte of small Python objects is copied page by page into every worker process as soon as
their reference counts are touched; an array stays shared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crbp.data._foreign import leads_out, read_json, shown
from crbp.data.errors import DataError
from crbp.data.panoptic.categories import Categories

_ABSENT = -1.0  # an area, or the coordinates of a box, that the JSON does not give


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: the file, the image or segment in it, and what."""

    where: str
    id: str
    what: str

    def __str__(self) -> str:
        told = f"{self.where}: {self.id}: {self.what}" if self.id else f"{self.where}: {self.what}"
        return told.encode(errors="backslashreplace").decode()  # a broken name may be no text to print


class Record(NamedTuple):
    """One image: its number, size and file, the file of its labels, and its segments, one a row of each array."""

    image_id: int
    height: int
    width: int
    image: str
    labels: str
    ids: NDArray[np.int32]
    category_ids: NDArray[np.int32]
    crowd: NDArray[np.bool_]
    areas: NDArray[np.float64]  # −1 where the JSON gives none
    boxes: NDArray[np.float64]  # x, y, width, height; −1 where the JSON gives none


class Records(Sequence[Record]):
    """The annotated images of a panoptic JSON, in the order of its annotations, held as arrays."""

    def __init__(self, content: dict[str, Any]) -> None:
        images = {image["id"]: image for image in content["images"]}
        annotations = content["annotations"]
        pairs = [(images[each["image_id"]], each) for each in annotations]
        self._image_ids = np.array([image["id"] for image, _ in pairs], np.int64)
        self._sizes = np.array([(image["height"], image["width"]) for image, _ in pairs], np.int32).reshape(-1, 2)
        self._images = _Names(image["file_name"] for image, _ in pairs)
        self._labels = _Names(each["file_name"] for _, each in pairs)
        segments = [segment for each in annotations for segment in each["segments_info"]]
        self._starts = np.cumsum([0, *(len(each["segments_info"]) for each in annotations)])
        self._ids = np.array([each["id"] for each in segments], np.int32)
        self._categories = np.array([each["category_id"] for each in segments], np.int32)
        self._crowd = np.array([bool(each.get("iscrowd", 0)) for each in segments], np.bool_)
        self._areas = np.array([each.get("area", _ABSENT) for each in segments], np.float64)
        boxes = [each.get("bbox", (_ABSENT,) * 4) for each in segments]
        self._boxes = np.array(boxes, np.float64).reshape(-1, 4)

    def __len__(self) -> int:
        return len(self._image_ids)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int):
            raise TypeError(f"records are asked for one by one, not by {index!r}")
        rows = slice(self._starts[index], self._starts[index + 1])
        return Record(
            int(self._image_ids[index]),
            int(self._sizes[index, 0]),
            int(self._sizes[index, 1]),
            self._images[index],
            self._labels[index],
            self._ids[rows],
            self._categories[rows],
            self._crowd[rows],
            self._areas[rows],
            self._boxes[rows],
        )

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """The numbers of the images, ``(n,)``."""
        return self._image_ids

    @property
    def images(self) -> Sequence[str]:
        """File names of the images."""
        return self._images

    @property
    def labels(self) -> Sequence[str]:
        """File names of the PNGs."""
        return self._labels

    @property
    def sizes(self) -> NDArray[np.int32]:
        """Height and width of the images, ``(n, 2)``."""
        return self._sizes

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of segments of each image, ``(n,)``."""
        return np.diff(self._starts)

    @property
    def segments(self) -> tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.float64]]:
        """Category, whether it is a crowd, and area (−1 where there is none) of all segments of all images."""
        return self._categories, self._crowd, self._areas

    def has_instance(self, categories: Categories) -> NDArray[np.bool_]:
        """Of each image, ``(n,)``, whether it has a thing that is no crowd."""
        counted = np.isin(self._categories, categories.things) & ~self._crowd
        found: NDArray[np.bool_] = np.diff(np.concatenate([[0], np.cumsum(counted)])[self._starts]) > 0
        return found


class _Names(Sequence[str]):
    """Many file names as one string of bytes."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode() for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        return self._bytes[self._ends[index] : self._ends[index + 1]].tobytes().decode()


def load(path: str | Path) -> dict[str, Any]:
    """The content of a panoptic JSON, so far that it is a dict with lists of images and annotations.

    Raises:
        DataError: the file cannot be read or has another structure; names it.
    """
    content = read_json(path, "fetch it again, or give another file")
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(path, f"has no list {key!r}", "give a panoptic JSON such as panoptic_val2017.json")
    return content  # type: ignore[no-any-return]


def find_categories(
    path: str | Path, content: dict[str, Any], given: Categories | str | Path | None = None
) -> Categories:
    """The categories that were given, as such or as a file, or those of the panoptic JSON itself.

    Raises:
        DataError: there are none, or they are wrong; names the file.
    """
    if isinstance(given, Categories):
        return given
    if given is not None:
        return Categories.read(given)
    if "categories" not in content:
        raise DataError(path, "has no 'categories'", "give a JSON list of them as categories")
    try:
        return Categories(content["categories"])
    except (TypeError, ValueError) as error:
        raise DataError(path, str(error), "correct 'categories', or give a JSON list of them") from error


def problems(path: str | Path, content: dict[str, Any], categories: Categories) -> Iterator[Finding]:
    """All that is wrong with the content of a panoptic JSON by itself, without looking at any other file."""
    where = str(path)
    images: set[Any] = set()
    for image in content["images"]:
        yield from _image_problems(where, image, images)
    if not content["annotations"]:
        yield Finding(where, "annotations", "the list is empty: no image has an annotation")
    seen: set[Any] = set()
    for each in content["annotations"]:
        wrong = lacking(each, image_id=int, file_name=str, segments_info=list)
        if wrong:
            yield Finding(where, _tell("annotation of image", each, "image_id"), wrong)
            continue
        name = f"image {each['image_id']} ({each['file_name']})"
        if each["image_id"] not in images:
            yield Finding(where, name, "has an annotation but is not in the list of images")
        if each["image_id"] in seen:
            yield Finding(where, name, "has more than one annotation")
        seen.add(each["image_id"])
        yield from _segment_problems(where, name, each["segments_info"], categories)


def sound(content: dict[str, Any]) -> dict[str, Any]:
    """The part of a panoptic JSON that `Records` can hold, of one that has `problems`."""
    images = {each["id"]: each for each in content["images"] if not any(_image_problems("", each, set()))}
    kept: dict[int, dict[str, Any]] = {}
    for each in content["annotations"]:
        if not lacking(each, image_id=int, file_name=str, segments_info=list) and each["image_id"] in images:
            segments: dict[int, dict[str, Any]] = {}
            for segment in each["segments_info"]:
                if not lacking(segment, id=int, category_id=int) and 0 < segment["id"] < 1 << 24:
                    wrong = any(_measure_problems("", "", segment))
                    measured = {} if wrong else {key: segment[key] for key in ("area", "bbox") if key in segment}
                    plain = {key: segment[key] for key in ("id", "category_id", "iscrowd") if key in segment}
                    segments.setdefault(segment["id"], {**plain, **measured})
            kept.setdefault(each["image_id"], {**each, "segments_info": list(segments.values())})
    return {**content, "images": list(images.values()), "annotations": list(kept.values())}


def missing(folder: Path, names: Sequence[str]) -> list[int]:
    """The places of the names of files that are not in a folder, by one listing of each folder they are in."""
    listed: dict[Path, set[str]] = {}
    found = []
    for place in range(len(names)):
        path = folder / names[place]
        if path.parent not in listed:
            try:
                listed[path.parent] = {each.name for each in path.parent.iterdir()}
            except OSError:
                listed[path.parent] = set()
        if path.name not in listed[path.parent]:
            found.append(place)
    return found


def instance_image_ids(path: str | Path) -> NDArray[np.int64]:
    """The images that have an annotation which is no crowd, from a COCO `instances_*.json`; sorted.

    Raises:
        DataError: the file cannot be read or has another structure; names it.
    """
    content = load(path)
    try:
        kept = {each["image_id"] for each in content["annotations"] if not each.get("iscrowd", 0)}
        return np.array(sorted(kept), np.int64)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            path, f"an annotation has no usable 'image_id' ({error!r})", "give an instances JSON such as COCO's"
        ) from error


def _image_problems(where: str, image: Any, seen: set[Any]) -> Iterator[Finding]:
    wrong = lacking(image, id=int, file_name=str, height=int, width=int)
    if wrong:
        yield Finding(where, _tell("image", image, "id"), wrong)
    elif image["id"] in seen:
        yield Finding(where, f"image {image['id']} ({image['file_name']})", "is twice in the list of images")
    elif image["height"] < 1 or image["width"] < 1:
        yield Finding(where, f"image {image['id']}", f"has height {image['height']} and width {image['width']}")
    if not wrong:
        seen.add(image["id"])


def _segment_problems(where: str, name: str, segments: list[Any], categories: Categories) -> Iterator[Finding]:
    seen: set[int] = set()
    for segment in segments:
        wrong = lacking(segment, id=int, category_id=int)
        if wrong:
            yield Finding(where, f"{name}, {_tell('segment', segment, 'id')}", wrong)
            continue
        this = f"{name}, segment {segment['id']}"
        if not 0 < segment["id"] < 1 << 24:
            yield Finding(where, this, "its id is not in 1 … 2**24 - 1, which three bytes of a PNG can hold")
        if segment["id"] in seen:
            yield Finding(where, this, "the id occurs twice in this image")
        seen.add(segment["id"])
        if segment["category_id"] not in categories:
            yield Finding(where, this, f"its category {segment['category_id']} is not in the list of categories")
        elif segment.get("iscrowd", 0) not in (0, 1):
            yield Finding(where, this, f"iscrowd is {shown(segment['iscrowd'])}, not 0 or 1")
        elif segment.get("iscrowd", 0) and not categories.isthing(segment["category_id"]):
            yield Finding(where, this, f"is a crowd of {categories.name(segment['category_id'])}, which is stuff")
        yield from _measure_problems(where, this, segment)


def _measure_problems(where: str, this: str, segment: dict[str, Any]) -> Iterator[Finding]:
    area, box = segment.get("area", 1), segment.get("bbox", (0, 0, 1, 1))
    if not _number(area):
        yield Finding(where, this, f"its area is {shown(area)}, not a number")
    elif area <= 0:
        yield Finding(where, this, f"its area is {area}")
    if not (isinstance(box, list | tuple) and len(box) == 4 and all(map(_number, box))):
        yield Finding(where, this, f"its bbox is {shown(box)}, not [x, y, width, height]")


def lacking(entry: Any, **kinds: type) -> str:
    """What is missing, of another type or out of range in an entry, in words; nothing where all is well."""
    if not isinstance(entry, dict):
        return f"is {type(entry).__name__} {shown(entry)}, not a dict"
    for key, kind in kinds.items():
        if key not in entry:
            return f"lacks {key!r}"
        value = entry[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"has {key} {shown(value)}, not of type {kind.__name__}"
        if isinstance(value, str) and key == "file_name" and leads_out(value):
            return f"has file_name {shown(value)}, which leads out of the folder"
        bits = 63 if key in ("id", "image_id") else 31
        if isinstance(value, int) and not -(1 << bits) <= value < 1 << bits:
            return f"has {key} {shown(value)}, which {bits + 1} bits cannot hold"
    return ""


def _tell(what: str, entry: Any, key: str) -> str:
    return (
        f"{what} {shown(entry[key])}"
        if isinstance(entry, dict) and key in entry
        else f"an {what}".replace("an s", "a s")
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1 << 63
