"""Everything that is wrong with a panoptic set, found before training starts, and its statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crbp._checks import count
from crbp.data._foreign import open_image
from crbp.data._parallel import bar, cores, run
from crbp.data.errors import DataError
from crbp.data.panoptic.categories import Categories
from crbp.data.panoptic.dataset import measure
from crbp.data.panoptic.formats import check_depth, read_ids
from crbp.data.panoptic.reader import labels_folder, locate
from crbp.data.panoptic.records import (
    Finding,
    Record,
    Records,
    find_categories,
    instance_image_ids,
    load,
    missing,
    problems,
    sound,
)

_CHUNK = 64  # images a task of a worker process
_ORIENTATION = 0x0112  # of EXIF


@dataclass(frozen=True)
class Statistics:
    """What a set holds. The arrays ``(categories,)`` are in the order of its list of categories.

    Attributes:
        images: number of images with an annotation.
        unlabelled: number of images that the JSON lists without one.
        sizes: height and width of each image, ``(images, 2)``.
        segments: number of segments of each image, ``(images,)``.
        counts: segments of each category, crowds included.
        crowds: crowds of each category.
        pixels: pixels of each category, from the PNGs or, in the quick form, from the areas in the JSON.
    """

    images: int
    unlabelled: int
    sizes: NDArray[np.int32]
    segments: NDArray[np.int64]
    counts: NDArray[np.int64]
    crowds: NDArray[np.int64]
    pixels: NDArray[np.int64]

    @property
    def shares(self) -> NDArray[np.float64]:
        """Share of all pixels, void included, that each category has."""
        total = int(self.sizes.astype(np.int64).prod(axis=1).sum())
        return self.pixels / max(total, 1)


@dataclass(frozen=True)
class Report:
    """What a check found.

    Attributes:
        findings: what is wrong, up to the limit that was asked for.
        total: number of all findings.
        categories: of the set.
        statistics: of what could be read.
    """

    findings: tuple[Finding, ...]
    total: int
    categories: Categories
    statistics: Statistics

    def require(self) -> None:
        """Raise `DataError` with the first findings, unless there is none."""
        if self.total:
            first = self.findings[0]
            more = "".join(f"; {each}" for each in self.findings[1:3])
            rest = f"; {self.total} findings in all" if self.total > 3 else ""
            raise DataError(
                first.where, f"{first.id}: {first.what}{more}{rest}", "run crbp data check, which lists all of them"
            )


def check(
    images: str | Path,
    panoptic: str | Path,
    *,
    labels: str | Path | None = None,
    categories: Categories | str | Path | None = None,
    instances: str | Path | None = None,
    quick: bool = False,
    allow_empty: bool = False,
    limit: int = 100,
    workers: int | None = None,
    progress: bool = False,
) -> Report:
    """Look for everything that is wrong with a panoptic set.

    Of the JSON: missing keys, numbers or files of images and numbers of segments that occur twice, categories not in
    the list, areas of 0, images without a segment, no annotation at all. Of the files: a missing image or PNG and,
    unless `quick`, one that cannot be read or has another size than the JSON says, an image of more than 8 bits a
    channel, segments that only the PNG or only the JSON has, and an area or box that is not that of the pixels.

    Args:
        images: folder of the images.
        panoptic: the panoptic JSON.
        labels: folder of its PNGs; beside the JSON, of the same name without ``.json``, by default.
        categories: a `Categories`, or a JSON of them; those of the panoptic JSON by default.
        instances: COCO's `instances_*.json`, where training is to be given one; it must be readable and may name only
            images that the panoptic JSON lists.
        quick: only the JSON and whether the files are there.
        allow_empty: an image without a segment is no finding.
        limit: number of findings to keep; all are counted.
        workers: processes, started afresh; the cores at hand by default; 1 works in this process.
        progress: whether to show a bar on standard error.

    Raises:
        DataError: the JSON cannot be read or has no list of images or of annotations, or there are no categories.
        ValueError: `limit` or `workers` is below 1.
    """
    count("limit", limit)
    if workers is not None:
        count("workers", workers)
    content = load(panoptic)
    known = find_categories(panoptic, content, categories)
    folders = Path(images), labels_folder(panoptic) if labels is None else Path(labels)
    collected = _Collected(limit)
    collected.add(problems(panoptic, content, known))
    if instances is not None:
        collected.add(_strange_images(instances, content["images"]))
    listed = len(content["images"])
    content = sound(content)
    collected.add(_shared_files(panoptic, content["images"]))
    records = Records(content)
    del content
    if not allow_empty:
        collected.add(_empty(panoptic, records))
    absent = [
        set(missing(folder, names)) for folder, names in zip(folders, (records.images, records.labels), strict=True)
    ]
    for place in sorted(absent[0] | absent[1]):
        collected.add(_absent(records[place], folders, place in absent[0], place in absent[1]))
    pixels = np.zeros(len(known), np.int64)
    if quick:
        pixels += _listed_pixels(records, known)
    else:
        jobs = _jobs(records, folders, absent, known)
        with bar(progress, "checking images", len(records)) as advance:
            for done in run(_look_at, jobs, cores() if workers is None else workers):
                collected.add(iter(done.findings))
                pixels += done.pixels
                advance(done.images)
    return Report(tuple(collected.kept), collected.total, known, _statistics(records, listed, known, pixels))


class _Collected:
    """Findings up to a limit, and the number of all."""

    def __init__(self, limit: int) -> None:
        self.limit, self.total = limit, 0
        self.kept: list[Finding] = []

    def add(self, findings: Iterator[Finding]) -> None:
        for finding in findings:
            self.total += 1
            if self.total <= self.limit:
                self.kept.append(finding)


class _Job(NamedTuple):
    """Some images for a worker process, each with whether its image and its PNG are there."""

    images: Path
    labels: Path
    categories: Categories
    records: list[tuple[Record, bool, bool]]


class _Done(NamedTuple):
    images: int
    findings: list[Finding]
    pixels: NDArray[np.int64]


def _jobs(records: Records, folders: tuple[Path, Path], absent: list[set[int]], categories: Categories) -> list[_Job]:
    return [
        _Job(
            *folders,
            categories,
            [
                (records[place], place not in absent[0], place not in absent[1])
                for place in range(start, min(start + _CHUNK, len(records)))
            ],
        )
        for start in range(0, len(records), _CHUNK)
    ]


def _look_at(job: _Job) -> _Done:
    findings: list[Finding] = []
    pixels = np.zeros(len(job.categories), np.int64)
    for record, has_image, has_labels in job.records:
        if has_image:
            findings += _image_findings(job.images / record.image, record)
        if has_labels:
            found, areas = _label_findings(job.labels / record.labels, record)
            findings += found
            pixels += _by_category(record.category_ids, areas, job.categories)
    return _Done(len(job.records), findings, pixels)


def _image_findings(path: Path, record: Record) -> list[Finding]:
    name = f"image {record.image_id}"
    try:
        with open_image(path, "the image", "") as image:
            check_depth(path, image)
            width, height = image.size
            image.draft("RGB", (1, 1))  # reads all of a JPEG, but computes few of its pixels
            image.load()
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)  # by a quarter, as `read_image` turns it
    except DataError as error:
        return [Finding(str(path), name, error.what)]
    return _size_findings(path, record, (width, height) if turned else (height, width))


def _label_findings(path: Path, record: Record) -> tuple[list[Finding], NDArray[np.int64]]:
    """What is wrong with a PNG, and the pixels that it has of each segment."""
    name = f"image {record.image_id}"
    try:
        ids = read_ids(path)
    except DataError as error:
        return [Finding(str(path), name, error.what)], np.zeros(len(record.ids), np.int64)
    found = _size_findings(path, record, (ids.shape[0], ids.shape[1]))
    places, strangers = locate(ids, record.ids)
    for number, pixels in zip(*np.unique(ids[strangers], return_counts=True), strict=True):
        what = f"the PNG has {pixels} pixels of it, which the JSON does not name"
        found.append(Finding(str(path), f"{name}, segment {number}", what))
    boxes, areas = measure(places, len(record.ids))
    for k, number in enumerate(record.ids):
        this = f"{name}, segment {number}"
        if not areas[k]:
            found.append(Finding(str(path), this, "no pixel of the PNG has it, though the JSON names it"))
            continue
        if record.areas[k] >= 0 and record.areas[k] != areas[k]:
            found.append(Finding(str(path), this, f"the JSON's area is {record.areas[k]:g}, the PNG's {areas[k]}"))
        if record.boxes[k, 2] >= 0 and (record.boxes[k] != boxes[k]).any():
            told, seen = (", ".join(f"{value:g}" for value in box) for box in (record.boxes[k], boxes[k]))
            found.append(Finding(str(path), this, f"the JSON's bbox is [{told}], the PNG's [{seen}]"))
    return found, areas


def _size_findings(path: Path, record: Record, size: tuple[int, int]) -> list[Finding]:
    if size == (record.height, record.width):
        return []
    what = f"is {size[0]} x {size[1]} pixels (height x width), where the JSON says {record.height} x {record.width}"
    return [Finding(str(path), f"image {record.image_id}", what)]


def _shared_files(panoptic: str | Path, images: list[dict[str, Any]]) -> Iterator[Finding]:
    first: dict[str, int] = {}
    for image in images:
        number, file = image["id"], image["file_name"]
        if first.setdefault(file, number) != number:
            yield Finding(str(panoptic), f"image {number} ({file})", f"has the same file as image {first[file]}")


def _strange_images(instances: str | Path, images: list[dict[str, Any]]) -> Iterator[Finding]:
    try:
        known = instance_image_ids(instances)
    except DataError as error:
        yield Finding(str(error.where), "", error.what)
        return
    listed = {image.get("id") for image in images if isinstance(image, dict)}
    for number in [each for each in known.tolist() if each not in listed]:
        yield Finding(str(instances), f"image {number}", "has an annotation but is not in the panoptic JSON")


def _empty(panoptic: str | Path, records: Records) -> Iterator[Finding]:
    for record in records:
        if not len(record.ids):
            yield Finding(str(panoptic), f"image {record.image_id} ({record.labels})", "has no segment")


def _absent(record: Record, folders: tuple[Path, Path], image: bool, labels: bool) -> Iterator[Finding]:
    if image:
        yield Finding(str(folders[0] / record.image), f"image {record.image_id}", "the image is missing")
    if labels:
        yield Finding(str(folders[1] / record.labels), f"image {record.image_id}", "the panoptic PNG is missing")


def _by_category(ids: NDArray[np.int32], weights: NDArray[Any], categories: Categories) -> NDArray[np.int64]:
    """Sums of weights by the place of their category in the list."""
    sums = np.zeros(len(categories), np.int64)
    for place, category in enumerate(categories.entries):
        chosen = ids == category.id
        if chosen.any():
            sums[place] = int(weights[chosen].sum())
    return sums


def _listed_pixels(records: Records, categories: Categories) -> NDArray[np.int64]:
    ids, _, areas = records.segments
    return _by_category(ids, np.maximum(areas, 0), categories)


def _statistics(records: Records, listed: int, categories: Categories, pixels: NDArray[np.int64]) -> Statistics:
    ids, crowd, _ = records.segments
    return Statistics(
        images=len(records),
        unlabelled=max(0, listed - len(records)),
        sizes=records.sizes,
        segments=records.counts,
        counts=_by_category(ids, np.ones(len(ids), np.int64), categories),
        crowds=_by_category(ids, crowd, categories),
        pixels=pixels,
    )
