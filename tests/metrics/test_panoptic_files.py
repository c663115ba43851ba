from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import official
import pytest
import torch
from official import Case
from panopticapi.evaluation import pq_compute_single_core
from panopticapi.utils import rgb2id
from PIL import Image

from crbp.data.errors import DataError
from crbp.metrics import PanopticQuality, PanopticWriter, evaluate_panoptic_files

KINDS = official.categories()


def write(folder: Path, count: int = 6) -> tuple[list[Case], Path, Path]:
    """Random cases as files, the predictions by our writer; the JSON of the truth and of the predictions."""
    rng = np.random.default_rng(8)
    cases = [official.random_case(rng, KINDS) for _ in range(count)]
    truth, found = folder / "truth.json", folder / "found.json"
    official.evaluate(cases, KINDS, folder)
    (folder / "gt").rename(folder / "truth")
    annotations = [
        {"image_id": number, "file_name": f"{number}.png", "segments_info": case.target_segments}
        for number, case in enumerate(cases)
    ]
    truth.write_text(json.dumps({"annotations": annotations, "categories": KINDS}))
    with PanopticWriter(found) as writer:
        for number in reversed(range(count)):  # not in the order of the truth
            writer.write(number, torch.from_numpy(cases[number].pred_map), cases[number].pred_segments)
    return cases, truth, found


def test_files_give_what_the_official_tool_says_of_them_and_what_memory_gives(tmp_path: Path) -> None:
    cases, truth, found = write(tmp_path)
    ours = evaluate_panoptic_files(truth, None, found, None)
    by_id = {entry["image_id"]: entry for entry in json.loads(found.read_text())["annotations"]}
    pairs = [(entry, by_id[entry["image_id"]]) for entry in json.loads(truth.read_text())["annotations"]]
    with contextlib.redirect_stdout(io.StringIO()):
        counted = pq_compute_single_core(
            0, pairs, str(tmp_path / "truth"), str(tmp_path / "found"), {kind["id"]: kind for kind in KINDS}
        )
    expected = official.averages(counted, KINDS)
    assert {name: ours[name] for name in expected if name != "per_class"} == pytest.approx(
        {name: value for name, value in expected.items() if name != "per_class"}, abs=1e-9, rel=0
    )
    metric = PanopticQuality(KINDS)
    for case in cases:
        metric.update(*case)
    assert ours == metric.compute()
    assert ours["n"] > 2
    assert evaluate_panoptic_files(truth, tmp_path / "truth", found, tmp_path / "found", workers=1) == ours


def test_what_is_written(tmp_path: Path) -> None:
    ids = np.array([[0, 1], [2**24 - 1, 1]], np.int64)
    segments = [{"id": 1, "category_id": 4, "area": 2, "score": np.float32(0.5)}, {"id": 2**24 - 1, "category_id": 7}]
    with PanopticWriter(tmp_path / "a" / "found.json", folder=tmp_path / "pictures") as writer:
        writer.write(np.int64(7), ids.astype(np.int32), segments)  # type: ignore[arg-type]
        writer.write("x", ids, segments, file_name="other.png")
        assert (tmp_path / "pictures" / "000000000007.png").exists()  # as it comes
        assert not writer.json_file.exists()
    assert json.loads(writer.json_file.read_text())["annotations"][0] == {
        "image_id": 7,
        "file_name": "000000000007.png",
        "segments_info": [{"id": 1, "category_id": 4, "score": 0.5}, {"id": 2**24 - 1, "category_id": 7}],
    }
    for name in ("000000000007.png", "other.png"):
        np.testing.assert_array_equal(rgb2id(np.array(Image.open(tmp_path / "pictures" / name))), ids)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "000000000007.png",
        "found.json",
        "other.png",
    ]


def test_no_json_says_that_a_broken_run_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    file.write_text("of an earlier run")

    def interrupted() -> None:
        with PanopticWriter(file) as writer:
            writer.write(1, np.zeros((2, 2), int), [])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not file.exists()


ONE = [{"id": 1, "category_id": KINDS[0]["id"]}]
PIXELS = np.ones((2, 2), int)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, PIXELS, ONE, "another.png"), "image 1 or its file another.png was written before"),
        ((2, PIXELS, ONE, "000000000001.png"), "image 2 or its file 000000000001.png"),
        ((1, PIXELS, ONE), "image 1 or its file 000000000001.png was written before"),
        ((2, PIXELS, []), r"image 2: the map has the segments \[1\] and the list \[\]"),
        ((2, PIXELS, ONE * 2), "name each segment that has pixels once"),
        ((2, PIXELS * 0, ONE), r"segments \[\] and the list \[1\]"),
        ((2, PIXELS << 24, [{"id": 1 << 24, "category_id": 1}]), "must lie in 0"),
    ],
)
def test_mistakes_in_what_is_written(tmp_path: Path, arguments: Any, message: str) -> None:
    writer = PanopticWriter(tmp_path / "found.json")
    writer.write(1, PIXELS, ONE)
    with pytest.raises(ValueError, match=message):
        writer.write(*arguments[:3], file_name=(*arguments, None)[3])


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_areas_need_not_be_given(tmp_path: Path) -> None:
    _, truth, found = write(tmp_path)
    ours = evaluate_panoptic_files(truth, None, found, None)

    def without(content: Any) -> None:
        for annotation in content["annotations"]:
            for segment in annotation["segments_info"]:
                del segment["area"]

    edit(truth, without)
    assert evaluate_panoptic_files(truth, None, found, None) == ours


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (lambda t, f: f.unlink(), "found.json: cannot be read as JSON"),
        (lambda t, f: f.write_text("[]"), "found.json: has no list of annotations"),
        (lambda t, f: edit(t, lambda c: c.pop("categories")), "truth.json: has no list of categories"),
        (lambda t, f: edit(t, lambda c: c["categories"].clear()), "truth.json: there are no categories"),
        (lambda t, f: edit(f, lambda c: c["annotations"].pop(0)), "no prediction for image 5"),
        (lambda t, f: edit(f, lambda c: c["annotations"].append(c["annotations"][0])), "image 5 is annotated twice"),
        (
            lambda t, f: edit(f, lambda c: c["annotations"][2].pop("file_name")),
            "annotation 2 lacks 'file_name'",
        ),
        (
            lambda t, f: edit(f, lambda c: c["annotations"][0]["segments_info"].append({"id": 9, "category_id": 999})),
            r"found/000000000005.png against .*truth/5.png: image 5: .* category_id 999",
        ),
        (
            lambda t, f: edit(t, lambda c: c["annotations"][3]["segments_info"][0].update(area=7.5)),
            r"000000000003.png against .*truth/3.png: image 3: segment \d+ of the target has the area 7.5 in the JSON",
        ),
        (lambda t, f: (f.with_suffix("") / "000000000003.png").unlink(), "000000000003.png: the panoptic PNG cannot"),
        (
            lambda t, f: Image.new("L", (36, 25)).save(f.with_suffix("") / "000000000003.png"),
            "000000000003.png: is a PNG of mode L",
        ),
        (
            lambda t, f: Image.new("RGB", (4, 4)).save(f.with_suffix("") / "000000000003.png"),
            "000000000003.png against .*3.png: image 3:",
        ),
    ],
)
def test_mistakes_in_files_name_them(tmp_path: Path, breakage: Callable[[Path, Path], Any], message: str) -> None:
    _, truth, found = write(tmp_path)
    breakage(truth, found)
    with pytest.raises(DataError, match=message):
        evaluate_panoptic_files(truth, None, found, None)
