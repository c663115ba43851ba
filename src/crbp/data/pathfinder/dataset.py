"""The torch data set over generated images, and what a sample is for every Pathfinder data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from crbp.data.pathfinder._store import BlockStore
from crbp.data.pathfinder.config import PathfinderConfig, Split, stream_key
from crbp.data.pathfinder.generator import Batch, generate


class Sample(TypedDict):
    """`image` (1, H, W) float32 in [0, 1]; `mask` (H, W) bool, the target, where there is one; `label`, the class."""

    image: Tensor
    mask: NotRequired[Tensor]
    label: int


def to_sample(image: NDArray[np.uint8], mask: NDArray[np.bool_] | None, label: int) -> Sample:
    """Return a sample from an image (H, W) uint8 and a mask (H, W) bool; the arrays are copied."""
    sample: Sample = {"image": torch.tensor(image)[None].float().div_(255), "label": int(label)}
    if mask is not None:
        sample["mask"] = torch.tensor(mask)
    return sample


def resolve_index(index: int, size: int) -> int:
    """Return `index` counted from the front; raise `IndexError` outside [−size, size)."""
    if not -size <= index < size:
        raise IndexError(f"index {index} is out of range for {size} images")
    return index % size


class Pathfinder(Dataset[Sample]):
    """Contour tracing: find the long contour that the disc marks, dash by dash, among others.

    `Pathfinder(14, image_size=150, split="train")[i]` is a `Sample`. Image i is a function of (config, seed,
    split, i) alone: the same for any number of workers, any order, any `size` and any machine. The splits
    share no image.

    Args:
        contour_length: Dashes of each long contour; 14, or the preset's, by default.
        image_size: Height and width in pixels; 150, or the preset's, by default.
        split: `"train"`, `"val"` or `"test"`.
        size: Number of images.
        seed: Another seed gives other images.
        preset: Start from a named task, see `PathfinderConfig.preset`.
        config: All settings at once; excludes the three above.
        cache: `"none"` makes each image anew; `"memory"` keeps each image made, in this process alone (each
            worker process has its own, so it helps where nothing is lost between epochs).
        cache_dir: Keep the images on disk under this folder, made now where missing and shared by all
            processes; 2 · H · W bytes an image. Excludes `cache="memory"`.

    Raises:
        ValueError: An argument is out of range or excludes another.
        GenerationError: A picture is too crowded for its settings; raised when that image is asked for.
        OSError: The disk has not enough room for the cache.

    Source: Linsley et al., NeurIPS 2020, arXiv 2005.11362.
    """

    def __init__(
        self,
        contour_length: int | None = None,
        image_size: int | None = None,
        split: Split = "train",
        size: int = 200_000,
        seed: int = 0,
        *,
        preset: str | None = None,
        config: PathfinderConfig | None = None,
        cache: Literal["none", "memory"] = "none",
        cache_dir: str | Path | None = None,
    ) -> None:
        self.config = _choose(config, preset, contour_length=contour_length, image_size=image_size)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size={size!r} must be a whole number of 1 or more images")
        if cache not in ("none", "memory"):
            raise ValueError(f"cache={cache!r} is unknown; use 'none' or 'memory', or cache_dir for a cache on disk")
        if cache == "memory" and cache_dir is not None:
            raise ValueError(f"cache='memory' and cache_dir={str(cache_dir)!r} exclude each other; give one")
        stream_key(self.config, split=split, seed=seed)  # a wrong split or seed shows here, not in a worker
        self.split: Split = split
        self.size, self.seed, self.cache = size, seed, cache
        self._kept: dict[int, Batch] = {}
        self._store: BlockStore | None = None
        if cache_dir is not None:
            self._store = BlockStore(cache_dir, config=self.config, split=split, size=size, seed=seed)
            _fill(self._store)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Return several samples with one call of the compiled code; what `DataLoader` asks for."""
        places = [resolve_index(int(index), self.size) for index in indices]
        if self._store is not None:
            return [_first(self._store.read(place)) for place in places]
        missing = sorted({place for place in places if place not in self._kept})
        made = generate(self.config, np.array(missing, np.int64), split=self.split, seed=self.seed)
        found = {place: _row(made, k) for k, place in enumerate(missing)}
        if self.cache == "memory":
            self._kept.update(found)
        return [_first(found.get(place) or self._kept[place]) for place in places]

    def __getstate__(self) -> dict[str, Any]:
        # A worker gets the recipe, not gigabytes of kept images.
        return {**self.__dict__, "_kept": {}}

    def __repr__(self) -> str:
        task = f"{self.config.n_contours}x{self.config.contour_length} dashes"
        return (
            f"Pathfinder({task}, {self.config.image_size} px, split={self.split!r}, size={self.size}, seed={self.seed})"
        )


def _choose(config: PathfinderConfig | None, preset: str | None, **settings: int | None) -> PathfinderConfig:
    given = {name: value for name, value in settings.items() if value is not None}
    if config is None:
        return PathfinderConfig(**given) if preset is None else PathfinderConfig.preset(preset, **given)  # type: ignore[arg-type]
    clash = [*given, *(["preset"] if preset is not None else [])]
    if clash:
        raise ValueError(
            f"{', '.join(clash)} cannot be given beside config, which has every setting; "
            "use dataclasses.replace(config, ...) to change one"
        )
    return config


def _row(batch: Batch, k: int) -> Batch:
    return Batch(batch.images[k : k + 1].copy(), batch.masks[k : k + 1].copy(), batch.labels[k : k + 1].copy())


def _first(batch: Batch) -> Sample:
    return to_sample(batch.images[0], batch.masks[0], int(batch.labels[0]))


def _fill(store: BlockStore) -> None:
    """Fill the cache before training starts: worker processes that met a gap together would each fill it."""
    missing = store.missing()
    if not missing:
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"caching {store.split} images", total=missing)
        for made in store.fill():
            bar.advance(task, made)
