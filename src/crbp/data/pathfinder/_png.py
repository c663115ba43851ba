"""PNG files in and out: a look that costs no decoding, a strict read, and a write that is whole or not there."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crbp.data._foreign import open_image
from crbp.data.errors import DataError

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_END = b"IEND\xaeB`\x82"
_AGAIN = "fetch or generate it again, or pass on_error='skip'"


def glance(path: Path) -> tuple[int, int]:
    """Return (height, width) from the first bytes of a PNG file whose last bytes are there too.

    Raises:
        DataError: The file is missing, empty, no PNG, or cut short.
    """
    try:
        with path.open("rb") as file:
            head = file.read(24)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - len(_END)))
            tail = file.read()
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})", _AGAIN) from error
    if not head:
        raise DataError(path, "the file is empty", _AGAIN)
    if not head.startswith(_SIGNATURE):
        raise DataError(path, "the file is not a PNG image", _AGAIN)
    if len(head) < 24 or tail != _END:
        raise DataError(path, f"the PNG image is cut short at {size} bytes", _AGAIN)
    width, height = struct.unpack(">II", head[16:24])
    return height, width


def read(path: Path, *, size: int | None = None) -> NDArray[np.uint8]:
    """Return a PNG file as grey values (H, W) uint8, averaged by area to (size, size) where `size` is given.

    Raises:
        DataError: The file is missing or its content does not decode.
    """
    glance(path)
    with open_image(path, "the PNG image", _AGAIN + " with check='full'", formats=("PNG",)) as image:
        image.load()
        grey = _grey(image)
    if size is not None and grey.size != (size, size):
        grey = grey.resize((size, size), Image.Resampling.BOX)
    return np.asarray(grey, dtype=np.uint8)


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """Return the PNG bytes of grey values (H, W) uint8."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def _grey(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips at 255 instead of scaling
        return Image.fromarray((np.asarray(image).astype(np.int64) // 257).astype(np.uint8))
    if image.mode in ("LA", "RGBA", "PA"):  # hidden colours under transparent pixels are not part of the picture
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image.convert("RGBA")).convert("L")
    return image.convert("L")
