from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crbp.metrics import DetectionAP
from crbp.metrics import detection as module

pytest.importorskip("pycocotools")
NAMES = [f"{kind}_ap{name}" for kind in ("box", "mask") for name in ("", "50", "75", "_small", "_medium", "_large")]


def image(
    boxes: list[list[int]],
    labels: list[int],
    scores: list[float] | None = None,
    *,
    crowd: list[int] | None = None,
    size: int = 128,
) -> dict[str, Tensor]:
    """One image whose masks fill their boxes."""
    masks = torch.zeros(len(boxes), size, size, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    made = {"boxes": torch.tensor(boxes).float().reshape(-1, 4), "labels": torch.tensor(labels).long(), "masks": masks}
    if scores is not None:
        made["scores"] = torch.tensor(scores)
    if crowd is not None:
        made["iscrowd"] = torch.tensor(crowd)
    return made


def precision(*pairs: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, float]:
    metric = DetectionAP()
    metric.update([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    return dict(metric.compute())


A, B, C = [0, 0, 40, 40], [60, 60, 70, 70], [10, 70, 50, 120]  # medium, small, medium


def test_the_truth_found_is_perfect() -> None:
    found = precision((image([A, B, C], [0, 1, 1], [0.9, 0.8, 0.3]), image([A, B, C], [0, 1, 1])))
    assert list(found) == NAMES
    assert found == pytest.approx(dict.fromkeys(NAMES, 1.0) | {"box_ap_large": -1, "mask_ap_large": -1})


def test_a_target_that_is_missed() -> None:
    # Precision is 1 up to a recall of ½: 51 of the 101 recalls that are averaged.
    found = precision((image([A], [0], [0.9]), image([A, C], [0, 0])))
    assert found["box_ap"] == found["mask_ap"] == pytest.approx(51 / 101)


def test_a_false_alarm_above_and_below() -> None:
    truth = image([A], [0])
    below = precision((image([A, C], [0, 0], [0.9, 0.8]), truth))
    above = precision((image([A, C], [0, 0], [0.8, 0.9]), truth))
    assert below["box_ap"] == below["mask_ap"] == pytest.approx(1)
    assert above["box_ap"] == above["mask_ap"] == pytest.approx(0.5)
    other = precision((image([A], [1], [0.8]), truth))
    assert other["box_ap"] == 0


def test_boxes_and_masks_are_judged_apart() -> None:
    truth = image([A], [0])
    found = image([[0, 0, 40, 28]], [0], [0.9])  # an IoU of exactly .7, which passes 5 of the 10
    both = precision((found, truth))
    assert both["box_ap"] == both["mask_ap"] == pytest.approx(0.5)
    assert (both["box_ap50"], both["box_ap75"]) == (pytest.approx(1), 0)
    found["masks"] = truth["masks"]
    mixed = precision((found, truth))
    assert (mixed["box_ap"], mixed["mask_ap"]) == (pytest.approx(0.5), pytest.approx(1))


@pytest.mark.parametrize("rows", range(10, 20))
def test_an_iou_at_a_threshold_passes_it(rows: int) -> None:
    found = image([[0, 0, 20, rows]], [0], [0.9])
    assert precision((found, image([[0, 0, 20, 20]], [0])))["mask_ap"] == pytest.approx((rows - 9) / 10)


def test_crowds_are_neither_found_nor_missed() -> None:
    truth = image([A, C], [0, 0], crowd=[0, 1])
    alone = precision((image([A], [0], [0.5]), truth))
    inside = precision((image([A, [10, 70, 20, 80], [30, 90, 40, 100]], [0, 0, 0], [0.5, 0.9, 0.8]), truth))
    assert alone["box_ap"] == inside["box_ap"] == inside["mask_ap"] == pytest.approx(1)
    counted = precision((image([A, [10, 70, 20, 80]], [0, 0], [0.5, 0.9]), image([A, C], [0, 0])))
    assert counted["mask_ap"] < 0.5


def test_classes_are_averaged_equally() -> None:
    found = image([A, C], [0, 0], [0.9, 0.9])
    assert precision((found, image([A, C, B], [0, 0, 5])))["mask_ap"] == pytest.approx(0.5)


def test_nothing_found_and_nothing_to_find() -> None:
    empty = image([], [], [])
    assert precision((empty, image([A], [0])))["box_ap"] == 0
    assert precision((empty, image([], [])))["box_ap"] == -1
    assert precision((image([A], [0], [0.5]), image([], [])))["mask_ap"] == -1
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert set(DetectionAP().compute().values()) == {-1.0}


def random_pairs(count: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    rng = np.random.default_rng(5)
    pairs = []
    for _ in range(count):
        corners = rng.integers(0, 60, (rng.integers(0, 5), 2))
        boxes = np.concatenate([corners, corners + rng.integers(4, 60, corners.shape)], axis=1)
        labels = rng.integers(0, 3, len(boxes)).tolist()
        moved = (boxes + rng.integers(-3, 4, boxes.shape)).clip(0, 128)
        target = image(boxes.tolist(), labels, crowd=(rng.random(len(boxes)) < 0.2).astype(int).tolist())
        found = image(moved.tolist(), labels, rng.random(len(boxes)).tolist())
        found["masks"][:, :, ::3] = False  # so that sizes of boxes and of masks differ
        pairs.append((found, target))
    return pairs


def test_batches_and_parts_do_not_matter() -> None:
    pairs = random_pairs(8)
    expected = precision(*pairs)
    assert 0 < expected["mask_ap"] < expected["box_ap"] < 1
    metric, other = DetectionAP(), DetectionAP()
    for place, (found, truth) in enumerate(pairs):
        (metric, other)[place % 2].update([found], [truth])
    metric.merge_state(other)
    assert metric.compute() == pytest.approx(expected)
    metric.reset()
    metric.update(*zip(*pairs, strict=True))
    assert metric.compute() == expected


def test_agrees_with_torchmetrics() -> None:
    from torchmetrics.detection import MeanAveragePrecision

    pairs = random_pairs(8)
    reference = MeanAveragePrecision(
        iou_type=("bbox", "segm"),
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
    )
    for found, truth in pairs:
        reference.update([found], [truth])
    expected, ours = reference.compute(), precision(*pairs)
    for kind, prefix in (("box", "bbox_map"), ("mask", "segm_map")):
        for name in ("", "50", "75", "_small", "_medium", "_large"):
            theirs = expected[prefix + ("_" + name if name.isdigit() else name)]
            assert ours[f"{kind}_ap{name}"] == pytest.approx(float(theirs), abs=1e-6), (kind, name)


def compute_in_a_group(rank: int, folder: Path) -> None:
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    metric = DetectionAP()
    if rank == 1:  # the other has seen nothing
        metric.update(*zip(*random_pairs(5), strict=True))
    else:
        metric.update(*zip(*random_pairs(2), strict=True))
        metric.reset()
        metric.update([], [])
    torch.save(metric.compute(), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="forks its processes")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_processes_with_different_numbers_of_images(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(compute_in_a_group, (tmp_path,), nprocs=2, start_method="fork")
    expected = precision(*random_pairs(5))
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [expected, expected]


def test_it_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    precision((image([A], [0], [0.5]), image([A], [0])))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"masks": torch.zeros(1, 9, 9, dtype=torch.bool)}, r"\(9, 9\) and of its target \(128, 128\)"),
        ({"masks": torch.zeros(1, 128, 128)}, "of torch.float32; give bool"),
        ({"scores": torch.zeros(2)}, "the parts of a result have the shapes"),
        ({"boxes": torch.zeros(4)}, "give boxes"),
        ({"labels": torch.tensor(0)}, "give boxes"),
    ],
)
def test_mistakes(result: dict[str, Tensor], message: str) -> None:
    good = image([A], [0], [0.5])
    with pytest.raises(ValueError, match=message):
        DetectionAP().update([{**good, **result}], [image([A], [0])])
    with pytest.raises(ValueError, match="a target has no 'labels', 'masks'; it needs"):
        DetectionAP().update([good], [{"boxes": good["boxes"]}])
    with pytest.raises(ValueError, match="1 results and 0 targets"):
        DetectionAP().update([good], [])


def test_without_pycocotools(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "pycocotools" else real(name))
    with pytest.raises(ImportError, match=r"pip install 'crbp\[panoptic\]'"):
        DetectionAP()
