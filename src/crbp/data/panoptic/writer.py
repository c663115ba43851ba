"""Shapes on disk in COCO's format: written in parallel, resumed after a kill, listed by checksum."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from crbp._checks import count
from crbp.data._extras import require
from crbp.data._files import (
    Written,
    check_claim,
    load_manifest,
    save_manifest,
    sha256,
    write_atomic,
    write_checksums,
    write_missing,
)
from crbp.data.panoptic._layout import STREAM_VERSION
from crbp.data.panoptic._looks import ALIKE, Looks
from crbp.data.panoptic.dataset import instance_annotations, segments_info
from crbp.data.panoptic.formats import png, rgb_from_ids
from crbp.data.panoptic.shapes import CATEGORIES, Shapes, Split

require("rich")

_KEY = "shapes"  # the key of the manifest by which it is known


class _Job(NamedTuple):
    """Some images of one split to write."""

    out: Path
    shapes: Shapes
    batch: int
    start: int
    images: int


def write_shapes(
    out: str | Path,
    *,
    images: tuple[int, int] = (10_000, 1_000),
    size: int = 192,
    objects: tuple[int, int] = (6, 14),
    looks: Looks = "textured",
    zoom: float = 1.0,
    alike: float = ALIKE,
    seed: int = 0,
    batch_size: int = 100,
    workers: int | None = None,
    progress: bool = True,
) -> Written:
    """Write `Shapes` under `out` in COCO's panoptic format.

    Makes, for the splits ``train`` and ``val``, ``train/*.png``, ``panoptic_train.json``, ``panoptic_train/*.png`` and
    ``instances_train.json``, and for both ``categories.json``, ``checksums/*.sha256`` as ``sha256sum -c`` takes them,
    and ``manifest.json``. The JSON files are put together from those of the batches in ``parts/``.

    Batches found whole are verified and kept, so a call that was killed is simply repeated. The call starts `workers`
    processes afresh ("spawn"): in a script, keep it under ``if __name__ == "__main__":``.

    Args:
        out: the folder.
        images: number of images of train and of val.
        size: height and width in pixels, 128 to 512.
        objects: least and most things of an image; see `Shapes`.
        looks: of things; see `Shapes`.
        zoom: how many times as large everything is, 1 to 2.
        alike: share of things laid over one that looks the same, 0 to 0.75; see `Shapes`.
        seed: of the set.
        batch_size: images a checksum file.
        workers: processes; the cores at hand by default; 1 works in this process.
        progress: whether to show a bar on standard error.

    Raises:
        ValueError: an argument is out of range.
        DataError: `out` holds another data set.
    """
    sets = [
        Shapes(size, split=split, images=total, objects=objects, looks=looks, zoom=zoom, alike=alike, seed=seed)
        for split, total in zip(get_args(Split), images, strict=True)
    ]
    count("batch_size", batch_size)
    if workers is not None:
        count("workers", workers)
    root, manifest = Path(out), Path(out) / "manifest.json"
    task = {
        _KEY: {
            "size": size,
            "objects": list(objects),
            "stream_version": STREAM_VERSION,
            **({"looks": looks} if looks != "textured" else {}),
            **({"zoom": float(zoom)} if zoom != 1 else {}),
            **({"alike": float(alike)} if alike != ALIKE else {}),
        },
        "seed": seed,
        "images": list(images),
        "batch_size": batch_size,
    }
    _claim(manifest, task)
    jobs = [
        _Job(root, shapes, k, start, min(batch_size, len(shapes) - start))
        for shapes in sets
        for k, start in enumerate(range(0, len(shapes), batch_size))
    ]
    made = write_missing(jobs, _write_batch, _checksums, what="writing shapes", workers=workers, progress=progress)
    _finish(root, jobs, manifest, task)
    return Written(made, sum(images) - made, manifest)


def _claim(manifest: Path, task: dict[str, Any]) -> None:
    """Refuse a folder with another data set in it; else leave an unfinished manifest for others to see."""
    if manifest.exists():
        check_claim(manifest, load_manifest(manifest, key=_KEY), task)
    else:
        save_manifest(manifest, {**task, "complete": False})


def _name(job: _Job) -> str:
    return f"{job.shapes.split}-{job.batch:06d}"


def _checksums(job: _Job) -> Path:
    return job.out / "checksums" / f"{_name(job)}.sha256"


def _write_batch(job: _Job) -> int:
    """Write the images of a batch, their part of the JSON files, then its checksums, which say that it is whole."""
    sums: dict[str, str] = {}
    part: dict[str, list[Any]] = {"images": [], "panoptic": [], "instances": []}
    side = job.shapes.size
    for index in range(job.start, job.start + job.images):
        scene = job.shapes.scene(index)
        name = f"{scene.image_id:012d}.png"
        ids = np.concatenate([np.zeros(1, np.int32), scene.ids])[scene.places]
        for path, pixels in (
            (f"{job.shapes.split}/{name}", np.asarray(scene.image)),
            (f"panoptic_{job.shapes.split}/{name}", rgb_from_ids(ids)),
        ):
            sums[path] = write_atomic(job.out / path, png(pixels))
        part["images"].append({"id": scene.image_id, "file_name": name, "height": side, "width": side})
        part["panoptic"].append({"image_id": scene.image_id, "file_name": name, "segments_info": segments_info(scene)})
        # No image has as many segments, so that the numbers of annotations are a function of the image too.
        part["instances"] += instance_annotations(scene, CATEGORIES, first_id=256 * index + 1)
    path = f"parts/{_name(job)}.json"
    sums[path] = write_atomic(job.out / path, json.dumps(part).encode())
    write_checksums(_checksums(job), sums)
    return job.images


def _finish(out: Path, jobs: list[_Job], manifest: Path, task: dict[str, Any]) -> None:
    """Put the JSON files together and say in the manifest that all is there."""
    categories = CATEGORIES.as_json()
    sums = {"categories.json": write_atomic(out / "categories.json", json.dumps(categories, indent=1).encode())}
    about = {"description": f"crbp shapes, seed {task['seed']}", "version": str(STREAM_VERSION)}
    for split in get_args(Split):
        whole: dict[str, list[Any]] = {"images": [], "panoptic": [], "instances": []}
        for job in jobs:
            if job.shapes.split == split:
                part = json.loads((out / "parts" / f"{_name(job)}.json").read_bytes())
                for key, entries in whole.items():
                    entries += part[key]
        things = [each for each in categories if each["isthing"]]
        for kind, named in (("panoptic", categories), ("instances", things)):
            content = {"info": about, "images": whole["images"], "annotations": whole[kind], "categories": named}
            path = f"{kind}_{split}.json"
            sums[path] = write_atomic(out / path, json.dumps(content).encode())
    write_checksums(out / "checksums" / "json.sha256", sums)
    checksums = [*(_checksums(job) for job in jobs), out / "checksums" / "json.sha256"]
    batches = {path.relative_to(out).as_posix(): sha256(path) for path in checksums}
    save_manifest(manifest, {**task, "complete": True, "crbp_version": version("crbp"), "checksums": batches})
