from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import official
import pytest
import torch
from official import Case, Segments
from panopticapi.utils import rgb2id
from PIL import Image

from crbp.metrics import PanopticQuality

KINDS = official.categories()
FIRST, SECOND = KINDS[0]["id"], KINDS[1]["id"]


def quality(*cases: Case, kinds: Segments = KINDS) -> dict[str, Any]:
    metric = PanopticQuality(kinds)
    for case in cases:
        metric.update(*case)
    return dict(metric.compute())


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    table, expected_table = found["per_class"], expected["per_class"]
    assert table.keys() == expected_table.keys()
    for number, row in expected_table.items():
        for name in ("tp", "fp", "fn"):
            assert table[number][name] == row.get(name, 0)
        assert table[number] == pytest.approx({**dict.fromkeys(("tp", "fp", "fn", "iou"), 0), **row}, abs=1e-9, rel=0)
    rest = {name: value for name, value in found.items() if name != "per_class"}
    assert rest == pytest.approx({name: expected[name] for name in rest}, abs=1e-9, rel=0)


def random_cases(seed: int, count: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    return [official.random_case(rng, KINDS) for _ in range(count)]


@pytest.mark.parametrize("seed", range(12))
def test_agrees_with_the_official_tool_on_random_images(seed: int, tmp_path: Path) -> None:
    cases = random_cases(seed, 12)
    expected = official.evaluate(cases, KINDS, tmp_path)
    assert expected["n"] > 0
    assert_same(quality(*cases), expected)


def test_the_random_images_reach_every_rule() -> None:
    cases = [case for seed in range(12) for case in random_cases(seed, 12)]
    rows = quality(*cases)["per_class"].values()
    assert all(sum(row[name] for row in rows) > 50 for name in ("tp", "fp", "fn"))
    assert any(not case.pred_segments for case in cases)
    assert any(not case.target_segments for case in cases)
    crowds = [[segment["category_id"] for segment in case.target_segments if segment["iscrowd"]] for case in cases]
    assert any(len(set(ids)) < len(ids) for ids in crowds)
    uncrowded = [case._replace(target_segments=[{**s, "iscrowd": 0} for s in case.target_segments]) for case in cases]
    assert quality(*uncrowded)["pq"] != quality(*cases)["pq"]


@pytest.mark.parametrize("seed", range(2))
def test_agrees_with_the_official_tool_on_photographs(seed: int, shared_data: Path, tmp_path: Path) -> None:
    sample = shared_data / "coco_panoptic_sample"
    content = json.loads((sample / "panoptic_examples.json").read_text())
    kinds = json.loads((sample / "panoptic_coco_categories.json").read_text())
    rng, cases = np.random.default_rng(seed), []
    for annotation in content["annotations"]:
        target = rgb2id(np.array(Image.open(sample / "panoptic_examples" / annotation["file_name"])))
        segments = annotation["segments_info"]
        pred = np.roll(target, rng.integers(-6, 7, 2), axis=(0, 1))
        pred[rng.random(pred.shape) < 0.05] = 0
        pred[:, : rng.integers(1, 100)] = 0
        named = [s for s in segments if (pred == s["id"]).any()]
        assert any(s["iscrowd"] for s in segments)
        classes = rng.choice([s["category_id"] for s in segments], len(named))
        kept = rng.random(len(named)) < 0.8
        pred_segments = [
            {"id": s["id"], "category_id": int(s["category_id"] if keep else other)}
            for s, keep, other in zip(named, kept, classes, strict=True)
        ]
        cases.append(Case(pred, pred_segments, target, segments))
    found = quality(*cases, kinds=kinds)
    assert 0.1 < found["pq"] < 0.9
    assert_same(found, official.evaluate(cases, kinds, tmp_path))


def test_the_truth_predicted_is_perfect() -> None:
    rng = np.random.default_rng(0)
    cases = []
    for _ in range(5):
        case = official.random_case(rng, KINDS)
        segments = [{**segment, "iscrowd": 0} for segment in case.target_segments]
        cases.append(Case(case.target_map, segments, case.target_map, segments))
    found = quality(*cases)
    for kind in ("", "_things", "_stuff"):
        assert found["n" + kind] > 0
        assert found["pq" + kind] == found["sq" + kind] == found["rq" + kind] == 1


def test_names_of_segments_and_their_order_do_not_matter() -> None:
    for case in random_cases(1, 20):
        crowds = [s["category_id"] for s in case.target_segments if s["iscrowd"]]
        if len(set(crowds)) < len(crowds):
            continue  # of several crowds of a class, the last one counts
        renamed = []
        for pixels, segments in (case[:2], case[2:]):
            new = {0: 0} | {s["id"]: 7 + 3 * place for place, s in enumerate(reversed(segments))}
            renamed += [
                np.vectorize(new.get, otypes=[np.int64])(pixels),
                [{**s, "id": new[s["id"]]} for s in reversed(segments)],
            ]
        assert quality(Case(*renamed)) == quality(case)


def test_factors_multiply_and_counts_add() -> None:
    cases = random_cases(2, 20)
    found = quality(*cases)
    alone = [quality(case)["per_class"] for case in cases]
    for number, row in found["per_class"].items():
        assert row["pq"] == pytest.approx(row["sq"] * row["rq"])
        for name in ("tp", "fp", "fn", "iou"):
            assert row[name] == pytest.approx(sum(one[number][name] for one in alone))
    assert found["n"] == found["n_things"] + found["n_stuff"]
    assert found["pq"] * found["n"] == pytest.approx(
        found["pq_things"] * found["n_things"] + found["pq_stuff"] * found["n_stuff"]
    )


def test_states_merge_and_reset() -> None:
    cases = random_cases(3, 6)
    metrics = [PanopticQuality(KINDS) for _ in range(2)]
    for place, case in enumerate(cases):
        metrics[place % 2].update(*case)
    metrics[0].merge_state(metrics[1])
    assert_same(metrics[0].compute(), quality(*cases))
    metrics[0].reset()
    metrics[0].update(*cases[0])
    assert metrics[0].compute() == quality(cases[0])
    assert metrics[0].half().iou.dtype == torch.float64  # a model's precision is not the metric's


def count_in_a_group(rank: int, folder: Path, cases: list[Case]) -> None:
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    metric = PanopticQuality(KINDS)
    for case in cases[rank * 5 :][: 5 - 4 * rank]:  # 5 images here, 1 there
        metric.update(*case)
    (folder / f"{rank}.json").write_text(json.dumps(metric.compute()))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="forks its processes")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_processes_sum_their_images(tmp_path: Path) -> None:
    cases = random_cases(4, 6)
    torch.multiprocessing.start_processes(count_in_a_group, (tmp_path, cases), nprocs=2, start_method="fork")
    expected = json.loads(json.dumps(quality(*cases)))  # keys are text in JSON
    for rank in range(2):
        assert_same(json.loads((tmp_path / f"{rank}.json").read_text()), expected)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32", "int64"])
