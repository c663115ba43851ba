"""A panoptic set of a few pixels, every number of which is known, to read, to check and to break."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crbp.data.panoptic import rgb_from_ids

CATEGORIES = [
    {"id": 7, "name": "cat", "isthing": 1, "color": [200, 10, 10]},
    {"id": 90, "name": "sky", "isthing": 0, "color": [10, 10, 200]},
    {"id": 3, "name": "dog", "isthing": 1, "color": [10, 200, 10]},
    {"id": 91, "name": "sea", "isthing": 0, "color": [10, 100, 200]},
]
# Two cats, a crowd of dogs, sky and sea; the last row is void. 70000 needs all three bytes.
IDS = np.array(
    [
        [70000, 70000, 90, 90, 90, 90],
        [70000, 70000, 90, 5, 5, 90],
        [300, 300, 300, 5, 5, 91],
        [0, 0, 0, 0, 0, 0],
    ]
)
SEGMENTS = [
    {"id": 70000, "category_id": 7, "iscrowd": 0, "area": 4, "bbox": [0, 0, 2, 2]},
    {"id": 90, "category_id": 90, "iscrowd": 0, "area": 6, "bbox": [2, 0, 4, 2]},
    {"id": 5, "category_id": 7, "iscrowd": 0, "area": 4, "bbox": [3, 1, 2, 2]},
    {"id": 300, "category_id": 3, "iscrowd": 1, "area": 3, "bbox": [0, 2, 3, 1]},
    {"id": 91, "category_id": 91, "iscrowd": 0, "area": 1, "bbox": [5, 2, 1, 1]},
]
SKY = np.full((3, 5), 90)  # the second image: sky alone


def write(root: Path, content: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write the set under a folder and return the content of its JSON."""
    sky = {"id": 90, "category_id": 90, "iscrowd": 0, "area": 15, "bbox": [0, 0, 5, 3]}
    made: dict[str, Any] = {
        "images": [
            {"id": 11, "file_name": "a.png", "height": 4, "width": 6},
            {"id": 12, "file_name": "b.png", "height": 3, "width": 5},
        ],
        "annotations": [
            {"image_id": 11, "file_name": "a.png", "segments_info": SEGMENTS},
            {"image_id": 12, "file_name": "b.png", "segments_info": [sky]},
        ],
        "categories": CATEGORIES,
    }
    made = json.loads(json.dumps(made))
    for folder in ("images", "panoptic"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, ids in (("a", IDS), ("b", SKY)):
        colours = np.stack([ids % 251, ids % 241, ids % 239], axis=-1).astype(np.uint8)
        Image.fromarray(colours).save(root / "images" / f"{name}.png")
        Image.fromarray(rgb_from_ids(ids)).save(root / "panoptic" / f"{name}.png")
    save(root, made)
    return made


def save(root: Path, content: dict[str, Any]) -> None:
    """Write the JSON of the set."""
    (root / "panoptic.json").write_text(json.dumps(content), encoding="utf-8")
