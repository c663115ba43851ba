"""What the commands that take minutes share: their parser, and that their results will have a place."""

from __future__ import annotations

import argparse
import errno
import os
from pathlib import Path
from typing import NoReturn

from crbp.errors import CrbpError


class Parser(argparse.ArgumentParser):
    """Reports a mistake as a `CrbpError`, which the command line tells in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print and exit with."""
        raise CrbpError(f"{message} (see {self.prog} --help)")


def reserve(folder: Path, files: list[Path]) -> None:
    """Make the folders now, and see that files can be: minutes of work must not be lost to a path that cannot be.

    Raises:
        CrbpError: naming what cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
            probe = file.with_name(f".{file.name}.part")  # an empty file of the name itself could be taken for a result
            probe.touch()
            probe.unlink()
    except OSError as error:
        raise CrbpError(
            f"{error.filename} cannot be written ({error.strerror}); choose another --out or --json"
        ) from None
