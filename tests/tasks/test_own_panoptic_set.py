"""A panoptic set of one's own, with its own list of categories: its classes in targets and truths, a batch of it."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from tiny_contours import LEAF_SPEC
from tiny_shapes import SHAPES, tiny_net, trainer

from crbp.data.panoptic import DataError, write_shapes
from crbp.tasks import GeneratedShapes, PanopticBatch, PanopticData, PanopticTask

pytestmark = [
    pytest.mark.filterwarnings(LEAF_SPEC),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]

SIZES = {"batch_size": 2, "shortest": (128,), "shortest_test": 128, "longest": 128}
OWN = [
    {"id": each["id"], "name": f"own {each['name']}", "isthing": each["isthing"]}
    for each in reversed(SHAPES.categories.as_json())
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shapes in folders of other names than COCO's, whose panoptic JSON has no categories."""
    made = tmp_path_factory.mktemp("own")
    write_shapes(made, images=(3, 2), size=128, workers=1, progress=False)
    for split in ("train", "val"):
        (made / split).rename(made / f"photographs of {split}")
        (made / f"panoptic_{split}").rename(made / f"segments of {split}")
        (made / f"instances_{split}.json").unlink(missing_ok=True)
        content = json.loads((made / f"panoptic_{split}.json").read_text(encoding="utf-8"))
        del content["categories"]
        (made / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
        (made / f"panoptic_{split}.json").unlink()
    (made / "classes.json").write_text(json.dumps(OWN), encoding="utf-8")
    return made


def own_files(folder: Path, *splits: str) -> dict[str, Any]:
    """Of `CocoSource`, as a configuration names them."""
    return {
        split: {
            "images": str(folder / f"photographs of {split}"),
            "panoptic": str(folder / f"{split}.json"),
            "labels": str(folder / f"segments of {split}"),
            "categories": str(folder / "classes.json"),
        }
        for split in splits
    }


def built(source: str, given: dict[str, Any], *words: str, **settings: Any) -> PanopticData:
    """Data of a source of `crbp.tasks`, with what a command line adds."""
    described = {"class_path": f"crbp.tasks.{source}", "init_args": given}
    content = {"class_path": "crbp.tasks.PanopticData", "init_args": {**SIZES, **settings, "source": described}}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PanopticData, "data")
    made: PanopticData = parser.instantiate(parser.parse_args(["--data", json.dumps(content), *words])).data
    return made


def own(folder: Path, *splits: str, **settings: Any) -> PanopticData:
    """The set as a configuration names it."""
    return built("CocoSource", own_files(folder, *splits), **settings)


def test_an_own_set_has_the_classes_of_its_own_list(folder: Path) -> None:
    data = own(folder, "train", "val", workers=0)
    assert [(each.id, each.name) for each in data.categories.entries] == [(each["id"], each["name"]) for each in OWN]
    shapes = GeneratedShapes(size=128, train=3, val=2)
    train, wanted_train = (each.split("train", data.resize) for each in (data.source, shapes))
    assert len(train) == 3
    assert torch.equal(train[0][0], wanted_train[0][0])
    generated = PanopticData(shapes, workers=0, **SIZES)
    pairs = list(zip(data.val_dataloader(), generated.val_dataloader(), strict=True))
    assert len(pairs) == 2
    for found, wanted in pairs:
        assert torch.equal(found.images[0], wanted.images[0])
        ((labels, semantic), (their_labels, their_semantic)) = (
            (batch.targets[0]["labels"], batch.targets[0]["semantic"]) for batch in (found, wanted)
        )
        assert torch.equal(labels, 9 - their_labels)
        own_stuff = torch.where((their_semantic > 0) & (their_semantic < 255), 7 - their_semantic, their_semantic)
        assert torch.equal(semantic, own_stuff)
        ((ids, segments), (their_ids, their_segments)) = found.truths[0], wanted.truths[0]
        assert torch.equal(ids, their_ids)
        assert segments == their_segments