def test_any_integer_type_as_array_or_tensor(dtype: str) -> None:
    pixels = np.array([[1, 1, 2], [1, 0, 2]], dtype=dtype)
    segments = [{"id": 1, "category_id": FIRST}, {"id": np.int64(2), "category_id": SECOND}]
    assert quality(Case(pixels, segments, pixels[::1], segments))["pq"] == 1
    readonly = pixels.copy()
    readonly.flags.writeable = False
    tensor: Any = torch.from_numpy(pixels)
    assert quality(Case(tensor, segments, readonly, segments))["pq"] == 1
    assert quality(Case(tensor.T, segments, pixels.T, segments))["pq"] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_maps_and_states_may_be_on_different_devices() -> None:
    for case in random_cases(6, 3):
        metric = PanopticQuality(KINDS).cuda()
        on_gpu = case._replace(pred_map=torch.from_numpy(case.pred_map).cuda())
        metric.update(*on_gpu)
        assert metric.iou.is_cuda
        assert metric.compute() == quality(on_gpu) == quality(case)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_an_image_without_pixels_adds_nothing(size: tuple[int, int]) -> None:
    (case,) = random_cases(7, 1)
    nothing = Case(np.zeros(size, int), [], np.zeros(size, int), [])
    assert quality(case, nothing) == quality(case)


