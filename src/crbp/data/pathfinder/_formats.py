"""One batch of images as files, in the two formats written: what a format is, apart from who runs it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from crbp.data._files import write_atomic, write_checksums
from crbp.data.pathfinder import _png
from crbp.data.pathfinder.config import PathfinderConfig, Split
from crbp.data.pathfinder.generator import Batch, generate_batch

Format = Literal["folder", "parquet"]

# What `datasets` reads from a Parquet schema to decode the columns; see its `Features.to_dict`.
_FEATURES = {
    "image": {"_type": "Image"},
    "mask": {"_type": "Image"},
    "label": {"dtype": "int64", "_type": "Value"},
    "index": {"dtype": "int64", "_type": "Value"},
}
# `datasets` finds splits by these words in file names.
_SPLIT_WORDS = {"train": "train", "val": "validation", "test": "test"}


class Job(NamedTuple):
    """One batch to write: everything a worker process needs."""

    out: Path
    config: PathfinderConfig
    split: Split
    seed: int
    format: Format
    batch: int
    batches: int
    start: int
    images: int


def checksum_path(job: Job) -> Path:
    """Return the file that lists a batch's checksums; written last, it says that the batch is whole."""
    return job.out / "checksums" / f"{job.batch:06d}.sha256"


def write_batch(job: Job) -> int:
    """Make and write one batch, and its checksums; return the number of images."""
    batch = generate_batch(job.config, split=job.split, seed=job.seed, start=job.start, count=job.images)
    sums = _FORMATS[job.format](job, batch)
    write_checksums(checksum_path(job), sums)
    return job.images


def _write_folder(job: Job, batch: Batch) -> dict[str, str]:
    """Write images, masks, then their metadata row by row; return the checksum of each file."""
    home = f"curv_contour_length_{job.config.contour_length}"
    sums, rows = {}, []
    for k in range(job.images):
        name = f"sample_{job.start + k}.png"
        pixels = {"imgs": batch.images[k], "seg": batch.masks[k].astype(np.uint8) * 255}
        for kind, values in pixels.items():
            path = f"{home}/{kind}/{job.batch}/{name}"
            sums[path] = write_atomic(job.out / path, _png.encode(values))
        rows.append(_row(job, name, job.start + k, int(batch.labels[k])))
    metadata = f"{home}/metadata/{job.batch}.npy"
    sums[metadata] = write_atomic(job.out / metadata, _metadata(job.config, rows))
    return sums


def _row(job: Job, name: str, index: int, label: int) -> list[str]:
    """Return the 11 columns that the published sets have; the classification form has a label for the mask."""
    config, images, masks = job.config, f"imgs/{job.batch}", f"seg/{job.batch}"
    head = [images, masks, name, index] if config.form == "segmentation" else [images, name, index, label]
    settings = [
        config.continuity,
        config.contour_length,
        config.distractor_dashes,
        config.dash_length,
        config.dash_thickness,
        config.dash_margin,
        1,  # the number of contrasts
    ]
    return [str(value) for value in [*head, *settings]]


def _metadata(config: PathfinderConfig, rows: list[list[str]]) -> bytes:
    if config.form == "classification":  # as in Long Range Arena: plain text in spite of the name
        return "".join(" ".join(row) + "\n" for row in rows).encode()
    buffer = io.BytesIO()
    np.save(buffer, np.array(rows, dtype=np.str_), allow_pickle=False)
    return buffer.getvalue()


def _write_parquet(job: Job, batch: Batch) -> dict[str, str]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    indices = range(job.start, job.start + job.images)
    columns: dict[str, list[Any]] = {
        "image": [_cell(f"image_{i}.png", pixels) for i, pixels in zip(indices, batch.images, strict=True)],
        "mask": [
            _cell(f"mask_{i}.png", pixels.astype(np.uint8) * 255)
            for i, pixels in zip(indices, batch.masks, strict=True)
        ],
        "label": batch.labels.tolist(),
        "index": list(indices),
    }
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("image", picture), ("mask", picture), ("label", pa.int64()), ("index", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
    )
    buffer = io.BytesIO()
    # Small row groups let a reader take one image without decoding a whole file.
    pq.write_table(pa.table(columns, schema=schema), buffer, row_group_size=100)
    name = f"data/{_SPLIT_WORDS[job.split]}-{job.batch:05d}-of-{job.batches:05d}.parquet"
    return {name: write_atomic(job.out / name, buffer.getvalue())}


def _cell(name: str, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> dict[str, Any]:
    return {"bytes": _png.encode(pixels), "path": name}


_FORMATS: dict[Format, Callable[[Job, Batch], dict[str, str]]] = {
    "folder": _write_folder,
    "parquet": _write_parquet,
}
