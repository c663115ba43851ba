"""Batches of images, and images without labels to predict: a file, a folder, or what a list names of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from crbp.data._foreign import leads_out, read_json, shown
from crbp.data.panoptic import DataError
from crbp.data.panoptic import Key as ImageKey
from crbp.data.panoptic.formats import read_image
from crbp.data.panoptic.records import missing
from crbp.data.panoptic.transforms import Transform, view_image
from crbp.errors import SettingsError

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
Truth = tuple[Tensor, list[dict[str, Any]]]


class PanopticBatch(NamedTuple):
    """Images, and what is known of them.

    Attributes:
        images: uint8 RGB ``(3, H, W)`` each.
        targets: of training, as `crbp.models.PanopticFPN` takes them; of images without labels ``image_id`` and
            ``size`` alone.
        truths: in validation and test the map and segments of each image before it was resized.
        files: of the images to predict.
    """

    images: list[Tensor]
    targets: list[Any]
    truths: list[Truth] | None = None
    files: list[Path] | None = None


class Pictures(Dataset[PanopticBatch]):
    """Images without labels: a file, all of a folder in the order of their names, or those of a list.

    Raises:
        DataError: if there are none, one is missing or cannot be read, the list is not one, or two would have a
            prediction of the same name.
    """

    def __init__(self, path: Path, transform: Transform, listing: Path | None = None) -> None:
        self.transform = transform
        self.image_ids: Sequence[int] | None = None
        if listing is not None:
            self.files, self.image_ids = _listed(path, listing)
        elif path.is_dir():
            self.files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            if not self.files:
                raise DataError(path, "it holds no image", f"give a folder of {', '.join(sorted(SUFFIXES))}")
        elif path.is_file():
            self.files = [path]
        else:
            raise DataError(path, "there is no such file or folder", "give an image or a folder of images")
        names = Counter(file.stem for file in self.files)
        if twice := next((name for name in names if names[name] > 1), None):
            raise DataError(path, f"two images are called {twice}, and so would be what is written", "rename one")
        if name := next((name for name in names if f"{name}_panoptic" in names), None):
            what = f"the map of {name} and the picture of {name}_panoptic would both be {name}_panoptic.png"
            raise DataError(path, what, "rename one")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int | ImageKey) -> PanopticBatch:
        """The image at a place, resized, by itself."""
        index = key[0] if isinstance(key, tuple) else key
        picture = read_image(self.files[index])
        view = self.transform.view(picture.height, picture.width, epoch=0, index=index)
        image = torch.from_numpy(view_image(picture, view)).permute(2, 0, 1).contiguous()
        image_id = index + 1 if self.image_ids is None else self.image_ids[index]
        target = {"image_id": image_id, "size": (picture.height, picture.width)}
        return PanopticBatch([image], [target], files=[self.files[index]])


def check_apart(folder: Path, pictures: Path | None) -> None:
    """Raise SettingsError if what is written to a folder could take the place of the pictures to predict."""
    if pictures is not None and folder.resolve() in (pictures.resolve(), pictures.resolve().parent):
        raise SettingsError(f"{folder} holds the pictures, which would be written over; give another folder")


def _listed(folder: Path, listing: Path) -> tuple[list[Path], list[int]]:
    """The files of a folder that a list names, and their numbers, in its order.

    Raises:
        DataError: if there is no such folder, it is no such list, or the list names a number twice or what is no file
            of the folder.
    """
    if not folder.is_dir():
        raise DataError(folder, f"there is no such folder, of which {listing} lists images", "give their folder")
    remedy = "give a JSON with images of file_name and id, such as COCO's image_info_test-dev2017.json"
    content = read_json(listing, remedy)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images:
        raise DataError(listing, "it lists no images", remedy)
    found: dict[int, str] = {}
    for each in images:
        name, number = (each.get("file_name"), each.get("id")) if isinstance(each, dict) else (None, None)
        if not isinstance(name, str) or leads_out(name) or type(number) is not int or number < 0:
            raise DataError(listing, f"{shown(each)} has no file_name in the folder and id", remedy)
        if number in found:
            raise DataError(listing, f"two images have the id {number}", remedy)
        found[number] = name
    numbers, names = list(found), list(found.values())
    if absent := missing(folder, names):
        more = f", the first of {len(absent)}" if len(absent) > 1 else ""
        what = f"the image {numbers[absent[0]]} that {listing} lists is missing{more}"
        raise DataError(folder / names[absent[0]], what, "give the folder that holds it")
    return [folder / name for name in names], numbers
