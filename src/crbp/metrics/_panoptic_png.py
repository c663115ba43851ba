"""Segment numbers as colours of a PNG, and files that are whole or not there."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crbp.data.errors import DataError


def rgb_from_ids(ids: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
    """The colours ``(H, W, 3)`` of segment numbers ``(H, W)``: ``id = R + 256 G + 256² B``."""
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= 1 << 24):
        raise ValueError(f"segment numbers must lie in 0 … 2**24 - 1, not {int(ids.min())} … {int(ids.max())}")
    return np.stack([(ids >> shift & 255).astype(np.uint8) for shift in (0, 8, 16)], axis=-1)


def read_ids(path: str | Path) -> NDArray[np.int32]:
    """The segment numbers ``(H, W)`` of a panoptic PNG."""
    try:
        with Image.open(path) as image:
            if image.format != "PNG" or image.mode != "RGB":
                raise DataError(
                    path,
                    f"is a {image.format} of mode {image.mode}, not a PNG of 8-bit red, green and blue",
                    "write segment numbers as colours, id = R + 256 G + 256**2 B",
                )
            red, green, blue = np.moveaxis(np.asarray(image).astype(np.int32), -1, 0)
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise DataError(path, f"the panoptic PNG cannot be read ({why})", "fetch or generate it again") from error
    ids: NDArray[np.int32] = red + (green << 8) + (blue << 16)
    return ids


def png(pixels: NDArray[np.uint8]) -> bytes:
    """The bytes of a PNG of the pixels ``(H, W, 3)``."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
