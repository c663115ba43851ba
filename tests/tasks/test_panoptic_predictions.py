"""What is written of panoptic predictions: the map, its segments as the data set names them, and a picture of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_contours import LEAF_SPEC
from tiny_shapes import SHAPES, tiny_data, trainer, true_result

from crbp.data.errors import DataError
from crbp.data.panoptic import CocoPanoptic, ids_from_rgb, write_shapes
from crbp.errors import SettingsError
from crbp.models.panoptic import PanopticResult
from crbp.tasks import PanopticTask

pytestmark = pytest.mark.filterwarnings(LEAF_SPEC)

PURPLE = (120, 40, 200)


class Answering(torch.nn.Module):
    """Stands in for the network in `PanopticTask`: gives known results, one after the other."""

    things, stuff = 10, 6

    def __init__(self, results: list[PanopticResult]) -> None:
        super().__init__()
        self.results = results

    def forward(self, images: Any, sizes: Any) -> list[PanopticResult]:
        found = self.results.pop(0)
        assert [tuple(found.panoptic.shape)] == sizes
        return [found]


def known(height: int, width: int) -> PanopticResult:
    """A star, a disc and stripes, with void between them."""
    ids = torch.zeros(height, width, dtype=torch.int32)
    ids[2:20, 3:30], ids[30:40, 5:12], ids[50:] = 1, 2, 70_000
    segments: list[dict[str, Any]] = [
        {"id": 1, "label": 3, "isthing": True, "score": 0.75, "area": 18 * 27, "instance": 0},
        {"id": 2, "label": 0, "isthing": True, "score": 0.5, "area": 10 * 7, "instance": 1},
        {"id": 70_000, "label": 2, "isthing": False, "area": (height - 50) * width},
    ]
    none = torch.zeros(0)
    return PanopticResult(panoptic=ids, segments=segments, boxes=none, scores=none, labels=none, masks=none)


def predict(results: list[PanopticResult], folder: Path, *, official: str | None = None, **settings: Any) -> None:
    """Write results into the folder `out` as `crbp predict` does, and in the official form."""
    task = PanopticTask(Answering(results), results=official)  # type: ignore[arg-type]
    fit = trainer(folder, callbacks=[task.prediction_writer(str(folder / "out"))])
    fit.predict(task, tiny_data(**settings), return_predictions=False)


def ids_of(path: Path) -> Any:
    with Image.open(path) as picture:
        assert picture.mode == "RGB"
        return ids_from_rgb(np.asarray(picture))


def test_predictions_of_pictures_are_written(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, size in (("b.png", (90, 70)), ("a.jpg", (64, 80))):
        Image.new("RGB", size, PURPLE).save(pictures / name)
    predict([known(80, 64), known(70, 90)], tmp_path, predict=str(pictures))
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == {
        f"{name}{end}" for name in "ab" for end in (".png", "_panoptic.png", ".json")
    }
    for name, height, width in (("a", 80, 64), ("b", 70, 90)):
        assert json.loads((out / f"{name}.json").read_text(encoding="utf-8")) == {
            "height": height,
            "width": width,
            "segments_info": [
                {"id": 1, "category_id": 4, "name": "star", "score": 0.75, "area": 486},
                {"id": 2, "category_id": 1, "name": "disc", "score": 0.5, "area": 70},
                {"id": 70_000, "category_id": 12, "name": "stripes", "area": (height - 50) * width},
            ],
        }
        assert np.array_equal(ids_of(out / f"{name}_panoptic.png"), known(height, width).panoptic)


def test_the_overlay_is_the_picture_at_its_size_under_colours_of_the_classes(tmp_path: Path) -> None:
    photograph = np.random.default_rng(0).integers(0, 256, (480, 500, 3), dtype=np.uint8)
    photograph[5, 6] = PURPLE
    Image.fromarray(photograph).save(tmp_path / "picture.png")
    predict([known(480, 500)], tmp_path, predict=str(tmp_path / "picture.png"))
    with Image.open(tmp_path / "out" / "picture.png") as picture:
        assert picture.width == 500
        assert picture.height > 480  # the legend is below
        shown = np.asarray(picture)
    uncovered = np.asarray(known(480, 500).panoptic == 0)
    assert (shown[:480] == photograph)[uncovered].all()  # pixel by pixel, though the network sees it much smaller
    star = [round((a + b) / 2) for a, b in zip(PURPLE, SHAPES.categories.colour(4), strict=True)]
    assert shown[5, 6].tolist() == star


def test_predictions_of_the_data_are_named_by_the_numbers_of_its_images(tmp_path: Path) -> None:
    data = tiny_data()
    truths = [batch.truths[0] for batch in data.val_dataloader()]
    predict([true_result(truth, data.categories) for truth in truths], tmp_path)
    write_shapes(tmp_path / "set", images=(1, 3), size=128, workers=1, progress=False)
    written = CocoPanoptic(tmp_path / "set" / "val", tmp_path / "set" / "panoptic_val.json")
    told = json.loads((tmp_path / "set" / "panoptic_val.json").read_text(encoding="utf-8"))
    for number, annotation in zip(written.image_ids.tolist(), told["annotations"], strict=True):
        found = json.loads((tmp_path / "out" / f"{number:012d}.json").read_text(encoding="utf-8"))["segments_info"]
        wanted = [each for each in annotation["segments_info"] if not each["iscrowd"]]
        assert [(each["id"], each["category_id"], each["area"]) for each in found] == [
            (each["id"], each["category_id"], each["area"]) for each in wanted
        ]
        ids = ids_of(tmp_path / "out" / f"{number:012d}_panoptic.png")
        assert {each["id"]: each["area"] for each in found} == dict(
            zip(*(each.tolist() for each in np.unique(ids[ids > 0], return_counts=True)), strict=True)
        )


def test_listed_pictures_are_written_in_the_official_form_as_well(tmp_path: Path) -> None:
    """As for a test split whose labels are not public: of a folder of images those that a JSON lists."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, size in (("a.jpg", (64, 80)), ("b.jpg", (40, 40)), ("c.jpg", (90, 70))):
        Image.new("RGB", size, PURPLE).save(pictures / name)
    listing, official = tmp_path / "image_info.json", tmp_path / "mine.json"
    listing.write_text(json.dumps({"images": [{"id": 70, "file_name": "c.jpg"}, {"id": 3, "file_name": "a.jpg"}]}))
    results = [known(70, 90), known(80, 64)]
    predict(results, tmp_path, official=str(official), predict=str(pictures), predict_list=str(listing))
    assert {file.stem for file in (tmp_path / "out").glob("*.json")} == {"a", "c"}
    found = json.loads(official.read_text())["annotations"]
    assert [(each["image_id"], each["file_name"]) for each in found] == [
        (70, "000000000070.png"),
        (3, "000000000003.png"),
    ]
    for each, shown in zip(found, (known(70, 90), known(80, 64)), strict=True):
        assert (ids_of(tmp_path / "mine" / each["file_name"]) == shown.panoptic.numpy()).all()
        things, stuff = SHAPES.categories.things, SHAPES.categories.stuff
        assert [part["category_id"] for part in each["segments_info"]] == [things[3], things[0], stuff[1]]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "lists no images"),
        ([], "lists no images"),
        ([{"file_name": "a.png"}], "no file_name in the folder and id"),
        ([{"file_name": "../a.png", "id": 1}], "no file_name in the folder and id"),
        ([{"file_name": "a.png", "id": True}], "no file_name in the folder and id"),
        ([{"file_name": "a.png", "id": 1}, {"file_name": "b.png", "id": 1}], "two images have the id 1"),
        ([{"file_name": "a.png", "id": 1}, {"file_name": "a.png", "id": 2}], "two images are called a"),
        ([{"file_name": "a.png", "id": 1}, {"file_name": "b.png", "id": 8}], "the image 8 that .* lists is missing"),
    ],
)
def test_a_list_that_does_not_fit_is_named(images: Any, message: str, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    listing = tmp_path / "image_info.json"
    listing.write_text(json.dumps({"images": images}))
    with pytest.raises(DataError, match=message):
        tiny_data(predict=str(tmp_path), predict_list=str(listing)).predict_dataloader()


def test_a_list_needs_its_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no such folder, of which .* lists images"):
        tiny_data(predict=str(tmp_path / "none"), predict_list=str(tmp_path / "image_info.json")).predict_dataloader()
    with pytest.raises(ValueError, match="give predict, the folder"):
        tiny_data(predict_list="image_info.json")


def test_results_do_not_take_the_place_of_pictures(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (64, 80), PURPLE).save(pictures / "000000000001.png")
    with pytest.raises(SettingsError, match="holds the pictures"):
        predict([known(80, 64)], tmp_path, official=str(tmp_path / "pictures.json"), predict=str(pictures))
    listing = tmp_path / "mine.json"
    listing.write_text(json.dumps({"images": [{"id": 1, "file_name": "000000000001.png"}]}))
    with pytest.raises(SettingsError, match="is the list of the pictures"):
        predict([known(80, 64)], tmp_path, official=str(listing), predict=str(pictures), predict_list=str(listing))


def test_results_of_a_prediction_that_failed_do_not_come_back(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (64, 80), PURPLE).save(pictures / "a.png")
    (pictures / "b.png").write_bytes(b"no picture")
    task = PanopticTask(Answering([known(80, 64)] * 3), results=str(tmp_path / "mine.json"))  # type: ignore[arg-type]
    with pytest.raises(DataError):
        trainer(tmp_path).predict(task, tiny_data(predict=str(pictures)), return_predictions=False)
    assert not (tmp_path / "mine.json").exists()
    Image.new("RGB", (64, 80), PURPLE).save(pictures / "b.png")
    trainer(tmp_path).predict(task, tiny_data(predict=str(pictures)), return_predictions=False)
    assert len(json.loads((tmp_path / "mine.json").read_text())["annotations"]) == 2