def test_a_network_is_trained_on_a_batch_of_an_own_set_that_another_process_has_made(folder: Path) -> None:
    seen: list[PanopticBatch] = []

    class Spy(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, task: pl.LightningModule, batch: Any, _: int) -> None:
            seen.append(batch)

    task = PanopticTask(tiny_net("fpn"), optimizer="adamw", warmup_steps=0)
    before = task.net.semantic_head.predictor.weight.clone()
    fit = trainer(folder, max_steps=1, callbacks=[Spy()], enable_checkpointing=False)
    fit.fit(task, own(folder, "train", "val", workers=1))
    assert fit.train_dataloader.num_workers == 1
    assert fit.callback_metrics["train/loss"].isfinite()
    assert not torch.equal(task.net.semantic_head.predictor.weight, before)
    (batch,), (wanted, *_) = seen, own(folder, "train", "val", workers=0).train_dataloader()
    for image, target, own_image, own_target in zip(*batch[:2], *wanted[:2], strict=True):
        assert torch.equal(image, own_image)
        for name in ("boxes", "labels", "masks", "semantic"):
            assert torch.equal(target[name], own_target[name])
    assert len({target["image_id"] for target in batch.targets}) == 2


def test_a_set_without_images_to_train_on_can_be_measured_alone(folder: Path) -> None:
    data = own(folder, "val", workers=0)
    assert len(list(data.val_dataloader())) == 2
    with pytest.raises(DataError, match=r"no files are given for the split 'train'; set source\.train"):
        data.train_dataloader()


@pytest.fixture
def half_empty(folder: Path, tmp_path: Path) -> Callable[[int], Path]:
    """Makes a copy of the set in which the things of the first images of training are called stuff."""

    def make(images: int) -> Path:
        copy = shutil.copytree(folder, tmp_path / "copy")
        content = json.loads((copy / "train.json").read_text(encoding="utf-8"))
        (stuff, *_) = (each["id"] for each in OWN if not each["isthing"])
        for annotation in content["annotations"][:images]:
            for segment in annotation["segments_info"]:
                segment |= {"category_id": stuff, "iscrowd": 0}
        (copy / "train.json").write_text(json.dumps(content), encoding="utf-8")
        return copy

    return make


def in_training(data: PanopticData) -> int:
    return len(data.train_dataloader().dataset)  # type: ignore[arg-type]


def test_images_without_things_are_left_out_of_training_which_is_told_once(
    folder: Path, half_empty: Callable[[int], Path], caplog: pytest.LogCaptureFixture
) -> None:
    found = half_empty(1)
    caplog.set_level(logging.INFO, "lightning.pytorch")
    assert in_training(own(found, "train", "val", workers=0)) == 2
    (told,) = (line for line in caplog.messages if "things" in line)
    assert told.startswith(f"{found / 'train.json'}: 1 of 3 images have no things")
    assert "\n" not in told
    caplog.clear()
    assert in_training(own(folder, "train", "val", workers=0)) == 3
    shutil.copy(found / "train.json", found / "val.json")
    for kind in ("photographs", "segments"):
        shutil.rmtree(found / f"{kind} of val")
        shutil.copytree(found / f"{kind} of train", found / f"{kind} of val")
    assert len(own(found, "val", workers=0).val_dataloader()) == 3
    assert not any("things" in line for line in caplog.messages)


@pytest.mark.parametrize("source", ["Coco", "CocoSource"])
def test_stuff_alone_is_trained_on_with_the_option_that_the_error_names(
    half_empty: Callable[[int], Path], source: str
) -> None:
    found = half_empty(3)
    given = own_files(found, "train", "val")
    if source == "Coco":
        for split in ("train", "val"):
            (found / f"photographs of {split}").rename(found / split)
            (found / f"segments of {split}").rename(found / f"panoptic_{split}")
            content = json.loads((found / f"{split}.json").read_text(encoding="utf-8")) | {"categories": OWN}
            (found / f"panoptic_{split}.json").write_text(json.dumps(content), encoding="utf-8")
        given = {"root": str(found), "train": "train", "val": "val"}
    with pytest.raises(DataError, match="no image of 3 has things") as raised:
        built(source, given, workers=0).train_dataloader()
    (option,) = re.findall(r"\((--data.*?)\)", str(raised.value))
    data = built(source, given, *option.split(), workers=0)
    assert in_training(data) == 3
    fit = trainer(found, max_steps=1, enable_checkpointing=False)
    fit.fit(PanopticTask(tiny_net("rfpn"), optimizer="adamw", warmup_steps=0), data)
    assert fit.callback_metrics["train/loss"].isfinite()
