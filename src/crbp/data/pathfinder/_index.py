"""The index files of Pathfinder folders, in the three layouts found in the wild, as one list of entries."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np

from crbp.data._foreign import leads_out, shown
from crbp.data.errors import DataError

Layout = Literal["metadata", "list", "lra"]

_FIX_LINE = "correct or delete the line, or pass on_error='skip'"


class Entry(NamedTuple):
    """One image: paths relative to the root, its class, and where the index names it."""

    image: str
    mask: str | None
    label: int
    where: str


def homes(root: Path) -> list[Path]:
    """Return the folders under `root` that hold `metadata/`: itself, or its children (one per length)."""
    if (root / "metadata").is_dir():
        return [root]
    if not root.is_dir():
        return []
    return sorted(child for child in root.iterdir() if (child / "metadata").is_dir())


def lists(root: Path) -> list[Path]:
    """Return the list files in `root`."""
    return sorted(root.glob("*.txt")) if root.is_dir() else []


def detect(root: Path) -> Layout:
    """Return the layout of a folder from its first index file.

    Raises:
        DataError: There is no index file, or there are several list files to choose from.
    """
    for home in homes(root):
        for path in _metadata_files(home):
            for cells in _rows(path):
                return _layout_of(cells)
    found = lists(root)
    if len(found) == 1:
        return "list"
    if found:
        names = ", ".join(path.name for path in found)
        raise DataError(root, f"there are {len(found)} list files ({names})", "choose one with list_file=")
    raise DataError(
        root,
        "no index was found: neither metadata/*.npy with rows, here or one folder below, nor a list file *.txt",
        "give the folder that holds imgs/, seg/ and metadata/, or name the list with list_file=",
    )


def metadata_entries(root: Path, layout: Layout) -> Iterator[Entry | DataError]:
    """Yield the entries of every `metadata/*.npy`, or, in place of a bad row, what is wrong with it.

    Layout `"metadata"` has rows of (image folder, mask folder, file, …); `"lra"` of (folder, file, …, label).
    Either may be a NumPy array or plain text whatever its name ends in.

    Raises:
        DataError: A whole file cannot be read, or is of the other layout.
    """
    has_masks = layout == "metadata" or all((home / "seg").is_dir() for home in homes(root))
    for home in homes(root):
        base = home.relative_to(root).as_posix()
        for path in _metadata_files(home):
            for number, cells in enumerate(_rows(path), start=1):
                where = f"{path}, row {number}"
                if len(cells) < 4:
                    yield DataError(where, f"the row has {len(cells)} columns, not 4 or more", _FIX_LINE)
                    continue
                if _layout_of(cells) != layout:
                    raise DataError(
                        where, f"the row is of layout {_layout_of(cells)!r}, not {layout!r}", "leave layout='auto'"
                    )
                yield _entry(base, cells, where, layout, has_masks)


def list_entries(path: Path) -> Iterator[Entry | DataError]:
    """Yield the entries of a list file with lines `folder/imgs/batch/name.png label`; the mask is under `seg`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(path, f"the list cannot be read ({error})", "give a text file with list_file=") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        name, _, label = line.strip().rpartition(" ")
        if not name or not (label.isdecimal() and len(label) < 10):
            yield DataError(where, f"{line.strip()!r} is not 'path label'", _FIX_LINE)
            continue
        parts = name.strip().split("/")
        if "imgs" not in parts:
            yield DataError(where, f"{name!r} has no folder 'imgs' to find the mask by", _FIX_LINE)
            continue
        at = len(parts) - 1 - parts[::-1].index("imgs")
        mask = "/".join([*parts[:at], "seg", *parts[at + 1 :]])
        yield _unsafe(name.strip(), where) or Entry(name.strip(), mask, int(label), where)


def _entry(base: str, cells: list[str], where: str, layout: Layout, has_masks: bool) -> Entry | DataError:
    if layout == "metadata":
        image, mask, label = f"{cells[0]}/{cells[2]}", f"{cells[1]}/{cells[2]}", "0"
    else:
        image, label = f"{cells[0]}/{cells[1]}", cells[3]
        mask = "/".join(["seg", *image.split("/")[1:]])
    problem = _unsafe(image, where) or _unsafe(mask, where)
    if problem is not None:
        return problem
    try:
        number = int(float(label))
    except (ValueError, OverflowError):
        number = -1
    if not 0 <= number < 1 << 31:
        return DataError(where, f"the label {shown(label)} is no number of a class", _FIX_LINE)
    home = PurePosixPath(base)
    return Entry(str(home / image), str(home / mask) if has_masks else None, number, where)


def _unsafe(name: str, where: str) -> DataError | None:
    """Refuse a path that leaves the root: an index file is data from elsewhere."""
    if leads_out(name):
        return DataError(where, f"the path {name!r} is absolute or leaves the folder", _FIX_LINE)
    return None


def _layout_of(cells: list[str]) -> Layout:
    return "lra" if len(cells) > 1 and "." in PurePosixPath(cells[1]).name else "metadata"


def _metadata_files(home: Path) -> list[Path]:
    def order(path: Path) -> tuple[bool, int, str]:
        number = path.stem.isdecimal()
        return not number, int(path.stem) if number else 0, path.name

    return sorted((home / "metadata").glob("*.npy"), key=order)


def _rows(path: Path) -> list[list[str]]:
    """Return the cells of a metadata file, whether it is a NumPy array of strings or plain text."""
    with path.open("rb") as file:
        is_array = file.read(6) == b"\x93NUMPY"
    if not is_array:
        try:
            return [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise DataError(path, "neither a NumPy array nor plain text", "fetch the file again") from error
    try:
        table = np.load(path, allow_pickle=False)
    except Exception as error:  # NumPy parses a broken header as Python, which ends in many ways
        if "Object arrays" in str(error):
            raise DataError(
                path,
                "the array holds Python objects, that is a pickle, which can run code when it is read",
                "if you trust where it comes from, rewrite it as strings: "
                "numpy.save(path, numpy.load(path, allow_pickle=True).astype(str))",
            ) from error
        raise DataError(path, f"the NumPy array cannot be read ({error})", "fetch the file again") from error
    kind = table.dtype.kind
    if kind not in "US" or table.ndim != 2 or not table.itemsize:
        raise DataError(
            path,
            f"an array of {table.dtype} and shape {table.shape}, not strings in rows and columns",
            "metadata has one row of strings per image",
        )
    codes = (
        np.ascontiguousarray(table).view(np.dtype("u4").newbyteorder(table.dtype.byteorder)) if kind == "U" else table
    )
    try:
        if kind == "U" and codes.size and codes.max() > sys.maxunicode:
            raise ValueError(f"{codes.max()} is no character")
        return [[str(cell) for cell in row] for row in table.astype(str)]
    except ValueError as error:
        raise DataError(path, f"a cell is no text ({error})", "fetch the file again") from error
