"""The configurations of panoptic segmentation: what the script writes, what they build, and the numbers published."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchvision
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from crbp.models import RFPN, PanopticFPN
from crbp.models.panoptic import PixelSettings, checkpoints, load_weights, mini_settings
from crbp.models.panoptic._names import detectron2_name
from crbp.tasks import PanopticData, PanopticTask

FILES = sorted((Path(__file__).parents[1] / "configs" / "panoptic").glob("*.yaml"))
COCO = [path.stem for path in FILES if path.stem.endswith("x")]
TRAINED = {
    "fpn_r50_1x": 45_751_590,
    "rfpn_r50_crbp20_1x": 44_968_038,
    "fpn_r101_3x": 64_691_494,
    "rfpn_r101_crbp20_3x": 63_907_942,
}


@cache
def parser() -> ArgumentParser:
    made = ArgumentParser(exit_on_error=False)
    made.add_argument("--seed_everything", type=int)
    made.add_argument("--trainer", type=dict)
    made.add_subclass_arguments(PanopticTask, "model")
    made.add_subclass_arguments(PanopticData, "data")
    return made


def content(name: str) -> dict[str, Any]:
    path = next(file for file in FILES if file.stem == name)
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def build(name: str) -> Any:
    return parser().instantiate(parser().parse_object(content(name)))


@cache
def unfilled(name: str) -> Any:
    """What a row builds, its weights without memory."""
    with torch.device("meta"):
        return build(name)


def test_files_are_what_the_script_writes(load_script: Callable[[str], ModuleType]) -> None:
    script = load_script("configs/make_panoptic.py")
    assert script.files() == {path.name: path.read_text(encoding="utf-8") for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_setting_exists(path: Path) -> None:
    given = content(path.stem)
    assert parser().parse_object(given).model.class_path == given["model"]["class_path"]
    net = given["model"]["init_args"]["net"]["init_args"]
    net["no_such_setting"] = 1
    with pytest.raises(ArgumentError, match="no_such_setting"):
        parser().parse_object(given)


@pytest.mark.parametrize("name", TRAINED)
def test_trained_parameters_are_those_published(name: str) -> None:
    net = build(name).model.net
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == TRAINED[name]


@pytest.mark.parametrize(
    "path", [path for path in FILES if not path.stem.endswith(("x", "_detectron2"))], ids=lambda path: path.stem
)
def test_small_rows_have_the_classes_of_their_data(path: Path) -> None:
    made = build(path.stem)
    net, categories = made.model.net, made.data.categories
    assert (net.things, net.stuff) == (len(categories.things), len(categories.stuff))


@pytest.mark.parametrize("name", ["fpn_r50_detectron2", "rfpn_crbp20_r50_detectron2"])
def test_rows_for_detectron2_take_what_it_publishes(name: str) -> None:
    net = parser().parse_object(content(name)).model.init_args.net
    with torch.device("meta"):
        model = {"PanopticFPN": PanopticFPN, "RFPN": RFPN}[net.class_path.rpartition(".")[2]](depth=50)
    given = {"depth": 50} | {key: net.init_args[key] for key in ("evolve", "penalty") if key in net.init_args}
    assert content(name)["model"]["init_args"]["net"]["init_args"].keys() == given.keys()  # all else by default
    # A warning, which is an error in tests, would say that it is for other pixels or another stride.
    assert load_weights(
        model, {detectron2_name(each): torch.empty_like(value) for each, value in model.state_dict().items()}
    )


def test_rows_on_shapes_differ_from_what_they_start_from_in_their_masks_alone() -> None:
    start = content("start_shapes")
    masks = ["roi_heads.mask_head.", "roi_heads.mask_predictor."]
    rows = [path.stem for path in FILES if path.stem.startswith(("shapes_", "few"))]
    assert {name.split("_")[0] for name in rows} == {"shapes", "few100", "few25", "few25b"}
    for name in rows:
        row = content(name)
        task, net = row["model"]["init_args"], row["model"]["init_args"]["net"]["init_args"]
        known = start["model"]["init_args"]["net"]["init_args"]
        assert net["boxes"].pop("samples") <= known["boxes"]["samples"]  # of training, in which the boxes have no part
        assert {key: net[key] for key in net if key not in ("evolve", "penalty", "norm_scale", "horizon")} == {
            **known,
            "boxes": {key: known["boxes"][key] for key in net["boxes"]},
        }
        assert task["weights"] == "runs/start_shapes/version_0/weights/last.safetensors"
        assert task["without"] == task["trained"] == masks
        images, seen = (each["data"]["init_args"]["source"]["init_args"] for each in (row, start))
        assert images["seed"] != seen.get("seed", 0)
        others = {"seed": 0, "train": 0, "val": 0}
        assert {**images, **others} == {**seen, **others}


def test_rows_of_few_images_see_as_many_as_those_of_many() -> None:
    seen = {}
    for path in FILES:
        if path.stem.startswith(("shapes_", "few")):
            row = content(path.stem)
            seen[path.stem] = row["data"]["init_args"]["source"]["init_args"]["train"] * row["trainer"]["max_epochs"]
            assert row["trainer"].get("check_val_every_n_epoch", 1) == row["trainer"]["max_epochs"]
    assert set(seen.values()) == {4_000}


def test_the_second_draw_of_few_images_is_of_others_and_nothing_else() -> None:
    for name in ("fpn", "rfpn_crbp5"):
        first, second = content(f"few25_{name}"), content(f"few25b_{name}")
        seeds = [row["data"]["init_args"]["source"]["init_args"].pop("seed") for row in (first, second)]
        assert first == second
        assert len({0, *seeds}) == 3  # 0 is that of the start


@pytest.mark.parametrize("path", [path for path in FILES if path.stem.startswith("mini_")], ids=lambda path: path.stem)
def test_small_rows_have_the_small_settings(path: Path) -> None:
    given = content(path.stem)["model"]["init_args"]["net"]["init_args"]
    side = content(path.stem)["data"]["init_args"]["shortest_test"]
    for part, wanted in mini_settings(side).items():
        if part == "depth":
            assert given[part] == wanted
        else:
            lists = {name: tuple(value) if isinstance(value, list) else value for name, value in given[part].items()}
            assert type(wanted)(**lists) == wanted


@pytest.mark.parametrize("name", COCO)
def test_the_published_schedule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, first, second = (270_000, 210_000, 250_000) if name.endswith("3x") else (90_000, 60_000, 80_000)
    made, given = unfilled(name), content(name)["trainer"]
    assert (given["max_steps"], made.data.batch_size * given["accumulate_grad_batches"]) == (steps, 16)
    assert given["gradient_clip_val"] is None
    stand_in = SimpleNamespace(
        estimated_stepping_batches=given["max_steps"],
        accumulate_grad_batches=given["accumulate_grad_batches"],
        world_size=1,
        datamodule=made.data,
    )
    monkeypatch.setattr(PanopticTask, "trainer", stand_in)
    chosen = made.model.configure_optimizers()
    optimizer, scheduler = chosen["optimizer"], chosen["lr_scheduler"]["scheduler"]
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.0]
    rates = {step: scheduler.base_lrs[0] * scheduler.lr_lambdas[0](step) for step in (
        0, 500, 1_000, first - 1, first, second - 1, second, steps - 1
    )}  # fmt: skip
    assert rates == pytest.approx({
        0: 0.00002, 500: 0.02 * 0.5005, 1_000: 0.02, first - 1: 0.02,
        first: 0.002, second - 1: 0.002, second: 0.0002, steps - 1: 0.0002,
    })  # fmt: skip


def test_the_published_methods() -> None:
    steps = {path.stem: content(path.stem)["model"]["init_args"]["net"]["init_args"] for path in FILES}
    assert {name: net["evolve"]["steps"] for name, net in steps.items() if name.startswith("rfpn_r50")} == {
        f"rfpn_r50_{method}_1x": n
        for method, n in (
            ("bptt1", 1), ("bptt2", 2), ("bptt3", 3), ("bptt5", 5), ("crbp5", 5), ("crbp10", 10), ("crbp20", 20),
            ("rbp20", 20),
        )
    }  # fmt: skip
    penalty = steps["rfpn_r50_crbp20_1x"]["penalty"]["init_args"]
    assert penalty == {"weight": 0.001, "bound": 0.95, "reduction": "sum_square"}
    assert "penalty" not in steps["rfpn_r50_rbp20_1x"]


@pytest.mark.parametrize("name", COCO)
def test_rows_on_coco_take_torchvision_s_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(depth: int) -> dict[str, torch.Tensor]:
        asked.append(depth)
        with torch.device("meta"):
            return getattr(torchvision.models, f"resnet{depth}")().state_dict()

    monkeypatch.setattr(checkpoints, "_download", download)
    task = unfilled(name).model
    assert task.weights == "imagenet"
    assert task.net.pixels == PixelSettings.torchvision()
    load_weights(task.net, task.weights)
    assert asked == [101 if "r101" in name else 50]


def test_processes_share_the_statistics_of_the_output_norm() -> None:
    rows = {name: content(name)["trainer"]["sync_batchnorm"] for name in COCO if name.startswith("rfpn")}
    assert rows
    assert all(rows.values())
    settings = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "logger": False}
    trainer = pl.Trainer(**settings, sync_batchnorm=rows["rfpn_r50_crbp20_1x"])
    with torch.device("meta"):
        task = build("rfpn_r50_crbp20_1x").model
    frozen = [name for name, module in task.named_modules() if isinstance(module, FrozenBatchNorm2d)]
    assert frozen
    shared = dict(trainer.strategy._layer_sync.apply(task).named_modules())  # type: ignore[attr-defined]
    norms = {name for name, module in shared.items() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    assert norms == {"net.roi_heads.mask_head.output_norm"}
    assert isinstance(shared["net.roi_heads.mask_head.output_norm"], nn.SyncBatchNorm)
    assert all(type(shared[name]) is FrozenBatchNorm2d for name in frozen)