def test_a_match_needs_more_than_half() -> None:
    target = np.array([[1, 1, 1, 2]])
    segments = [{"id": 1, "category_id": FIRST}, {"id": 2, "category_id": SECOND}]
    row = quality(Case(np.array([[1, 1, 0, 0]]), segments[:1], target, segments))["per_class"][FIRST]
    assert row == {"pq": 2 / 3, "sq": 2 / 3, "rq": 1, "tp": 1, "fp": 0, "fn": 0, "iou": 2 / 3}
    target = np.array([[1, 1, 2, 2]])
    row = quality(Case(np.array([[1, 0, 0, 0]]), segments[:1], target, segments))["per_class"][FIRST]
    assert (row["tp"], row["fp"], row["fn"]) == (0, 1, 1)


def test_classes_that_do_not_occur_are_left_out_of_the_average() -> None:
    pixels = np.ones((2, 2), int)
    found = quality(Case(pixels, [{"id": 1, "category_id": FIRST}], pixels, [{"id": 1, "category_id": FIRST}]))
    kinds = ("_things", "_stuff") if KINDS[0]["isthing"] else ("_stuff", "_things")
    assert found["pq"] == found["pq" + kinds[0]] == 1
    assert found["n"] == found["n" + kinds[0]] == 1
    assert found["pq" + kinds[1]] == found["n" + kinds[1]] == 0
    assert len(found["per_class"]) == len(KINDS)


def test_nothing_seen() -> None:
    metric = PanopticQuality(KINDS)
    with pytest.warns(UserWarning, match="before the ``update``"):
        found = metric.compute()
    assert found["pq"] == found["n"] == 0


ONE = [{"id": 1, "category_id": FIRST}]
PIXELS = np.ones((2, 3), int)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pred_segments": [{"id": 1, "category_id": 2}]}, "category_id 2, which is not among"),
        ({"target_segments": [{"id": 1, "category_id": 2}]}, "target has category_id 2"),
        ({"pred_segments": []}, "map of the prediction has the id 1, which its segments do not name"),
        ({"target_segments": []}, "map of the target has the id 1"),
        ({"pred_segments": [*ONE, {"id": 5, "category_id": FIRST}]}, "name the id 5, which no pixel"),
        ({"target_segments": [*ONE, {"id": 5, "category_id": FIRST}]}, "segments of the target name the id 5"),
        ({"pred_segments": ONE * 2}, "name the id 1 twice"),
        ({"pred_segments": [{"id": 0, "category_id": FIRST}]}, "id 0, which means void"),
        ({"target_segments": [{**ONE[0], "iscrowd": "0"}]}, "segment 1 of the target has iscrowd '0'; give 0 or 1"),
        ({"target_segments": [{**ONE[0], "iscrowd": 2}]}, "iscrowd 2; give 0 or 1"),
        ({"pred_segments": [{"id": 1, "label": 3}]}, "has no 'category_id' but 'id', 'label'"),
        ({"pred_segments": [{"id": 1.5, "category_id": FIRST}]}, "the id 1.5; give a whole number"),
        ({"pred_map": PIXELS[:1]}, r"shape \(1, 3\) and that of the target \(2, 3\)"),
        ({"pred_map": PIXELS[None]}, r"shape \(1, 2, 3\); give one image"),
        ({"pred_map": PIXELS.astype(float)}, "is of float64; give integer ids"),
        ({"pred_map": torch.ones(2, 3)}, "is of torch.float32"),
        ({"target_map": PIXELS > 0}, "is of bool"),
        ({"target_map": torch.ones(2, 3) > 0}, "is of torch.bool"),
        ({"pred_map": -PIXELS}, "has the id -1"),
        ({"target_map": np.array([[1, 1, 1], [1, 9, 1]])}, "map of the target has the id 9, which"),
    ],
)
def test_mistakes_in_an_image(change: dict[str, Any], message: str) -> None:
    metric = PanopticQuality(KINDS)
    with pytest.raises(ValueError, match=message):
        metric.update(**(Case(PIXELS, ONE, PIXELS, ONE)._replace(**change)._asdict()))
    assert metric.tp.sum() == metric.fn.sum() == 0


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ([], "no categories"),
        ([{"id": 1, "isthing": 1}, {"id": 1, "isthing": 0}], "the id 1 twice"),
        ([{"id": 1}], "category 1 has no 'isthing'"),
        ([{"id": 1, "isthing": 2}], "isthing 2; give 1"),
        ([{"isthing": 2}], "a category has no 'id'"),
    ],
)
def test_mistakes_in_the_categories(kinds: Segments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PanopticQuality(kinds)
