"""Contour-tracing data for training: where the images come from, how they are split, batched and turned over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch.utils.data import DataLoader, Dataset

from crbp._checks import count
from crbp.data._parallel import cores
from crbp.tasks._resume import ResumableData
from crbp.tasks.sampling import EpochSampler, Flipped, Followed, ResumableLoader

if TYPE_CHECKING:
    from crbp.data.pathfinder import PathfinderConfig, Sample

Split: TypeAlias = Literal["train", "val", "test"]
Items: TypeAlias = "Dataset[Sample]"


class ContourSource(ABC):
    """Where images come from. Implement `items` to train on images of your own."""

    @abstractmethod
    def items(self, split: Split, size: int, seed: int) -> Items:
        """The first ``size`` images of a split as a data set of ``{"image": (1, H, W), "mask": (H, W), …}``."""


@dataclass(frozen=True, kw_only=True)
class Generated(ContourSource):
    """Images made on the fly by the generator, the same for the same seed on every machine.

    Args:
        preset: the task, one of `crbp.data.pathfinder.PRESETS`.
        settings: fields of `crbp.data.pathfinder.PathfinderConfig` to put in place of the preset's.
        cache_dir: keep the images in this folder once they are made; None makes each anew every time.

    Raises:
        ValueError: for an unknown preset or setting, or one out of range.
    """

    preset: str = "pf14"
    settings: dict[str, Any] = field(default_factory=dict)
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        _ = self.config  # a mistake is reported where it was made

    @property
    def config(self) -> PathfinderConfig:
        """The generator's settings, complete."""
        from crbp.data.pathfinder import PathfinderConfig

        try:
            return PathfinderConfig.preset(self.preset, **self.settings)
        except TypeError as error:
            raise ValueError(f"settings: {error}; see crbp.data.pathfinder.PathfinderConfig") from None

    def items(self, split: Split, size: int, seed: int) -> Items:
        """Images of the generator's stream for ``(config, split, seed)``."""
        from crbp.data.pathfinder import Pathfinder

        return Pathfinder(config=self.config, split=split, size=size, seed=seed, cache_dir=self.cache_dir)


@dataclass(frozen=True, kw_only=True)
class Folders(ContourSource):
    """Images on disk, one folder for each split, in any layout that `crbp.data.pathfinder.FolderPathfinder` reads.

    Args:
        train: folder of the training images; None where there is no training.
        val: folder of the validation images.
        test: folder of the test images, which predictions are made of as well.
        image_size: height and width to average the images to; None keeps theirs.

    Raises:
        ValueError: if a folder does not exist.
    """

    train: str | None = None
    val: str | None = None
    test: str | None = None
    image_size: int | None = None

    def __post_init__(self) -> None:
        for split in ("train", "val", "test"):
            folder = getattr(self, split)
            if folder is not None and not Path(folder).is_dir():
                raise ValueError(f"{split}: there is no folder {folder}; crbp generate --out {folder} would make it")
        if self.image_size is not None:
            count("image_size", self.image_size)

    def items(self, split: Split, size: int, seed: int) -> Items:
        """The first images of a folder; the seed has no say in what they are.

        Raises:
            DataError: if the split has no folder, too few images or no masks.
        """
        from crbp.data.pathfinder import DataError, FolderPathfinder

        folder: str | None = getattr(self, split)
        if folder is None:
            raise DataError("data.source", f"no folder is given for the split {split!r}", f"set {split}=")
        found = FolderPathfinder(folder, image_size=self.image_size)
        if not found.has_masks:
            raise DataError(folder, "its images have no masks", "generate images in the segmentation form")
        if len(found) < size:
            raise DataError(folder, f"it holds {len(found)} images of {size}", f"set {split}_size={len(found)} or less")
        return found


