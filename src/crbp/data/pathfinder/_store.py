"""The on-disk cache: blocks of images as plain memory-mapped `.npy` files, each made whole or not at all.

No lock is needed. A block's content is a function of its name, so two processes that make the same block
write the same bytes, and the one that renames last changes nothing.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crbp.data.pathfinder.config import PathfinderConfig, Split
from crbp.data.pathfinder.generator import Batch, generate_batch

BLOCK = 4096  # images a file: few open files for millions of images, seconds lost when a run is killed
_PIECE = 256  # images made at once, to keep the memory of a fill small


class BlockStore:
    """Images of one split as files under `root / <digest>-<split>-<seed>`.

    A block is the pair `<start>-<stop>.labels.npy` (n,) int64 and `<start>-<stop>.npy` (n, 2, H, W) uint8,
    image and mask (0 or 1); the second is written last, so its presence means that both are whole.
    """

    def __init__(self, root: str | Path, *, config: PathfinderConfig, split: Split, size: int, seed: int) -> None:
        self.config, self.split, self.size, self.seed = config, split, size, seed
        self.folder = Path(root) / f"{config.digest}-{split}-{seed}"

    def read(self, index: int) -> Batch:
        """Return one image as a batch of one; views of the mapped file."""
        start = index - index % BLOCK
        path = self._path(start)
        if not path.exists():
            self._make(start)
        pixels, labels = _open(str(path))
        at = slice(index - start, index - start + 1)
        return Batch(pixels[at, 0], pixels[at, 1].view(np.bool_), labels[at])

    def fill(self) -> Iterator[int]:
        """Make the blocks that are missing, and yield the number of images made after each piece.

        Processes that fill the same folder together go through it in different orders and share the work.

        Raises:
            OSError: The disk has not enough room; nothing is written in that case.
        """
        missing = self._gaps()
        self._check_room(self.missing())
        random.Random(os.getpid()).shuffle(missing)
        for start in missing:
            if not self._path(start).exists():
                yield from self._pieces(start)

    def missing(self) -> int:
        """Return the number of images that are not on disk yet."""
        return sum(self._stop(start) - start for start in self._gaps())

    def _gaps(self) -> list[int]:
        return [start for start in range(0, self.size, BLOCK) if not self._path(start).exists()]

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:09d}-{self._stop(start):09d}.npy"

    def _stop(self, start: int) -> int:
        return min(start + BLOCK, self.size)

    def _check_room(self, images: int) -> None:
        need = images * 2 * self.config.image_size**2
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise OSError(
                f"{self.folder} needs {need / 2**30:.1f} GiB for {images} images and has {free / 2**30:.1f} GiB "
                "free; choose another cache_dir, a smaller size, or cache='none'"
            )

    def _make(self, start: int) -> None:
        for _ in self._pieces(start):
            pass

    def _pieces(self, start: int) -> Iterator[int]:
        self.folder.mkdir(parents=True, exist_ok=True)
        path, stop, size = self._path(start), self._stop(start), self.config.image_size
        labels = np.empty(stop - start, np.int64)
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
        os.close(handle)
        try:
            pixels = np.lib.format.open_memmap(name, "w+", np.uint8, (stop - start, 2, size, size))
            for at in range(start, stop, _PIECE):
                count = min(_PIECE, stop - at)
                made = generate_batch(self.config, split=self.split, seed=self.seed, start=at, count=count)
                here = slice(at - start, at - start + count)
                pixels[here, 0], pixels[here, 1], labels[here] = made.images, made.masks, made.labels
                yield count
            pixels.flush()
            del pixels
            self._save_labels(path.with_suffix(".labels.npy"), labels)
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)

    def _save_labels(self, path: Path, labels: NDArray[np.int64]) -> None:
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.save(file, labels, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)


@lru_cache(maxsize=64)  # bounds the open files: a map keeps its file's descriptor
def _open(path: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    labels = np.load(Path(path).with_suffix(".labels.npy"), allow_pickle=False)
    return np.load(path, mmap_mode="r", allow_pickle=False), labels
