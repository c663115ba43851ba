"""The page on panoptic segmentation says what the table beside it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from crbp.models.panoptic.mask_head import mask_targets
from crbp.tasks import GeneratedShapes, PanopticData

CONFIGS = Path(__file__).parents[2] / "configs" / "panoptic"
FOLDER = Path(__file__).parents[2] / "results" / "panoptic"


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> Any:
    return load_script("benchmarks/panoptic_results.py")


def _line(row: str, seed: int, trained: str, steps: str, pq: float, **changes: str) -> dict[str, str]:
    qualities = {
        "pq_things": "0.25",
        "pq_stuff": "0.5",
        "mask_ap": "0.1" if steps == trained else "",
        "true_box_iou": "0.6",
    }
    names = {"row": row, "seed": f"{seed}", "trained_steps": trained, "steps": steps, "parameters": "1234567"}
    return names | qualities | {"pq": f"{pq}"} | changes


LINES = [
    _line("shapes_fpn", 0, "", "", 0.2),
    _line("shapes_rfpn_crbp10", 0, "10", "5", 0.1),
    _line("shapes_rfpn_crbp10", 0, "10", "10", 0.3),
    _line("shapes_rfpn_crbp10", 0, "10", "30", 0.35),
    _line("shapes_rfpn_crbp10", 1, "10", "10", 0.4),
    _line("shapes_rfpn_crbp10", 1, "10", "30", 0.325),
]


def test_the_page_has_what_was_measured(script: Any) -> None:
    page = (FOLDER / "README.md").read_text()
    assert script.with_tables(page, {"shapes": script.table(script.read(FOLDER / "table.csv"))}) == page


def test_seeds_stand_side_by_side_at_the_steps_trained_for_and_at_the_last(script: Any) -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in script.table(LINES).splitlines()[2:]]
    assert rows == [
        ["Panoptic FPN", "1,234,567", "20.0", "25.0", "50.0", "10.0", "60.0", ""],
        [
            "R-FPN, C-RBP, 10 steps", "1,234,567", "30.0, 40.0", "25.0, 25.0", "50.0, 50.0", "10.0, 10.0",
            "60.0, 60.0",
            "35.0, 32.5",
        ],
    ]  # fmt: skip


def test_the_figure_has_a_curve_for_each_run_and_each_method_once_in_its_legend(script: Any) -> None:
    (axes,) = script.figure(LINES).axes
    curves = [list(map(float, line.get_ydata())) for line in axes.lines if line.get_marker() == "None"]
    assert [20.0, 20.0] in curves
    assert [10.0, 30.0, 35.0] in curves
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["Panoptic FPN", "R-FPN, C-RBP, 10 steps"]


def test_a_row_that_starts_from_another_says_from_which(load_script: Callable[[str], ModuleType]) -> None:
    runs = load_script("benchmarks/_runs.py")
    start = Path("runs/start_shapes/version_0/weights/last.safetensors")
    assert runs.started_from(CONFIGS / "shapes_fpn.yaml") == start
    assert runs.started_from(CONFIGS / "start_shapes.yaml") is None
    assert runs.started_from(CONFIGS / "fpn_r50_1x.yaml") is None  # ImageNet is no row


@pytest.mark.parametrize(("says", "overlap"), [("the truth", 1.0), ("nothing", 0.0), ("everything", None)])
def test_masks_are_measured_in_the_true_boxes(
    load_script: Callable[[str], ModuleType], says: str, overlap: float | None
) -> None:
    measured = load_script("benchmarks/panoptic.py")
    data = PanopticData(GeneratedShapes(size=128, train=4, val=3), shortest=(128,), shortest_test=128, workers=0)
    targets = [batch.targets[0] for batch in data.val_dataloader()]
    answers = iter(mask_targets(each["masks"], each["boxes"], torch.arange(len(each["boxes"])), 28) for each in targets)

    def masks(features: None, boxes: list[Tensor], labels: Tensor) -> tuple[Tensor, None]:
        true = next(answers)
        assert len(boxes[0]) == len(labels) == len(true)
        return {"the truth": true.float(), "nothing": 0 * true.float()}.get(says, torch.ones(true.shape)), None

    net = SimpleNamespace(
        batch=lambda images: SimpleNamespace(tensors=images),
        backbone=lambda images: None,
        roi_heads=SimpleNamespace(masks=masks),
    )
    (found,) = measured.in_true_boxes(net, data, [None])
    if overlap is None:  # of a mask that is all of its box with one that is a share of it, that share
        wanted = [mask_targets(each["masks"], each["boxes"], torch.arange(len(each["boxes"])), 28) for each in targets]
        overlap = float(torch.cat(wanted).float().mean())
    assert found == pytest.approx(overlap, abs=1e-4)
