"""Panoptic segmentation as a training task: what it optimises, measures, writes, and how it resumes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchvision
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from tiny_contours import LEAF_SPEC
from tiny_shapes import SHAPES, tiny_data, tiny_net, trainer, true_result

import crbp
from crbp.data.panoptic import Categories, DataError, write_shapes
from crbp.metrics import evaluate_panoptic_files
from crbp.models import RFPN, FeedForwardNet, PanopticFPN
from crbp.models.panoptic import PanopticResult, mini_settings
from crbp.models.panoptic.settings import PixelSettings
from crbp.tasks import Coco, Origin, PanopticBatch, PanopticData, PanopticTask, WeightsError, save_net
from crbp.tasks.panoptic import segments_info
from crbp.tasks.weights import build

pytestmark = [
    pytest.mark.filterwarnings(LEAF_SPEC),
    # Meant: a second run in the folder of the first.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Knowing(torch.nn.Module):
    """Stands in for the network in `PanopticTask`: knows the truth of each image."""

    def __init__(self, data: PanopticData) -> None:
        super().__init__()
        self.things, self.stuff = len(data.categories.things), len(data.categories.stuff)
        self.results = [true_result(batch.truths[0], data.categories) for batch in data.val_dataloader()]

    def forward(self, images: Any, sizes: Any) -> list[PanopticResult]:
        return [self.results.pop(0)]


def test_a_network_without_mistakes_has_quality_and_precision_of_one(tmp_path: Path) -> None:
    data = tiny_data()
    task = PanopticTask(Knowing(data))  # type: ignore[arg-type]
    (found,) = trainer(tmp_path).test(task, data, verbose=False)
    assert {name: found[f"test/{name}"] for name in ("pq", "sq", "rq", "pq_things", "pq_stuff")} == {
        "pq": 1, "sq": 1, "rq": 1, "pq_things": 1, "pq_stuff": 1,
    }  # fmt: skip
    assert found["test/mask_ap"] == pytest.approx(1)
    assert found["test/box_ap"] == pytest.approx(1)


def test_results_of_a_test_are_written_in_the_official_form(tmp_path: Path) -> None:
    write_shapes(tmp_path / "set", images=(1, 3), size=128, workers=1, progress=False)
    source = Coco(root=str(tmp_path / "set"), train="train", val="val")
    data = PanopticData(source, shortest=(128,), shortest_test=128, longest=128, workers=0)
    task = PanopticTask(Knowing(data), results=str(tmp_path / "mine.json"))  # type: ignore[arg-type]
    trainer(tmp_path).test(task, data, verbose=False)
    found = evaluate_panoptic_files(tmp_path / "set" / "panoptic_val.json", None, tmp_path / "mine.json", None)
    assert found["pq"] == 1


def test_segments_are_named_by_the_ids_of_the_data_set() -> None:
    categories = Categories(
        [
            {"id": 7, "name": "a", "isthing": 1},
            {"id": 3, "name": "b", "isthing": 0},
            {"id": 9, "name": "c", "isthing": 1},
        ]
    )
    segments = [
        {"id": 1, "label": 1, "isthing": True, "score": 0.5, "area": 2},
        {"id": 2, "label": 1, "isthing": False, "area": 2},
    ]
    empty = torch.zeros(0)
    result = PanopticResult(
        panoptic=torch.ones(2, 2), segments=segments, boxes=empty, scores=empty, labels=empty, masks=empty
    )
    assert segments_info(result, categories) == [
        {"id": 1, "category_id": 9, "score": 0.5},
        {"id": 2, "category_id": 3},
    ]


@pytest.mark.parametrize("kind", ["fpn", "rfpn"])
def test_training_logs_every_part_of_the_loss(kind: str, tmp_path: Path) -> None:
    fit = trainer(tmp_path, limit_val_batches=1)
    task = PanopticTask(tiny_net(kind), optimizer="adamw", warmup_steps=0)
    before = [p.detach().clone() for p in task.parameters()]
    fit.fit(task, tiny_data())
    logged = {name: float(value) for name, value in fit.callback_metrics.items()}
    parts = {"rpn_class", "rpn_box", "box_class", "box_delta", "mask", "semantic"}
    parts |= {"penalty"} if kind == "rfpn" else set()
    assert logged["train/loss"] == pytest.approx(sum(logged[f"train/{part}"] for part in parts), rel=1e-5)
    assert ("train/backward_terms" in logged) == ("train/residual" in logged) == (kind == "rfpn")
    moved = sum(not torch.equal(a, b) for a, b in zip(before, task.parameters(), strict=True))
    assert moved > 0.9 * len(before)


def test_training_in_bfloat16_has_finite_losses_and_gradients(tmp_path: Path) -> None:
    seen, types = [], set()

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, task: pl.LightningModule, *_: Any) -> None:
            seen.append(dict(trainer.callback_metrics))
            for name, parameter in task.named_parameters():
                assert parameter.grad is not None, name
                assert parameter.grad.dtype == torch.float32, name
                assert parameter.grad.isfinite().all(), name

    net = tiny_net()
    for module in (net.backbone.body.conv1, net.mask_head.cell.excitation):
        module.register_forward_hook(lambda module, given, found: types.add(found.dtype))
    task = PanopticTask(net, optimizer="adamw", warmup_steps=0)
    before = {name: value.clone() for name, value in net.mask_head.named_parameters()}
    trainer(tmp_path, precision="bf16-mixed", callbacks=[Spy()]).fit(task, tiny_data(batch_size=1, shortest=(64,)))
    assert types == {torch.bfloat16}
    assert len(seen) == 2
    for logged in seen:
        assert {"train/loss", "train/penalty", "train/mask", "train/residual"} <= logged.keys()
        assert all(value.isfinite() for value in logged.values()), logged
        assert logged["train/penalty"] > 0
        assert logged["train/backward_terms"] == 2
    assert all(not torch.equal(value, before[name]) for name, value in net.mask_head.named_parameters())


@pytest.mark.parametrize(("batch", "accumulated"), [(2, 1), (1, 2)])
def test_the_rate_follows_the_batch_and_the_schedule(tmp_path: Path, batch: int, accumulated: int) -> None:
    rates = []

    class Spy(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    task = PanopticTask(tiny_net("fpn"), learning_rate=0.016, warmup_steps=2, milestones=(0.5, 0.75))
    data = tiny_data(batch_size=batch, shortest=(64,))
    settings = {"max_steps": 8, "max_epochs": 9, "accumulate_grad_batches": accumulated}
    trainer(tmp_path, **settings, callbacks=[Spy()]).fit(task, data)
    base = 0.016 * 2 / 16
    assert rates == pytest.approx([base * f for f in (0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01, 0.01)])
    decays = {
        id(parameter): group["weight_decay"]
        for group in task.trainer.optimizers[0].param_groups
        for parameter in group["params"]
    }
    norms = [m for m in task.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {decays[id(p)] for norm in norms for p in norm.parameters()} == {0.0}
    assert {decays[id(p)] for name, p in task.named_parameters() if name.endswith("conv1.weight")} == {1e-4}
    assert len(decays) == sum(p.requires_grad for p in task.parameters())


def test_the_rate_counts_the_images_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(
        estimated_stepping_batches=8, world_size=4, accumulate_grad_batches=2, datamodule=tiny_data(batch_size=3)
    )
    monkeypatch.setattr(PanopticTask, "trainer", stand_in)
    chosen: Any = PanopticTask(tiny_net("fpn"), learning_rate=0.016, reference_batch=48).configure_optimizers()
    assert chosen["lr_scheduler"]["scheduler"].base_lrs == pytest.approx([0.016 * 3 * 4 * 2 / 48] * 2)


def test_both_memories_of_the_optimiser_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(
        estimated_stepping_batches=8, world_size=1, accumulate_grad_batches=1, datamodule=tiny_data()
    )
    monkeypatch.setattr(PanopticTask, "trainer", stand_in)
    chosen: Any = PanopticTask(tiny_net("fpn"), optimizer="adamw", momentum=0.8, beta2=0.95).configure_optimizers()
    assert {group["betas"] for group in chosen["optimizer"].param_groups} == {(0.8, 0.95)}


def test_steps_of_evaluation_are_those_asked_for(tmp_path: Path) -> None:
    net = tiny_net()
    taken = []
    net.mask_head.register_forward_pre_hook(lambda *_: taken.append(net.steps))
    task = PanopticTask(net, steps=7, average_precision=False)
    trainer(tmp_path).test(task, tiny_data(val_size=1), verbose=False)
    assert taken == [7]
    assert net.steps == 3
    trainer(tmp_path, max_steps=1).fit(task, tiny_data())
    assert taken == [7, 3]


def test_a_resumed_run_sees_the_images_of_one_that_was_not_interrupted(tmp_path: Path) -> None:
    def seen(loader: Any) -> list[tuple[int, int, int]]:
        return [
            (target["image_id"], image.shape[1], int(image.sum()))
            for batch in loader
            for image, target in zip(batch.images, batch.targets, strict=True)
        ]

    whole = seen(tiny_data().train_dataloader())
    assert len({number for number, *_ in whole}) == len(whole) == 10
    data = tiny_data()
    batches = iter(data.train_dataloader())
    for _ in range(2):
        next(batches)
    again = tiny_data()
    again.load_state_dict(data.state_dict())
    assert seen(again.train_dataloader()) == whole[4:]


def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_interrupted(tmp_path: Path) -> None:
    """The sampling of anchors and proposals included, which draws from the random numbers of training."""
    ends = []
    for resumed in (None, tmp_path / "step=2.ckpt"):
        torch.manual_seed(1)
        task = PanopticTask(tiny_net(), optimizer="adamw", warmup_steps=0)
        keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        trainer(tmp_path, max_steps=4, max_epochs=1, callbacks=[keep]).fit(task, tiny_data(), ckpt_path=resumed)
        ends.append(task.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_pictures_are_predicted_with_the_checkpoint_alone(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_steps=1)
    fit.fit(PanopticTask(tiny_net("fpn")), tiny_data())
    fit.save_checkpoint(tmp_path / "one.ckpt")
    Image.new("RGB", (70, 64)).save(tmp_path / "picture.png")
    elsewhere = PanopticData(Coco(root="nowhere"), predict=str(tmp_path / "picture.png"), workers=0)
    task = PanopticTask(tiny_net("fpn"))
    trainer(tmp_path).predict(task, elsewhere, ckpt_path=tmp_path / "one.ckpt")
    assert task.categories is not None
    assert task.categories.as_json() == SHAPES.categories.as_json()
    again = trainer(tmp_path, callbacks=[task.prediction_writer(str(tmp_path))])
    with pytest.raises(crbp.SettingsError, match="written over"):
        again.predict(task, elsewhere, ckpt_path=tmp_path / "one.ckpt")


def test_weights_to_start_from_are_taken_once(tmp_path: Path) -> None:
    imagenet = torchvision.models.resnet18(norm_layer=lambda channels: torch.nn.GroupNorm(32, channels)).state_dict()
    torch.save(imagenet, tmp_path / "resnet18.pth")
    net = PanopticFPN(**mini_settings(128), things=10, stuff=6, pixels=PixelSettings.torchvision())
    task = PanopticTask(net, weights=str(tmp_path / "resnet18.pth"), warmup_steps=0)
    trainer(tmp_path, max_steps=1).fit(task, tiny_data())
    trained = net.backbone.state_dict()
    with pytest.raises(crbp.SettingsError, match=r"resnet18\.pth has a ResNet alone, and the rest is untrained"):
        PanopticTask(net, weights=str(tmp_path / "resnet18.pth")).on_validation_start()
    (tmp_path / "resnet18.pth").unlink()
    task.on_fit_start()  # as a second run of the same task does
    assert all(torch.equal(value, trained[name]) for name, value in net.backbone.state_dict().items())


def test_a_recurrent_network_starts_from_weights_of_a_panoptic_fpn(tmp_path: Path) -> None:
    sizes = {"backbone": {"norm": "group", "width": 16, "channels": 32}, "masks": {"channels": 32}}
    settings = {"depth": 18, "things": 10, "stuff": 6, **sizes}
    described = {"class_path": "crbp.models.PanopticFPN", "init_args": settings}
    fpn = build(PanopticFPN, described, "a network")
    save_net(fpn.state_dict(), tmp_path / "fpn.safetensors", Origin(net=described))
    net = build(RFPN, {**described, "class_path": "crbp.models.RFPN"}, "a network")
    PanopticTask(net, weights=str(tmp_path / "fpn.safetensors"), without=("roi_heads.mask_head.",)).on_fit_start()
    given = {name: value for name, value in fpn.state_dict().items() if not name.startswith("roi_heads.mask_head.")}
    assert all(torch.equal(net.state_dict()[name], value) for name, value in given.items())


def test_training_does_not_start_from_weights_of_another_kind_of_network(tmp_path: Path) -> None:
    described = {"class_path": "crbp.models.FeedForwardNet", "init_args": {"channels": 4, "kernel_size": 3}}
    net = build(FeedForwardNet, described, "a network")
    save_net(net.state_dict(), tmp_path / "net.safetensors", Origin(net=described))
    task = PanopticTask(tiny_net("fpn"), weights=str(tmp_path / "net.safetensors"))
    with pytest.raises(WeightsError, match=r"net.safetensors holds a FeedForwardNet"):
        task.on_fit_start()


def test_nothing_is_left_out_where_there_are_no_weights() -> None:
    with pytest.raises(ValueError, match="there are none to start from"):
        PanopticTask(tiny_net("fpn"), without=("rpn.",))


@pytest.mark.parametrize("part", ["roi_heads.mask_head.", "backbone.body.bn1."])
def test_what_is_not_trained_stays_as_it_is(tmp_path: Path, part: str) -> None:
    net = tiny_net(norm="batch")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    task = PanopticTask(net, trained=(part,), average_precision=False, warmup_steps=0)
    # Validation in between puts every module into evaluation mode and back.
    trainer(tmp_path, max_steps=2, val_check_interval=1, limit_val_batches=1).fit(task, tiny_data())
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    wanted = {name for name in before if name.startswith(part)}
    assert any(name.endswith("running_mean") for name in before.keys() - wanted)
    assert moved == wanted


def test_names_of_what_is_trained_must_fit() -> None:
    with pytest.raises(ValueError, match=r"'mask_head\.'; parts are backbone\., roi_heads\., rpn\."):
        PanopticTask(tiny_net("fpn"), trained=["mask_head."])
    net = tiny_net("fpn")
    net.rpn.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing to train has a name that begins with 'rpn\.'"):
        PanopticTask(net, trained=["rpn."])
    with pytest.raises(ValueError, match=r"without=\['rpn\.'\] is neither taken from weights nor trained"):
        PanopticTask(tiny_net("fpn"), weights="imagenet", without=("rpn.",), trained=["semantic_head."])
    with pytest.raises(TypeError, match=r"not the text 'rpn\.'"):
        PanopticTask(tiny_net("fpn"), trained="rpn.")


def test_training_images_must_make_a_batch() -> None:
    with pytest.raises(DataError, match="10 training images make no batch of 11"):
        tiny_data(batch_size=11).train_dataloader()


def test_the_network_must_have_the_classes_of_the_data(tmp_path: Path) -> None:
    task = PanopticTask(PanopticFPN(**mini_settings(128), things=3, stuff=6))
    with pytest.raises(crbp.SettingsError, match="set things=10 and stuff=6"):
        trainer(tmp_path).test(task, tiny_data(), verbose=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adam"}, "optimizer"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"momentum": 1.0}, "momentum"),
        ({"beta2": 1.0}, "beta2"),
        ({"milestones": (0.9, 0.5)}, "milestones must rise"),
        ({"milestones": (1.5,)}, "milestones"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"steps": 30}, "needs a recurrent mask head"),
    ],
)
def test_values_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PanopticTask(tiny_net("fpn"), **settings)


def test_weights_that_cannot_be_read_are_an_error_before_training(tmp_path: Path) -> None:
    task = PanopticTask(tiny_net("fpn"), weights=str(tmp_path / "nothing.pkl"))
    with pytest.raises(crbp.CrbpError, match=r"nothing\.pkl"):
        trainer(tmp_path).fit(task, tiny_data())


def test_what_cannot_be_predicted_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        tiny_data(predict=str(tmp_path / "none.png")).predict_dataloader()
    with pytest.raises(DataError, match="holds no image"):
        tiny_data(predict=str(tmp_path)).predict_dataloader()
    for name in ("a.png", "a.jpg", "b_panoptic.png", "a_map.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    with pytest.raises(DataError, match="two images are called a,"):
        tiny_data(predict=str(tmp_path)).predict_dataloader()
    (tmp_path / "a.jpg").unlink()
    assert len(tiny_data(predict=str(tmp_path)).predict_dataloader()) == 3
    Image.new("RGB", (4, 4)).save(tmp_path / "b.jpg")
    with pytest.raises(DataError, match=r"the map of b and the picture of b_panoptic would both be b_panoptic\.png"):
        tiny_data(predict=str(tmp_path)).predict_dataloader()


def test_a_written_set_gives_the_images_of_the_generated_one(tmp_path: Path) -> None:
    write_shapes(tmp_path / "set", images=(3, 2), size=128, workers=1, progress=False)
    source = Coco(root=str(tmp_path / "set"), train="train", val="val")
    assert source.categories.as_json() == SHAPES.categories.as_json()
    settings = {"batch_size": 1, "shortest": (128,), "shortest_test": 128, "longest": 128, "workers": 0}
    read, made = PanopticData(source, **settings), tiny_data(batch_size=1, val_size=2)
    for got, wanted in zip(read.val_dataloader(), made.val_dataloader(), strict=True):
        assert isinstance(got, PanopticBatch)
        assert torch.equal(got.images[0], wanted.images[0])
        assert torch.equal(got.targets[0]["masks"], wanted.targets[0]["masks"])
        assert torch.equal(got.truths[0][0], wanted.truths[0][0])
    with pytest.raises(DataError, match=r"panoptic_train2017\.json"):
        Coco(root=str(tmp_path / "set")).split("train", read.augment)
