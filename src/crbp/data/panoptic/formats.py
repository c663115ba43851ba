"""The official formats: segment numbers as colours of a PNG, and masks as run lengths."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from crbp.data._foreign import open_image
from crbp.data.errors import DataError

_REMEDY = "fetch or generate it again"


def ids_from_rgb(rgb: NDArray[np.uint8]) -> NDArray[np.int32]:
    """The segment numbers ``(H, W)`` of the colours ``(H, W, 3)`` of a panoptic PNG; 0 is void.

    ``id = R + 256 G + 256² B``

    Raises:
        ValueError: ``rgb`` is not an ``(H, W, 3)`` array of uint8.

    Source: panopticapi, the official tool.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"colours must be (H, W, 3) of uint8, not {rgb.shape} of {rgb.dtype}")
    red, green, blue = (rgb[..., k].astype(np.int32) for k in range(3))
    ids: NDArray[np.int32] = red | green << 8 | blue << 16
    return ids


def rgb_from_ids(ids: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
    """The colours ``(H, W, 3)`` of segment numbers ``(H, W)``; undoes `ids_from_rgb`.

    Raises:
        ValueError: a number is outside ``0 … 2²⁴ − 1``.
    """
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= 1 << 24):
        raise ValueError(f"segment numbers must lie in 0 … 2**24 - 1, not {int(ids.min())} … {int(ids.max())}")
    return np.stack([(ids >> shift & 255).astype(np.uint8) for shift in (0, 8, 16)], axis=-1)


def read_ids(path: str | Path, *, told: tuple[int, int, int] | None = None) -> NDArray[np.int32]:
    """The segment numbers ``(H, W)`` of a panoptic PNG.

    Args:
        path: of the file.
        told: number, height and width of its image in the JSON; looked at before the pixels are decoded.

    Raises:
        DataError: it is missing, does not decode, is not a PNG of three colours of 8 bits, or has another size or more
            than 2**26 pixels; names it.
    """
    with open_image(path, "the panoptic PNG", _REMEDY) as image:
        if image.format != "PNG" or image.mode != "RGB":
            raise DataError(
                path,
                f"is a {image.format} of mode {image.mode}, not a PNG of 8-bit red, green and blue",
                "write segment numbers as colours, id = R + 256 G + 256**2 B",
            )
        if told is not None:
            check_size(path, "PNG", (image.height, image.width), told)
        return ids_from_rgb(np.asarray(image))


def read_size(path: str | Path) -> tuple[int, int]:
    """Height and width of a panoptic PNG, of which nothing is decoded.

    Raises:
        DataError: it is missing or no image; names it.
    """
    with open_image(path, "the panoptic PNG", _REMEDY) as image:
        return image.height, image.width


def read_image(path: str | Path) -> Image.Image:
    """An image as red, green and blue, turned as its EXIF orientation says.

    Raises:
        DataError: it is missing, does not decode, or has more than 2**26 pixels or 8 bits a channel; names it.
    """
    with open_image(path, "the image", _REMEDY) as image:
        check_depth(path, image)
        image.load()
        return ImageOps.exif_transpose(image).convert("RGB")


def check_depth(path: str | Path, image: Image.Image) -> None:
    """Raise `DataError` where an image has more than 8 bits a channel, which Pillow would cut off at 255."""
    if image.mode == "F" or image.mode.startswith("I"):
        raise DataError(
            path, f"the image is of mode {image.mode}, more than 8 bits a channel", "convert it to 8 bits a channel"
        )


def check_size(path: str | Path, what: str, size: tuple[int, int], told: tuple[int, int, int]) -> None:
    """Raise `DataError` unless a file has the height and width that the JSON tells of the image with a number."""
    number, height, width = told
    if size != (height, width):
        raise DataError(
            path,
            f"the {what} of image {number} is {size[0]} x {size[1]} pixels (height x width), "
            f"where the JSON says {height} x {width}",
            "run crbp data check, which lists all that is wrong",
        )


def png(pixels: NDArray[np.uint8]) -> bytes:
    """The bytes of a PNG of the pixels ``(H, W, 3)``."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def run_lengths(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask ``(H, W)`` as COCO's run lengths: counts of 0, 1, 0, … down the columns."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *([0] if flat.size and flat[0] else []), *changes.tolist(), flat.size])
    return {"size": list(mask.shape), "counts": counts.tolist()}
