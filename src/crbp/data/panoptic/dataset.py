"""What every panoptic data set gives: an image and its targets, derived from a map of segments on the fly."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from crbp._semantic import IGNORE
from crbp.data.panoptic.categories import Categories
from crbp.data.panoptic.formats import run_lengths
from crbp.data.panoptic.transforms import Keep, Transform, View, view_image, view_labels


class Target(TypedDict):
    """What a network learns of one image, after its resize and flip.

    Attributes:
        boxes: float32 ``(n, 4)`` of x0, y0, x1, y1 in pixels, around the pixels of a mask: x1 is its last column + 1.
        labels: int64 ``(n,)``, contiguous thing labels.
        masks: bool ``(n, H, W)``. Crowds are not among the instances.
        semantic: int64 ``(H, W)``: 0 on things, crowds included, 1 … S on stuff, 255 on void.
        image_id: the image's number in its data set.
        size: height and width of the image before it was resized.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor
    semantic: Tensor
    image_id: int
    size: tuple[int, int]


Example = tuple[Tensor, Target]


class Key(NamedTuple):
    """Which image is asked for, and in which epoch, on which its resize and flip depend."""

    item: int
    epoch: int = 0


class Scene(NamedTuple):
    """One image with its segments, before it is resized.

    `places` is ``(H, W)``, uint8 or int32: 0 on void, ``k`` on the segment of row ``k − 1`` of the other arrays.
    """

    image_id: int
    image: Image.Image
    places: NDArray[Any]
    ids: NDArray[np.int32]
    category_ids: NDArray[np.int32]
    crowd: NDArray[np.bool_]


class PanopticDataset(Dataset[Example]):
    """A map-style data set of ``(image, target)``: image uint8 ``(3, H, W)`` RGB, and a `Target`.

    An item is asked for by its place, or by a `Key` where resize and flip depend on the epoch.

    Args:
        categories: of the segments.
        transform: chooses size and flip of each image; None keeps every image as it is.
    """

    def __init__(self, categories: Categories, transform: Transform | None) -> None:
        self.categories = categories
        self.transform: Transform = Keep() if transform is None else transform

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def scene(self, index: int) -> Scene:
        """The image at a place with its segments, before it is resized."""

    def __getitem__(self, key: int | Key) -> Example:
        """The image and target at a place, resized and flipped."""
        place, epoch = key if isinstance(key, tuple) else (key, 0)
        index = self.resolve(place)
        scene = self.scene(index)
        view = self.transform.view(*scene.places.shape, epoch=epoch, index=index)
        return example(scene, view, self.categories)

    def panoptic(self, index: int) -> tuple[Tensor, list[dict[str, Any]]]:
        """The ground truth of an image before it is resized, as the metric takes it.

        Returns:
            The segment numbers int32 ``(H, W)``, 0 on void, and the list of segments, each a dict of ``id``,
            ``category_id``, ``iscrowd``, ``area`` in pixels and ``bbox`` (x, y, width, height).
        """
        return scene_truth(self.scene(self.resolve(index)))

    def resolve(self, index: int) -> int:
        """A place counted from the front; raises IndexError where there is none."""
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index {index} is out of range for {size} images")
        return int(index) % size


def collate(examples: Sequence[Example]) -> tuple[list[Tensor], list[Target]]:
    """Images and targets of a batch as two lists, since images differ in size."""
    return [image for image, _ in examples], [target for _, target in examples]


def example(scene: Scene, view: View, categories: Categories) -> Example:
    """A scene as a view shows it, and its target; instances that lose all pixels in it are left out."""
    image = torch.from_numpy(view_image(scene.image, view)).permute(2, 0, 1).contiguous()
    places = view_labels(scene.places, view)
    things, semantic = categories.labels(scene.category_ids)
    table = torch.from_numpy(np.concatenate([[IGNORE], semantic]))
    instances = np.flatnonzero((things >= 0) & ~scene.crowd)
    masks = places[None] == (instances + 1).astype(places.dtype)[:, None, None]
    boxes, seen = mask_boxes(masks)
    target: Target = {
        "boxes": torch.from_numpy(boxes[seen]),
        "labels": torch.from_numpy(things[instances[seen]]),
        "masks": torch.from_numpy(masks if seen.all() else masks[seen]),
        "semantic": table[torch.from_numpy(places.astype(np.int64))],
        "image_id": scene.image_id,
        "size": (scene.places.shape[0], scene.places.shape[1]),
    }
    return image, target


def mask_boxes(masks: NDArray[np.bool_]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The boxes ``(n, 4)`` around masks ``(n, H, W)``, and which masks have any pixel, ``(n,)``."""
    columns, rows = (np.asarray(masks.any(axis=axis), np.bool_) for axis in (1, 2))
    seen = np.asarray(rows.any(axis=1), np.bool_)
    if not masks.size:
        return np.zeros((len(masks), 4), np.float32), seen
    first = [columns.argmax(axis=1), rows.argmax(axis=1)]
    last = [each.shape[1] - each[:, ::-1].argmax(axis=1) for each in (columns, rows)]
    boxes = np.stack([*first, *last], axis=1).astype(np.float32)
    return np.where(seen[:, None], boxes, np.float32(0)), seen


def scene_truth(scene: Scene) -> tuple[Tensor, list[dict[str, Any]]]:
    """The segment numbers int32 ``(H, W)`` of a scene, 0 on void, and its segments as the JSON lists them."""
    numbers = np.concatenate([np.zeros(1, np.int32), scene.ids])
    return torch.from_numpy(numbers[scene.places]), segments_info(scene)


def segments_info(scene: Scene) -> list[dict[str, Any]]:
    """The segments of a scene as the JSON lists them, measured on their pixels."""
    boxes, areas = measure(scene.places, len(scene.ids))
    return [
        {
            "id": int(scene.ids[k]),
            "category_id": int(scene.category_ids[k]),
            "iscrowd": int(scene.crowd[k]),
            "area": int(areas[k]),
            "bbox": boxes[k].tolist(),
        }
        for k in range(len(scene.ids))
    ]


def measure(places: NDArray[Any], segments: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Boxes (x, y, width, height) ``(n, 4)`` and areas ``(n,)`` of the segments ``1 … n`` of a map ``(H, W)``."""
    areas = np.bincount(places.ravel(), minlength=segments + 1)[1:]
    boxes = np.zeros((segments, 4), np.int64)
    for k in np.flatnonzero(areas):
        mask = places == k + 1
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        boxes[k] = columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1
    return boxes, areas


def instance_annotations(scene: Scene, categories: Categories, *, first_id: int) -> list[dict[str, Any]]:
    """The things of a scene as annotations of a COCO `instances_*.json`, numbered from `first_id`, at least 1.

    Numbers start at 1 since the official evaluator takes 0 for "no match".
    """
    found: list[dict[str, Any]] = []
    for k, info in enumerate(segments_info(scene), start=1):
        if categories.isthing(info["category_id"]):
            mask = run_lengths(scene.places == k)
            found.append({**info, "id": first_id + len(found), "image_id": scene.image_id, "segmentation": mask})
    return found
