"""Folders of Pathfinder images made elsewhere, read as the torch data set they would be if generated here."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from torch.utils.data import Dataset

from crbp.data._extras import require
from crbp.data.errors import DataError
from crbp.data.pathfinder import _index
from crbp.data.pathfinder._index import Entry, Layout
from crbp.data.pathfinder.dataset import Sample, resolve_index, to_sample


class Skipped(NamedTuple):
    """An image left out: its name, or the place in the index where it stands, and the reason."""

    name: str
    reason: str


class FolderPathfinder(Dataset[Sample]):
    """Pathfinder images in folders, in any of the three layouts in circulation.

    | layout | index | mask |
    |---|---|---|
    | `"metadata"` | `metadata/*.npy`, rows of image folder, mask folder, file, … | named by the row |
    | `"list"` | a text file of lines `length/imgs/1/sample_3.png 0` | the path with `imgs` → `seg` |
    | `"lra"` | `metadata/*.npy`, rows of folder, file, number, label, … (Long Range Arena) | under `seg/`, if there |

    Metadata may be NumPy arrays of strings or plain text, whatever the layout. Pickles are never read. The
    index is checked here, once, so that the length is right from the start.

    Args:
        root: The folder with `imgs/` and `metadata/`, or one that holds several such; for lists, the folder
            that their paths start from.
        layout: `"auto"` looks at the first row.
        list_file: The list to read, from `root` where relative; implies layout `"list"`.
        image_size: Height and width to average the images to; theirs by default.
        mask_threshold: A pixel is in the mask where its value, after the resize, exceeds this share of white.
        on_error: `"raise"`, or `"skip"` to leave bad entries out, with a warning and listed in `skipped`.
        check: `"quick"` looks at both ends of every file; `"full"` decodes it; `"none"` trusts the index.

    Attributes:
        skipped: The entries left out, each a (name, reason).
        has_masks: Whether samples have a `mask`; false for Long Range Arena folders without `seg/`.

    Raises:
        DataError: The index, or an image or mask it names, is missing or broken; names file and remedy.
        ValueError: An option is unknown, or the options exclude each other.
        ImportError: The extra `crbp[data]` is not installed.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        layout: Layout | Literal["auto"] = "auto",
        list_file: str | Path | None = None,
        image_size: int | None = None,
        mask_threshold: float = 0.2,
        on_error: Literal["raise", "skip"] = "raise",
        check: Literal["none", "quick", "full"] = "quick",
    ) -> None:
        require("PIL")
        _check_options(layout, list_file, image_size, on_error, check)
        self.root, self.image_size, self.mask_threshold = Path(root), image_size, mask_threshold
        if not self.root.is_dir():
            raise DataError(self.root, "there is no such folder", "give the folder that holds the images")
        self.layout = _choose_layout(self.root, layout, list_file)
        self.skipped: list[Skipped] = []
        self._size: tuple[int, int] | None = None
        self._entries: list[Entry] = []
        for entry in self._index(list_file):
            kept = self._keep(entry, skip=on_error == "skip", check=check)
            if kept is not None:
                self._entries.append(kept)
        if not self._entries:
            raise DataError(
                self.root, f"no usable image ({len(self.skipped)} skipped)", "see DataError without on_error='skip'"
            )
        self.has_masks = self._entries[0].mask is not None
        if self.skipped:
            warnings.warn(
                f"{self.root}: skipped {len(self.skipped)} of {len(self.skipped) + len(self)} images, "
                f"the first {self.skipped[0].name} ({self.skipped[0].reason}); see .skipped",
                RuntimeWarning,
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        from crbp.data.pathfinder import _png

        entry = self._entries[resolve_index(index, len(self))]
        image = _png.read(self.root / entry.image, size=self.image_size)
        if entry.mask is None:
            sample = to_sample(image, None, entry.label)
        else:
            mask = _png.read(self.root / entry.mask, size=self.image_size)
            sample = to_sample(image, mask > self.mask_threshold * 255, entry.label)
        return sample

    def name(self, index: int) -> str:
        """Return the path of an image relative to the root."""
        return self._entries[resolve_index(index, len(self))].image

    def __repr__(self) -> str:
        return f"FolderPathfinder({str(self.root)!r}, layout={self.layout!r}, {len(self)} images)"

    def _index(self, list_file: str | Path | None) -> Iterable[Entry | DataError]:
        if self.layout != "list":
            return _index.metadata_entries(self.root, self.layout)
        return _index.list_entries(self.root / list_file if list_file is not None else _index.lists(self.root)[0])

    def _keep(self, entry: Entry | DataError, *, skip: bool, check: str) -> Entry | None:
        """Return an entry that is good; raise, or note it and return nothing, where it is not."""
        try:
            if isinstance(entry, DataError):
                raise entry
            if check != "none":
                self._check(entry, full=check == "full")
        except DataError as error:
            if not skip:
                raise
            name = entry.image if isinstance(entry, Entry) else error.where
            self.skipped.append(Skipped(name, f"{error.where}: {error.what}"))
            return None
        return entry

    def _check(self, entry: Entry, *, full: bool) -> None:
        from crbp.data.pathfinder import _png

        paths = [self.root / name for name in (entry.image, entry.mask) if name is not None]
        sizes = [_png.glance(path) for path in paths]
        if sizes[0] != sizes[-1]:
            raise DataError(
                paths[1], f"the mask is {sizes[1]} pixels, its image {sizes[0]}", "fetch or generate both again"
            )
        if full:
            for path in paths:
                _png.read(path)
        if self._size is None:
            self._size = sizes[0]
        if self.image_size is None and sizes[0] != self._size:
            raise DataError(
                paths[0], f"{sizes[0]} pixels, where those before have {self._size}", "give image_size= to make all one"
            )


def _check_options(
    layout: str, list_file: str | Path | None, image_size: int | None, on_error: str, check: str
) -> None:
    choices = {
        "layout": (layout, ("auto", "metadata", "list", "lra")),
        "on_error": (on_error, ("raise", "skip")),
        "check": (check, ("none", "quick", "full")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}")
    if list_file is not None and layout not in ("auto", "list"):
        raise ValueError(f"list_file is for layout='list', not {layout!r}; leave one of them out")
    if check == "none" and on_error == "skip":
        raise ValueError("on_error='skip' needs the check that finds what to skip; use check='quick' or 'full'")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size={image_size} must be 1 or more")


def _choose_layout(root: Path, layout: Layout | Literal["auto"], list_file: str | Path | None) -> Layout:
    if list_file is not None:
        return "list"
    if layout != "auto":
        if layout == "list" and len(_index.lists(root)) != 1:
            raise DataError(root, f"{len(_index.lists(root))} list files *.txt", "name the list with list_file=")
        return layout
    return _index.detect(root)