@dataclass(frozen=True, kw_only=True)
class Stages(ContourSource):
    """Images of several sources, one source after the other: a lead-in, such as contours that grow longer.

    As the source itself of `ContourData` the stages would be shuffled into each other.

    Args:
        sources: at least one; their images have one shape.
        sizes: images of each source but the last, which gives the rest.

    Raises:
        ValueError: if the numbers of sources and sizes do not go together, or a size is below 1.
    """

    sources: list[ContourSource]
    sizes: list[int]

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.sources) - 1:
            raise ValueError(
                f"sizes must have one number for each source but the last, not {len(self.sizes)} for "
                f"{len(self.sources)} sources"
            )
        for size in self.sizes:
            count("sizes", size)

    def items(self, split: Split, size: int, seed: int) -> Items:
        """The stages in their order, cut off at ``size`` images."""
        parts: list[tuple[Items, int]] = []
        left = size
        for source, wanted in zip(self.sources, [*self.sizes, size], strict=True):
            if taken := min(wanted, left):
                parts.append((source.items(split, taken, seed), taken))
                left -= taken
        items, _ = parts.pop()
        for first, taken in reversed(parts):
            items = Followed(first, taken, items)
        return items


class ContourData(ResumableData):
    """Batches of contour images for `ContourTask`.

    The order of the training images and how each is turned over are a function of ``(seed, epoch)`` alone, so a run
    resumed from any checkpoint sees what an uninterrupted one would have seen, with another number of processes too.

    Args:
        source: where the images come from.
        batch_size: images of a batch of one process.
        train_size: images of an epoch, over all processes.
        val_size: images of the validation split.
        test_size: images of the test split, on which `predict` runs as well.
        lead_in: where the first training images come from instead: an easier task, such as shorter contours, from
            which `source` is then learnt sooner. In their order; of the shape of the others. None for none.
        lead_in_size: how many images those are, over all processes; where the first epoch has fewer, all of it.
        flips: turn training images over, left to right and top to bottom, with probability ½ each.
        workers: processes that make batches beside each training process; 0 makes them in it, None takes one fewer
            than this process may use cores, at most 8, and none where there are two cores or fewer.
        seed: of generated images, order and flips.

    Raises:
        ValueError: for values out of range, or a lead-in without a size or the reverse.
    """

    def __init__(
        self,
        source: ContourSource,
        *,
        batch_size: int = 32,
        train_size: int = 40_000,
        val_size: int = 1_000,
        test_size: int = 10_000,
        lead_in: ContourSource | None = None,
        lead_in_size: int = 0,
        flips: bool = True,
        workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in {
            "batch_size": batch_size,
            "train_size": train_size,
            "val_size": val_size,
            "test_size": test_size,
        }.items():
            count(name, value)
        if workers is not None:
            count("workers", workers, at_least=0)
        count("seed", seed, at_least=0)
        if batch_size > train_size:
            raise ValueError(f"batch_size must be at most train_size, not {batch_size} of {train_size} images")
        count("lead_in_size", lead_in_size, at_least=0)
        if (lead_in is None) != (lead_in_size == 0):
            raise ValueError(f"lead_in and lead_in_size go together; they are {lead_in!r} and {lead_in_size}")
        self.source, self.batch_size = source, batch_size
        self.lead_in, self.lead_in_size = lead_in, min(lead_in_size, train_size)
        self.sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        self.flips, self.seed = flips, seed
        self.workers = spare_cores() if workers is None else workers

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches, all of the same size."""
        return self.resumed(ResumableLoader(*self._parts("train"), drop_last=True, **self.loader_settings()))

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation split in order, each image once."""
        return self._ordered("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """The test split in order, each image once."""
        return self._ordered("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test split in order, each image once."""
        return self._ordered("test")

    def _ordered(self, split: Split) -> DataLoader[Any]:
        items, sampler = self._parts(split)
        return DataLoader(items, sampler=sampler, **self.loader_settings())

    def _parts(self, split: Split) -> tuple[Flipped, EpochSampler]:
        """A split and the share of it that this process takes."""
        training, size = split == "train", self.sizes[split]
        trainer = self.trainer
        items = self.source.items(split, size, self.seed)
        if training and self.lead_in is not None:
            first = self.lead_in.items(split, self.lead_in_size, self.seed)
            shapes = [tuple(each[0]["image"].shape) for each in (first, items)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"images of lead_in and source must have one shape, not {shapes[0]} and {shapes[1]}")
            items = Followed(items, size, first)
        sampler = EpochSampler(
            size,
            seed=self.seed,
            shuffle=training,
            flips=training and self.flips,
            lead_in=self.lead_in_size if training else 0,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )
        return Flipped(items), sampler


def spare_cores() -> int:
    """Processes that may make batches beside this one: none where there are two cores or fewer."""
    return min(cores() - 1, 8) if cores() > 2 else 0
