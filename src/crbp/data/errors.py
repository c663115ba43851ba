"""The error of all readers: a file is not what it should be."""

from __future__ import annotations

from pathlib import Path


class DataError(ValueError):
    """A file of a data set is missing, broken or not what it claims; names the file and the remedy."""

    def __init__(self, where: str | Path, what: str = "", remedy: str = "") -> None:
        # A loader's worker sends the message alone, which is whole already.
        told = f"{where}: {what}; {remedy}" if what else str(where)
        super().__init__(told.encode(errors="backslashreplace").decode())  # a broken name may be no text to print
        self.where, self.what, self.remedy = str(where), what, remedy

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str, str]]:
        # The default would rebuild it from the one message, which fails on the way out of a worker process.
        return DataError, (self.where, self.what, self.remedy)
