"""Panoptic segmentation: COCO's format read, checked and turned into targets, and a synthetic set in it."""

from typing import TYPE_CHECKING, Any

from crbp.data._extras import require

require("numpy", "PIL")

from crbp.data.errors import DataError  # noqa: E402
from crbp.data.panoptic.categories import IGNORE, Categories, Category  # noqa: E402
from crbp.data.panoptic.dataset import Example, Key, PanopticDataset, Scene, Target, collate  # noqa: E402
from crbp.data.panoptic.formats import ids_from_rgb, png, read_ids, read_image, rgb_from_ids, run_lengths  # noqa: E402
from crbp.data.panoptic.reader import CocoPanoptic  # noqa: E402
from crbp.data.panoptic.records import Finding  # noqa: E402
from crbp.data.panoptic.transforms import Augment, Keep, Resize, Transform, View, shortest_edge  # noqa: E402
