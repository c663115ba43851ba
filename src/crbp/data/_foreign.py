"""What every reader asks of a file from elsewhere: names that stay in the folder, JSON and images of a bounded size."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image

from crbp.data.errors import DataError

MAX_PIXELS = 1 << 26
_FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow has others, one of which starts another program
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
_SHORT.maxdict = _SHORT.maxlist = 8


def leads_out(name: str) -> bool:
    """Whether a file name of an index is absolute, leaves its folder, or is no name that a file can have."""
    parts = PurePosixPath(name.replace("\\", "/"))
    try:
        name.encode()
    except UnicodeEncodeError:
        return True
    return (
        bool(parts.is_absolute() or PureWindowsPath(name).drive or ".." in parts.parts or not parts.name)
        or "\0" in name
    )


def shown(value: Any) -> str:
    """A value from a file as it can stand in a message, however long or deep it is."""
    return _SHORT.repr(value)


def read_json(path: str | Path, remedy: str) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: it cannot be read; names it and the remedy.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(path, f"cannot be read as JSON ({error})", remedy) from error


@contextmanager
def open_image(
    path: str | Path, what: str, remedy: str, *, formats: tuple[str, ...] = _FORMATS
) -> Iterator[Image.Image]:
    """An image file whose size is known and whose pixels are not decoded yet.

    Args:
        path: of the file.
        what: the image is, for the message.
        remedy: for the message.
        formats: that are accepted, as Pillow calls them.

    Raises:
        DataError: it is missing, of another format or has more than `MAX_PIXELS`, or does not decode within the block.
    """
    try:
        with Image.open(path, formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    path, f"{what} has {image.width} x {image.height} pixels, more than {MAX_PIXELS}", remedy
                )
            yield image
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they run into in a broken file
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(path, f"{what} cannot be read ({reason})", remedy) from error
