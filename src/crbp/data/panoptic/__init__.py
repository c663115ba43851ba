"""Panoptic segmentation: COCO's format read, checked and turned into targets, and a synthetic set in it."""

from typing import TYPE_CHECKING, Any

from crbp.data._extras import require

require("numpy", "PIL")

from crbp._semantic import IGNORE, THINGS  # noqa: E402
from crbp.data.errors import DataError  # noqa: E402
from crbp.data.panoptic.categories import Categories, Category  # noqa: E402
from crbp.data.panoptic.check import Report, Statistics, check  # noqa: E402
from crbp.data.panoptic.dataset import (  # noqa: E402
    Example,
    Key,
    PanopticDataset,
    Scene,
    Target,
    collate,
    instance_annotations,
    segments_info,
)
from crbp.data.panoptic.formats import ids_from_rgb, png, read_ids, read_image, rgb_from_ids, run_lengths  # noqa: E402
from crbp.data.panoptic.reader import CocoPanoptic  # noqa: E402
from crbp.data.panoptic.records import Finding  # noqa: E402
from crbp.data.panoptic.transforms import Augment, Keep, Resize, Transform, View, shortest_edge  # noqa: E402

if TYPE_CHECKING:
    from crbp.data.panoptic.shapes import Shapes
    from crbp.data.panoptic.writer import write_shapes

__all__ = [
    "IGNORE",
    "THINGS",
    "Augment",
    "Categories",
    "Category",
    "CocoPanoptic",
    "DataError",
    "Example",
    "Finding",
    "Keep",
    "Key",
    "PanopticDataset",
    "Report",
    "Resize",
    "Scene",
    "Shapes",
    "Statistics",
    "Target",
    "Transform",
    "View",
    "check",
    "collate",
    "ids_from_rgb",
    "instance_annotations",
    "png",
    "read_ids",
    "read_image",
    "rgb_from_ids",
    "run_lengths",
    "segments_info",
    "shortest_edge",
    "write_shapes",
]


def __getattr__(name: str) -> Any:
    if name == "Shapes":  # numba, which reading does without, takes a second to import
        from crbp.data.panoptic.shapes import Shapes

        return Shapes
    if name == "write_shapes":
        from crbp.data.panoptic.writer import write_shapes

        return write_shapes
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
