"""Panoptic predictions as files of the official form, and from such files to panoptic quality."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from crbp.data._files import write_atomic
from crbp.data._foreign import leads_out, read_json, shown
from crbp.data.errors import DataError
from crbp.data.panoptic.formats import png, read_ids, read_size, rgb_from_ids
from crbp.data.panoptic.records import lacking
from crbp.metrics.panoptic import ClassCounts, count_segments, quality, thing_flags

_Json = dict[str, Any]


class PanopticWriter:
    """Write predictions as the official tool and the COCO server take them: a folder of PNG files and a JSON file.

    Each image is written when it comes; the JSON, which says that the set is whole, when the ``with`` block ends
    without an error. A file is whole or not there. What an earlier run left in the folder stays unless it has the same
    name. A process of a distributed run needs a JSON of its own.

    Args:
        json_file: where the JSON goes.
        folder: where the PNG files go; by default the name of the JSON without its ending, as the official tool has it.

    Source: the format of https://cocodataset.org/#format-results, panoptic segmentation.
    """

    def __init__(self, json_file: str | Path, *, folder: str | Path | None = None) -> None:
        self.json_file = Path(json_file)
        self.folder = _beside(self.json_file, folder)
        self._annotations: dict[int | str, _Json] = {}
        self._names: set[str] = set()

    def __enter__(self) -> PanopticWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.json_file.unlink(missing_ok=True)  # of an earlier run, whose PNG files are about to be replaced
        return self

    def write(
        self,
        image_id: int | str,
        panoptic_map: Tensor | NDArray[Any],
        segments: Sequence[Mapping[str, Any]],
        *,
        file_name: str | None = None,
    ) -> None:
        """Write one image.

        Args:
            image_id: as the ground truth has it.
            panoptic_map: ``(H, W)`` of integers below 2²⁴, the id of the segment of each pixel; 0 is void.
            segments: mappings with ``id``, ``category_id`` and, where known, ``score``; other keys are not written.
            file_name: of the PNG within the folder; by default the image's id, in 12 digits where it is a number.

        Raises:
            ValueError: the image or its file was written before, an id does not fit a PNG, or the segments are not
                those of the map.
        """
        image_id = image_id if isinstance(image_id, str) else operator.index(image_id)  # NumPy's are not for JSON
        if file_name is None:
            file_name = f"{image_id:012d}.png" if isinstance(image_id, int) else f"{image_id}.png"
        if image_id in self._annotations or file_name in self._names:
            raise ValueError(f"image {image_id} or its file {file_name} was written before; write each image once")
        ids = panoptic_map.cpu().numpy() if isinstance(panoptic_map, Tensor) else panoptic_map
        if leads_out(file_name):
            raise ValueError(f"the file name {file_name!r} of image {image_id} leads out of the folder; give another")
        in_map, named = set(np.unique(ids).tolist()) - {0}, [int(segment["id"]) for segment in segments]
        if in_map != set(named) or len(named) != len(in_map):
            raise ValueError(
                f"image {image_id}: the map has the segments {sorted(in_map)} and the list {sorted(named)}; "
                "name each segment that has pixels once"
            )
        write_atomic(self.folder / file_name, png(rgb_from_ids(ids)))
        self._names.add(file_name)
        self._annotations[image_id] = {
            "image_id": image_id,
            "file_name": file_name,
            "segments_info": [_entry(segment) for segment in segments],
        }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            write_atomic(self.json_file, json.dumps({"annotations": list(self._annotations.values())}).encode())


def evaluate_panoptic_files(
    gt_json: str | Path,
    gt_folder: str | Path | None,
    pred_json: str | Path,
    pred_folder: str | Path | None,
    *,
    workers: int | None = None,
) -> _Json:
    """Panoptic quality of predictions in files, of any program that writes the official form.

    Areas are counted from the PNG files. For true segments the official tool takes the ``area`` of the JSON instead;
    one that differs from the PNG is an error here.

    Args:
        gt_json: the ground truth, with ``annotations`` and ``categories``. Each of its images must be predicted;
            predictions of other images are left alone, as the official tool does.
        gt_folder: its PNG files; with None the JSON's name without its ending.
        pred_json: the predictions, with ``annotations``.
        pred_folder: like ``gt_folder``.
        workers: threads that read images; one for each core by default.

    Returns:
        What `crbp.metrics.PanopticQuality.compute` returns.

    Raises:
        DataError: a file is missing, broken or not what it should be, an image has no prediction, a true segment has
            another area in the JSON than in the PNG, or a prediction breaks a rule of
            `crbp.metrics.PanopticQuality.update`; names the file and the id.
    """
    truth, found = _load(Path(gt_json), "categories", "annotations"), _load(Path(pred_json), "annotations")
    try:
        things = thing_flags(truth["categories"])
    except ValueError as error:
        raise DataError(gt_json, str(error), "correct the categories") from error
    predictions = _by_image(Path(pred_json), found["annotations"])
    pairs = []
    for number, annotation in _by_image(Path(gt_json), truth["annotations"]).items():
        if number not in predictions:
            raise DataError(pred_json, f"there is no prediction for image {number}", "predict every image")
        pairs.append((annotation, predictions[number]))
    folders = _beside(Path(gt_json), gt_folder), _beside(Path(pred_json), pred_folder)

    total = [np.zeros(len(things)) for _ in ClassCounts._fields]
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:  # reading PNG files leaves Python to others
        for counts in pool.map(partial(_count, things, folders), pairs):
            total = [sum_ + value for sum_, value in zip(total, counts, strict=True)]
    return quality(things, ClassCounts(total[0], *(value.astype(np.int64) for value in total[1:])))


def _count(things: Mapping[int, bool], folders: tuple[Path, Path], pair: tuple[_Json, _Json]) -> ClassCounts:
    """What one image adds: `pair` is its annotation in the truth and in the predictions, `folders` hold their PNGs."""
    target, prediction = (folder / each["file_name"] for folder, each in zip(folders, pair, strict=True))
    target_map = read_ids(target)
    try:
        if (size := read_size(prediction)) != target_map.shape:  # one of any size is not to be decoded first
            raise ValueError(
                f"the prediction is of {size} pixels, the target of {target_map.shape}; predict at its size"
            )
        segments, target_segments = pair[1]["segments_info"], pair[0]["segments_info"]
        counts = count_segments(things, read_ids(prediction), segments, target_map, target_segments)
        _check_areas(target_map, target_segments)
        return counts
    except DataError:
        raise
    except ValueError as error:
        where = f"{prediction} against {target}"
        raise DataError(where, f"image {pair[0]['image_id']}: {error}", "correct the files and their JSON") from error


def _check_areas(ids: NDArray[np.int32], segments: Sequence[Mapping[str, Any]]) -> None:
    """Raise unless the areas that the JSON gives are those of the PNG, all of whose segments it names."""
    counted = dict(zip(*(each.tolist() for each in np.unique(ids, return_counts=True)), strict=True))
    for segment in segments:
        area = counted[segment["id"]]
        if segment.get("area") not in (None, area):
            raise ValueError(
                f"segment {segment['id']} of the target has the area {shown(segment['area'])} in the JSON, which the "
                f"official tool takes, and {area} in the PNG"
            )


def _beside(json_file: Path, folder: str | Path | None) -> Path:
    return json_file.with_suffix("") if folder is None else Path(folder)


def _entry(segment: Mapping[str, Any]) -> _Json:
    entry: _Json = {"id": int(segment["id"]), "category_id": int(segment["category_id"])}
    return entry | ({"score": float(segment["score"])} if "score" in segment else {})


def _load(path: Path, *keys: str) -> _Json:
    content = read_json(path, "give a panoptic JSON of COCO's form")
    content = content if isinstance(content, dict) else {}
    if missing := [key for key in keys if not isinstance(content.get(key), list)]:
        raise DataError(path, f"has no list of {' or '.join(missing)}", "give a panoptic JSON of COCO's form")
    return content


def _by_image(path: Path, annotations: Sequence[Mapping[str, Any]]) -> dict[int | str, _Json]:
    found: dict[int | str, _Json] = {}
    for place, annotation in enumerate(annotations):
        kind = str if isinstance(annotation, dict) and isinstance(annotation.get("image_id"), str) else int
        if wrong := lacking(annotation, image_id=kind, file_name=str, segments_info=list):
            raise DataError(path, f"annotation {place} {wrong}", "correct it")
        if annotation["image_id"] in found:
            raise DataError(path, f"image {annotation['image_id']} is annotated twice", "keep one of the two")
        found[annotation["image_id"]] = dict(annotation)
    return found
