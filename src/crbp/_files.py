"""Files that are whole or not there, whatever ends the process that writes them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from crbp.errors import StorageError


def write_whole(path: Path, content: bytes | memoryview, *, part: str | None = None, sync: bool = True) -> None:
    """Write a file beside its place and move it there once it is complete; what was there before stays until then.

    Args:
        path: of the file; its folder is made if it does not exist.
        content: all of it.
        part: name of the unfinished file, by default ``.NAME.part``: what a kill leaves of it, the next call replaces.
        sync: wait until it is on the disk, so that it outlives a power cut as well.

    Raises:
        StorageError: if the disk is full, or the file may not be written; nothing is left of it then.
    """
    unfinished = path.with_name(part or f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder: a move from another file system is a copy, of which a kill leaves half.
        with unfinished.open("wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise StorageError.at(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
