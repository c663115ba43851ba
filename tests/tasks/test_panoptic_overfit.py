"""Both panoptic networks learn two images by heart, from files to panoptic quality."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from tiny_contours import LEAF_SPEC

from crbp.cli import main

pytestmark = [
    pytest.mark.filterwarnings(LEAF_SPEC),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
    # The two images are one batch.
    pytest.mark.filterwarnings("ignore:The number of training batches .1. is smaller than the logging interval"),
]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["fpn", "rfpn"])
def test_two_images_are_learnt_by_heart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_script: Callable[[str], ModuleType], model: str
) -> None:
    shapes, out = tmp_path / "shapes", tmp_path / "overfit.json"
    looks = ["--looks", "coloured", "--zoom", "1.6", "--objects", "3,5"]
    assert main(["generate", "shapes", "--images", "2,1", "--size", "128", *looks, "--out", str(shapes)]) == 0
    data = [str(shapes / name) for name in ("train", "panoptic_train.json", "categories.json")]
    settings = ["--model", model, "--size", "128", "--steps", "150", "--out", str(out)]
    script = load_script("benchmarks/panoptic_overfit.py")
    monkeypatch.setattr("sys.argv", ["panoptic_overfit.py", *data, *settings])
    script.main()
    (found,) = json.loads(out.read_text())
    # Masks that fill their boxes, all else as it is, have a PQ of .65, .33 of things, and a mask AP of .18.
    assert found["pq"] > 0.7
    assert found["pq_things"] > 0.5
    assert found["pq_stuff"] > 0.9
    assert found["mask_ap"] > 0.4
