"""A panoptic set of one's own, with its own list of categories: its classes in targets and truths, a batch of it."""

from __future__ import annotations

import json
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


def own(folder: Path, *splits: str, **settings: Any) -> PanopticData:
    """The set as a configuration names it."""
    files = {
        split: {
            "images": str(folder / f"photographs of {split}"),
            "panoptic": str(folder / f"{split}.json"),
            "labels": str(folder / f"segments of {split}"),
            "categories": str(folder / "classes.json"),
        }
        for split in splits
    }
    source = {"class_path": "crbp.tasks.CocoSource", "init_args": files}
    described = {"class_path": "crbp.tasks.PanopticData", "init_args": {**SIZES, **settings, "source": source}}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PanopticData, "data")
    made: PanopticData = parser.instantiate(parser.parse_object({"data": described})).data
    return made


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
