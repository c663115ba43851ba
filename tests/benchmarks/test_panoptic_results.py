"""The page on panoptic segmentation says what the table beside it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

import crbp
from crbp.data.panoptic import Shapes
from crbp.metrics import PanopticQuality
from crbp.models import RFPN, PanopticFPN
from crbp.models.panoptic import mini_settings
from crbp.models.panoptic.mask_head import mask_targets
from crbp.models.panoptic.settings import BoxSettings, MaskSettings, MergeSettings
from crbp.tasks import GeneratedShapes, PanopticData, PanopticTask

CONFIGS = Path(__file__).parents[2] / "configs" / "panoptic"
FOLDER = Path(__file__).parents[2] / "results" / "panoptic"


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> Any:
    return load_script("benchmarks/panoptic_results.py")


def _line(row: str, seed: int, trained: str, steps: str, pq: float, **changes: str) -> dict[str, str]:
    qualities = {
        "pq_things": "0.25",
        "pq_stuff": "0.5",
        "sq_things": "0.75",
        "rq_things": "0.3",
        "seconds": "150",
        "saved_mib": "4.56",
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
    assert script.with_tables(page, script.tables(FOLDER)) == page


def test_seeds_stand_side_by_side_at_the_steps_trained_for_and_at_the_last(script: Any) -> None:
    assert _cells(script.table(LINES)) == [
        ["Panoptic FPN", "1,234,567", "4.6", "2", "20.0", "25.0", "75.0", "30.0", "50.0", "60.0", ""],
        [
            "R-FPN, C-RBP, 10 steps", "1,234,567", "4.6", "2, 2", "30.0, 40.0", "25.0, 25.0", "75.0, 75.0",
            "30.0, 30.0", "50.0, 50.0", "60.0, 60.0", "35.0, 32.5",
        ],
    ]  # fmt: skip


def test_a_table_of_few_images_tells_two_digits_of_its_rows_alone(script: Any) -> None:
    lines = [_line("few100_fpn", 0, "", "", 0.26504), _line("few25_fpn", 0, "", "", 0.22), *LINES]
    (row,) = _cells(script.table(script.of_kind("few100", lines), places=2))
    assert (row[0], row[4]) == ("Panoptic FPN", "26.50")


def test_lines_take_the_place_of_those_of_the_same_run_alone(script: Any, tmp_path: Path) -> None:
    file = tmp_path / "few.csv"
    script.write(file, LINES)
    written = script.read(file)
    assert len(written) == len(LINES)
    script.write(file, [{**LINES[0], "pq": 0.98761}, {**LINES[0], "row": "shapes_other"}])
    changed = script.read(file)
    assert [line["pq"] for line in changed if line["row"] == LINES[0]["row"]] == ["0.9876"]
    assert [line for line in changed if line["row"] not in (LINES[0]["row"], "shapes_other")] == [
        line for line in written if line["row"] != LINES[0]["row"]
    ]


def test_steps_and_times_stand_by_tolerance(script: Any) -> None:
    ratio = {"ratio": {"median": 1.25, "min": 1.0, "max": 1.5}}
    rows = [{"name": "all steps", "steps": 20, "pq": 0.26}, {"name": "tolerance 0.01", "steps": 10.66, "pq": 0.2616}]
    times = {"all steps": ratio, "tolerance 0.01": {"ratio": {"median": 1.1, "min": 1.0, "max": 1.2}}}
    found = {"rows": rows, "small": times, "full_size": {"10 instances": times}}
    assert _cells(script.settling_table(found)) == [
        ["all steps", "20.0", "26.00", "1.25× (1.00 to 1.50)", "1.25× (1.00 to 1.50)"],
        ["tolerance 0.01", "10.7", "26.16", "1.10× (1.00 to 1.20)", "1.10× (1.00 to 1.20)"],
    ]


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


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")  # in Lightning, by torch
@pytest.mark.parametrize("kind", ["fpn", "rfpn"])
def test_what_is_measured_is_what_validation_measures(
    load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    net = _guessing_net(kind)
    data = PanopticData(GeneratedShapes(size=128, train=4, val=3), shortest=(128,), shortest_test=128, workers=0)
    maps: list[Tensor] = []
    update = PanopticQuality.update
    monkeypatch.setattr(
        PanopticQuality,
        "update",
        lambda quality, seen, *rest: (maps.append(seen.clone()), update(quality, seen, *rest)),
    )
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    counts = [None] if kind == "fpn" else [1, 3]
    validated = {}
    for steps in counts:
        task = PanopticTask(net, steps=steps, average_precision=False)
        (values,) = trainer.validate(task, data, verbose=False)
        validated[steps] = values, maps[:]
        maps.clear()
    found = load_script("benchmarks/panoptic.py").measure(net.eval(), data, counts)
    assert [each["steps"] for each in found] == counts
    for k, (values, wanted) in enumerate(validated.values()):
        measured = maps[k :: 2 * len(counts)]  # of each image after each number of steps; then those in the true boxes
        assert all(torch.equal(one, other) for one, other in zip(measured, wanted, strict=True))
        assert all(found[k][name.removeprefix("val/")] == pytest.approx(value) for name, value in values.items())
    if kind == "rfpn":
        assert any(not torch.equal(one, other) for one, other in zip(maps[::4], maps[1::4], strict=True))


def test_instances_that_stop_are_counted_as_the_network_runs_them(
    load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load_script("benchmarks/panoptic_settling.py")
    net = _guessing_net("rfpn").eval()
    data = PanopticData(GeneratedShapes(size=128, train=4, val=2), shortest=(128,), shortest_test=128, workers=0)
    monkeypatch.setattr(script, "TOLERANCES", (None, 0.0, 1e9))
    found = script.by_tolerance(net, data)
    assert [row["steps"] for row in found] == [net.steps, net.steps, 1]
    for row in found:
        quality = PanopticQuality(data.categories.as_json())
        net.mask_head.tolerance = row["tolerance"]
        for batch in data.val_dataloader():
            (seen,), (truth,) = net(batch.images, sizes=[batch.targets[0]["size"]]), batch.truths
            quality.update(seen.panoptic, script.segments_info(seen, data.categories), *truth)
        assert row["pq"] == pytest.approx(float(quality.compute()["pq"]))


def test_masks_are_measured_in_the_true_boxes(
    load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = _guessing_net("fpn").eval()
    torch.nn.init.ones_(net.roi_heads.mask_predictor.mask_fcn_logits.bias)
    torch.nn.init.zeros_(net.roi_heads.mask_predictor.mask_fcn_logits.weight)  # every mask is all of its box
    data = PanopticData(GeneratedShapes(size=128, train=4, val=3), shortest=(128,), shortest_test=128, workers=0)
    targets = [batch.targets[0] for batch in data.val_dataloader()]
    true = [mask_targets(each["masks"], each["boxes"], torch.arange(len(each["boxes"])), 12) for each in targets]
    script = load_script("benchmarks/panoptic.py")
    (found,) = script.measure(net, data, [None])
    assert found["true_box_iou"] == pytest.approx(float(torch.cat(true).float().mean()), abs=1e-4)

    def drawn(heads: Any, features: Any, boxes: Tensor, labels: Tensor, counts: Any) -> Any:
        """The true masks in the true boxes, and none elsewhere."""
        for target in targets:
            if torch.equal(boxes, target["boxes"]):
                return [mask_targets(target["masks"], boxes, torch.arange(len(boxes)), 48).float()]
        return [torch.zeros(len(boxes), 48, 48)]

    monkeypatch.setattr(script, "masks_at", drawn)
    (ideal,) = script.measure(net, data, [None])
    assert ideal["true_box_iou"] == 1
    assert ideal["true_box_pq_things"] > 0.8 > found["true_box_pq_things"]
    assert ideal["pq_things"] == 0


def test_heads_are_trained_in_moved_or_proposed_boxes_and_measured_in_the_true_ones(
    load_script: Callable[[str], ModuleType],
) -> None:
    script, net = load_script("benchmarks/mask_heads.py"), _guessing_net("fpn").eval()
    for start, settings in (("start_shapes", {"objects": (3, 7)}), ("start_heaps", {"objects": (4, 8), "alike": 0.6})):
        data = Shapes(128, split="val", images=3, seed=1, looks="coloured", zoom=1.6, **settings)
        labels = torch.cat([data[k][1]["labels"] for k in range(3)])
        true = script.crops(net, start, "val", 3)
        assert true.labels.tolist() == labels.tolist()
        moved = script.crops(net, start, "val", 3, kind="moved")
        assert moved.labels.tolist() == labels.tolist()
        assert not torch.equal(moved.masks, true.masks)


def test_heads_are_trained_in_proposals_that_lie_on_an_object(
    load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, net = load_script("benchmarks/mask_heads.py"), _guessing_net("fpn").eval()
    data = Shapes(128, split="val", images=1, seed=1, looks="coloured", zoom=1.6, objects=(3, 7))
    target = data[0][1]
    near = target["boxes"] + torch.tensor([1.0, 0.0, 1.0, 0.0])
    corner = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    monkeypatch.setattr(net.rpn, "forward", lambda *_: ([torch.cat([near, corner])], {}))
    found = script.crops(net, "start_shapes", "val", 1, kind="proposed")
    every, matched = torch.cat([target["boxes"], near]), torch.arange(len(near)).repeat(2)
    wanted = mask_targets(target["masks"], every, matched, found.masks.shape[-1])
    assert len(found) == min(len(every), script.MOST)
    for mask, label in zip(found.masks, found.labels, strict=True):
        same = [k for k in range(len(every)) if torch.equal(mask, wanted[k])]
        assert label in target["labels"][matched[same]]  # and of no other place
    assert any(torch.equal(mask, one) for mask in found.masks for one in wanted[len(near) :])


def _guessing_net(kind: str) -> Any:
    """A network that is sure of things it has not learnt, some of which the merge takes."""
    settings = mini_settings(128) | {"things": 10, "stuff": 6, "merge": MergeSettings(score=0.3, stuff_area=0)}
    settings |= {"boxes": BoxSettings(channels=32, score=0.1, detections=6), "masks": MaskSettings(channels=64, size=6)}
    torch.manual_seed(0)
    net = PanopticFPN(**settings) if kind == "fpn" else RFPN(**settings, evolve=crbp.Evolve(steps=3))
    torch.nn.init.normal_(net.roi_heads.box_predictor.cls_score.weight)
    torch.nn.init.normal_(net.roi_heads.mask_predictor.mask_fcn_logits.weight)
    return net


def test_overlaps_are_of_what_is_said_with_what_is_true(load_script: Callable[[str], ModuleType]) -> None:
    true = torch.zeros(4, 6, 6, dtype=torch.bool)
    true[:3, 1:4, 2:5] = True
    said = torch.stack([true[0], ~true[0], torch.ones(6, 6, dtype=torch.bool), torch.zeros(6, 6, dtype=torch.bool)])
    assert load_script("benchmarks/panoptic.py").iou(said, true).tolist() == [1.0, 0.0, 0.25, 0.0]


def test_what_two_images_by_heart_came_to_is_in_percent_a_row_for_each_model(script: Any) -> None:
    row = {"pq": 0.9123, "pq_things": 1.0, "pq_stuff": 0.05, "rq": 1.0, "box_ap": 0.0, "mask_ap": 0.5}
    rows = [{"model": "rfpn", **row}, {"model": "fpn", **row, "pq": 0.8}]
    fpn, rfpn = _cells(script.overfit_table(rows))
    assert fpn[:2] == ["Panoptic FPN", "80.0"]
    assert rfpn[1:-1] == ["91.2", "100", "5.00", "100", "0.000", "50.0"]


def test_a_model_that_is_fitted_again_is_in_the_file_once(
    load_script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    add, file = load_script("benchmarks/panoptic_overfit.py").add, tmp_path / "overfit.json"
    for model, pq in (("rfpn", 0.1), ("fpn", 0.2), ("rfpn", 0.3)):
        add({"model": model, "pq": pq}, file)
    assert json.loads(file.read_text()) == [{"model": "fpn", "pq": 0.2}, {"model": "rfpn", "pq": 0.3}]


def test_costs_are_in_mib_and_seconds_with_their_spread(script: Any) -> None:
    mib = 2**20
    found = {
        "Panoptic FPN": 50 * mib,
        "C-RBP": {"5": 90 * mib, "20": 91 * mib},
        "BPTT": {"5": 144 * mib, "20": 3000 * mib},
    }
    assert _cells(script.memory_table(found)) == [
        ["R-FPN, C-RBP", "90.0", "91.0"], ["R-FPN, BPTT", "144", "3 000"], ["Panoptic FPN", "50.0", ""],
    ]  # fmt: skip
    names = ("Panoptic FPN", "R-FPN, N = 20", "ratio")

    def spread(seconds: float) -> dict[str, Any]:
        return {name: {"median": k * seconds, "min": 0.5 * k, "max": 200 * k} for k, name in enumerate(names, start=1)}

    cost = {
        "full_size": {"10 instances": spread(1), "100 instances": spread(2)},
        "small": {"inference": spread(3), "training": spread(5)},
        "full_size_training": {"masks": 17, **spread(4)},
    }
    rows = _cells(script.time_table(cost))
    assert [row[1] for row in rows] == [f"{k}.00 s (0.500 to 200)" for k in range(1, 6)]
    assert rows[0][2:] == ["2.00 s (1.00 to 400)", "3.00× (1.50 to 600.00)"]
    assert "17 masks" in rows[3][0]


def _cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
