"""Panoptic data for training: where the images come from, how they are resized, batched and taken up again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from crbp._checks import count
from crbp.data.panoptic import Augment, Categories, CocoPanoptic, DataError, PanopticDataset, Resize, Target, collate
from crbp.data.panoptic import Key as ImageKey
from crbp.data.panoptic._looks import ALIKE, Looks
from crbp.data.panoptic.dataset import example, scene_truth
from crbp.data.panoptic.transforms import SHORTEST, Transform
from crbp.tasks._resume import ResumableData
from crbp.tasks.data import spare_cores
from crbp.tasks.panoptic_pictures import PanopticBatch, Pictures
from crbp.tasks.sampling import EpochSampler, ResumableLoader


class PanopticSource(ABC):
    """Where images come from. Implement both to train on images of your own."""

    @property
    @abstractmethod
    def categories(self) -> Categories:
        """The categories of all splits."""

    @abstractmethod
    def split(self, name: str, transform: Transform) -> PanopticDataset:
        """The images of ``"train"`` or ``"val"``."""


@dataclass(frozen=True, kw_only=True)
class CocoFiles:
    """One split of a data set in COCO's panoptic format; see `crbp.data.panoptic.CocoPanoptic`.

    Args:
        images: folder of the images.
        panoptic: the panoptic JSON.
        labels: folder of its PNGs; None for the one beside the JSON.
        instances: COCO's `instances_*.json`, where there is one.
        categories: a JSON of categories; None for those of the panoptic JSON.
    """

    images: str
    panoptic: str
    labels: str | None = None
    instances: str | None = None
    categories: str | None = None

    def dataset(self, transform: Transform, *, filter_empty: bool) -> CocoPanoptic:
        """The images; how many `filter_empty` leaves out is logged."""
        found = CocoPanoptic(
            self.images,
            self.panoptic,
            labels=self.labels,
            instances=self.instances,
            categories=self.categories,
            transform=transform,
            filter_empty=filter_empty,
        )
        if found.dropped:
            rank_zero_info(
                f"{self.panoptic}: {found.dropped} of {len(found) + found.dropped} images have no things and are left "
                "out; --data.source.filter_empty false keeps them"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class CocoSource(PanopticSource):
    """A data set in COCO's panoptic format, its splits one by one.

    Args:
        train: of training; None where there is none.
        val: of validation and test.
        filter_empty: in training leave out the images without an instance, crowds not counted, as detectron2 does.
    """

    val: CocoFiles
    train: CocoFiles | None = None
    filter_empty: bool = True

    @property
    def categories(self) -> Categories:
        """Those of the validation split."""
        return Categories.read(self.val.categories or self.val.panoptic)

    def split(self, name: str, transform: Transform) -> PanopticDataset:
        """The images of a split."""
        files = self.train if name == "train" else self.val
        if files is None:
            raise DataError("data.source", f"no files are given for the split {name!r}", f"set source.{name}")
        return files.dataset(transform, filter_empty=self.filter_empty and name == "train")


@dataclass(frozen=True, kw_only=True)
class Coco(PanopticSource):
    """COCO panoptic as it is unpacked, or a set that ``crbp generate shapes`` has written.

    Under ``root`` are the folders of images and, there or in ``annotations/``, ``panoptic_{name}.json``, the folder of
    PNGs of the same name and, where it is there, ``instances_{name}.json``.

    Args:
        root: folder of the data set.
        train: name of the training split.
        val: name of the validation split.
        filter_empty: in training leave out the images without an instance, crowds not counted, as detectron2 does.
    """

    root: str
    train: str = "train2017"
    val: str = "val2017"
    filter_empty: bool = True

    @property
    def categories(self) -> Categories:
        """Those of the validation split."""
        return Categories.read(self._files(self.val).panoptic)

    def split(self, name: str, transform: Transform) -> PanopticDataset:
        """The images of a split."""
        files = self._files(self.train if name == "train" else self.val)
        return files.dataset(transform, filter_empty=self.filter_empty and name == "train")

    def _files(self, name: str) -> CocoFiles:
        root = Path(self.root)
        for folder in (root / "annotations", root):
            panoptic, instances = folder / f"panoptic_{name}.json", folder / f"instances_{name}.json"
            if panoptic.exists():
                given = str(instances) if instances.exists() else None
                return CocoFiles(images=str(root / name), panoptic=str(panoptic), instances=given)
        raise DataError(
            root,
            f"there is neither annotations/panoptic_{name}.json nor panoptic_{name}.json",
            "unpack COCO's images, panoptic_annotations_trainval2017.zip and the zip files in it there",
        )


@dataclass(frozen=True, kw_only=True)
class GeneratedShapes(PanopticSource):
    """Shapes made on the fly; see `crbp.data.panoptic.Shapes`.

    Args:
        size: height and width in pixels.
        train: images of training.
        val: images of validation and test.
        objects: least and most things of an image.
        looks: of things: ``"textured"``, ``"plain"`` or ``"coloured"``.
        zoom: how many times as large everything is, 1 to 2.
        alike: share of things laid over one that looks the same, 0 to 0.75; see `crbp.data.panoptic.Shapes`.
        seed: another seed gives other images.
    """

    size: int = 192
    train: int = 8_000
    val: int = 500
    objects: tuple[int, int] = (6, 14)
    looks: Looks = "textured"
    zoom: float = 1.0
    alike: float = ALIKE
    seed: int = 0

    @property
    def categories(self) -> Categories:
        """Ten classes of things, six of stuff."""
        from crbp.data.panoptic.shapes import CATEGORIES

        return CATEGORIES

    def split(self, name: str, transform: Transform) -> PanopticDataset:
        """The images of a split."""
        from crbp.data.panoptic import Shapes

        images = self.train if name == "train" else self.val
        split: Any = name
        return Shapes(
            self.size,
            split=split,
            images=images,
            objects=self.objects,
            looks=self.looks,
            zoom=self.zoom,
            alike=self.alike,
            seed=self.seed,
            transform=transform,
        )


class PanopticData(ResumableData):
    """Batches of panoptic images for `PanopticTask`.

    The order of the training images, their sizes and flips are a function of ``(seed, epoch)`` alone, so a run resumed
    from any checkpoint sees what an uninterrupted one would have seen, with another number of processes too. Files are
    looked for and the JSON is checked before training starts; ``crbp data check`` looks into the files as well.

    Args:
        source: where the images come from.
        batch_size: images of a batch of one process.
        val_size: images of validation and test, the first ones; None for all.
        shortest: sizes in pixels from which that of the shorter side is drawn in training.
        shortest_test: the same in evaluation.
        longest: limit of the longer side.
        flips: swap left and right of training images with probability ½.
        predict: an image, or a folder of images, to predict; None for those of validation.
        predict_list: a JSON whose ``images`` tell which files of that folder are meant and the number of each, such as
            COCO's `image_info_test-dev2017.json`; None for all, numbered in the order of their names.
        workers: processes that make batches beside each training process; 0 makes them in it, None takes one fewer
            than this process may use cores, at most 8, and none where there are two cores or fewer.
        seed: of order, sizes and flips.

    Raises:
        ValueError: for values out of range.
        DataError: if files are missing or wrong.
    """

    def __init__(
        self,
        source: PanopticSource,
        *,
        batch_size: int = 2,
        val_size: int | None = None,
        shortest: tuple[int, ...] = SHORTEST,
        shortest_test: int = 800,
        longest: int = 1333,
        flips: bool = True,
        predict: str | None = None,
        predict_list: str | None = None,
        workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        count("batch_size", batch_size)
        if predict_list is not None and predict is None:
            raise ValueError(f"predict_list={predict_list!r} lists files of a folder; give predict, the folder")
        if val_size is not None:
            count("val_size", val_size)
        if workers is not None:
            count("workers", workers, at_least=0)
        self.source, self.batch_size, self.val_size, self.seed = source, batch_size, val_size, seed
        self.augment = Augment(shortest=tuple(shortest), longest=longest, flip=0.5 if flips else 0.0, seed=seed)
        self.resize = Resize(shortest=shortest_test, longest=longest)
        self.predict = None if predict is None else Path(predict)
        self.predict_list = None if predict_list is None else Path(predict_list)
        self.workers = spare_cores() if workers is None else workers

    @property
    def categories(self) -> Categories:
        """The categories of the source."""
        return self.source.categories

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches."""
        items = self.source.split("train", self.augment)
        if items.categories.as_json() != self.categories.as_json():
            raise DataError("data.source", "training and validation have other categories", "give both the same list")
        sampler = self._sampler(len(items), training=True)
        if len(sampler) < self.batch_size:
            raise DataError(
                "data.source", f"{len(items)} training images make no batch of {self.batch_size}", "lower batch_size"
            )
        loader = ResumableLoader(items, sampler, collate_fn=_together, drop_last=True, **self.loader_settings())
        return self.resumed(loader)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation split in order, each image once, one at a time."""
        items = self.source.split("val", self.resize)
        size = len(items) if self.val_size is None else min(self.val_size, len(items))
        return self._ordered(_Told(items), size)

    def test_dataloader(self) -> DataLoader[Any]:
        """The validation split in order: the labels of COCO's test split are not public."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """The images to predict in order."""
        if self.predict is None:
            return self.val_dataloader()
        items = Pictures(self.predict, self.resize, self.predict_list)
        return self._ordered(items, len(items))

    def _ordered(self, items: Dataset[Any], size: int) -> DataLoader[Any]:
        # One image at a time: padding to a batch's largest image would cost more than the batch saves.
        settings = {**self.loader_settings(), "batch_size": 1}
        return DataLoader(items, sampler=self._sampler(size, training=False), collate_fn=_only, **settings)

    def _sampler(self, size: int, *, training: bool) -> ImageSampler:
        trainer = self.trainer
        return ImageSampler(
            size,
            seed=self.seed,
            shuffle=training,
            flips=False,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )


class ImageSampler(EpochSampler):
    """The order of `EpochSampler`; each image is asked for together with the epoch, on which size and flip depend."""

    def __iter__(self) -> Iterator[Any]:
        """The share of this process in the current epoch."""
        for key in super().__iter__():
            yield ImageKey(key.item, self.epoch)


class _Told(Dataset[PanopticBatch]):
    """Images with what is true of them at their own size."""

    def __init__(self, items: PanopticDataset) -> None:
        self.items = items

    def __getitem__(self, key: int | ImageKey) -> PanopticBatch:
        index = key[0] if isinstance(key, tuple) else key
        scene = self.items.scene(index)
        view = self.items.transform.view(*scene.places.shape, epoch=0, index=index)
        image, target = example(scene, view, self.items.categories)
        return PanopticBatch([image], [target], truths=[scene_truth(scene)])


def _together(examples: Sequence[tuple[Tensor, Target]]) -> PanopticBatch:
    images, targets = collate(examples)
    return PanopticBatch(images, list(targets))


def _only(batches: Sequence[PanopticBatch]) -> PanopticBatch:
    (batch,) = batches
    return batch
