from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_contours import LEAF_SPEC, Lines, tiny_data, tiny_task, trainer
from torch.utils.data import Dataset

from crbp.errors import SettingsError
from crbp.tasks import ContourData, FrobeniusPenalty, Generated, Stages
from crbp.tasks._resume import LastCheckpoint
from crbp.tasks.sampling import EpochSampler, ResumableLoader

pytestmark = [
    pytest.mark.filterwarnings(LEAF_SPEC),
    # Meant: a resumed run goes on in its own folder.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def order(**settings: Any) -> list[Any]:
    epoch = settings.pop("epoch", 0)
    sampler = EpochSampler(**{"size": 23, "seed": 3, "shuffle": True, "flips": True, **settings})
    sampler.set_epoch(epoch)
    return list(sampler)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    assert order() == order()
    assert order() != order(epoch=1)
    assert order() != order(seed=4)
    assert sorted(key.item for key in order()) == list(range(23))
    assert order(seed=2, epoch=3) != order(seed=3, epoch=2)


def test_flips_are_drawn_only_where_asked_for() -> None:
    assert {key[1:] for key in order(size=100)} == {(a, b) for a in (False, True) for b in (False, True)}
    assert {key[1:] for key in order(flips=False)} == {(False, False)}


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_batches_of_one(world_size: int) -> None:
    shares = [order(rank=rank, world_size=world_size) for rank in range(world_size)]
    whole = order()
    for batch in range(2):
        together = {key for share in shares for key in share[3 * batch : 3 * (batch + 1)]}
        assert together == set(whole[3 * world_size * batch : 3 * world_size * (batch + 1)])
    assert len({len(share) for share in shares}) == 1


def test_ordered_shares_hold_every_image_once() -> None:
    shares = [order(rank=rank, world_size=4, shuffle=False, flips=False) for rank in range(4)]
    assert sorted(key.item for share in shares for key in share) == list(range(23))


def test_flips_turn_image_and_mask_alike() -> None:
    plain = tiny_data(flips=False).train_dataloader()
    data = tiny_data()
    for item in data.train_dataloader().dataset.__getitems__(list(order(size=22))):  # type: ignore[attr-defined]
        assert bool((item["mask"] <= (item["image"][0] > 0)).all())
    assert len(plain) == len(data.train_dataloader()) == 5


def test_an_epoch_begins_with_the_lead_in_once() -> None:
    assert [key.item for key in order(lead_in=7)][:7] == list(range(23, 30))
    assert order(lead_in=7)[7:] == order()[7:]
    assert order(lead_in=7, epoch=1) == order(epoch=1)
    shares = [order(lead_in=7, rank=rank, world_size=2) for rank in range(2)]
    assert {key.item for share in shares for key in share[:3]} == set(range(23, 29))


def test_lead_in_and_what_follows_are_told_apart() -> None:
    long, short = Generated(preset="mini"), Generated(preset="mini", settings={"contour_length": 3})
    data = ContourData(long, lead_in=short, lead_in_size=6, batch_size=4, train_size=12, workers=0, flips=False)
    first, second, third = list(data.train_dataloader())
    wanted = short.items("train", 6, 0)
    got = torch.cat([first["image"], second["image"][:2]])
    assert torch.equal(got, torch.stack([wanted[i]["image"] for i in range(6)]))
    ordinary = ContourData(long, batch_size=4, train_size=12, workers=0, flips=False)
    assert torch.equal(third["image"], list(ordinary.train_dataloader())[2]["image"])


def test_stages_follow_each_other() -> None:
    short, long = (Generated(preset="mini", settings={"contour_length": length}) for length in (3, 5))
    stages = Stages(sources=[short, long, short], sizes=[2, 3])
    found = stages.items("train", 7, 0)
    wanted = [*short.items("train", 2, 0), *long.items("train", 3, 0), *short.items("train", 2, 0)]  # type: ignore[call-overload]
    for index, item in enumerate(wanted):
        torch.testing.assert_close(found[index]["image"], item["image"])
    assert torch.equal(stages.items("train", 4, 0)[3]["image"], wanted[3]["image"])
    with pytest.raises(ValueError, match="one number for each source but the last"):
        Stages(sources=[short], sizes=[4])


def test_a_lead_in_longer_than_an_epoch_fills_the_first() -> None:
    data = tiny_data(lead_in=Lines(), lead_in_size=100, flips=False)
    assert data.lead_in_size == 22
    assert [key.item for key in data.train_dataloader().sampler] == list(range(22, 44))


def test_a_lead_in_of_another_size_is_refused() -> None:
    data = tiny_data(lead_in=Generated(preset="mini"), lead_in_size=4)
    with pytest.raises(ValueError, match=r"\(1, 32, 32\) and \(1, 12, 12\)"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lead_in": Lines()}, "go together"),
        ({"lead_in_size": 4}, "go together"),
        ({"lead_in": Lines(), "lead_in_size": -1}, "lead_in_size"),
    ],
)
def test_a_lead_in_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_data(**settings)


def states(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


def fit(folder: Path, resume: Path | None = None, **settings: Any) -> Path:
    keep = ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, **settings)
    # The penalty draws random numbers, so that their state has to be taken up as well.
    task = tiny_task(penalty=FrobeniusPenalty(weight=0.1))
    trainer(folder, max_epochs=3, callbacks=[keep]).fit(task, tiny_data(workers=0), ckpt_path=resume, weights_only=True)
    return folder


@pytest.mark.parametrize(
    ("settings", "resume", "last"),
    [
        ({}, "epoch=0-step=5.ckpt", "epoch=2-step=15.ckpt"),
        ({"every_n_train_steps": 1}, "epoch=1-step=7.ckpt", "epoch=2-step=15.ckpt"),
        ({"every_n_train_steps": 1}, "epoch=0-step=5.ckpt", "epoch=2-step=15.ckpt"),
    ],
    ids=["end of an epoch", "middle of an epoch", "last batch of an epoch"],
)
def test_resumed_run_equals_uninterrupted_one(tmp_path: Path, settings: dict[str, Any], resume: str, last: str) -> None:
    whole = states(fit(tmp_path, **settings) / last)
    (tmp_path / last).unlink()
    torch.manual_seed(99)
    resumed = states(fit(tmp_path, tmp_path / resume, **settings) / last)
    for name, value in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name
    torch.testing.assert_close(resumed["optimizer_states"], whole["optimizer_states"], rtol=0, atol=0)
    assert torch.equal(resumed["rng"]["cpu"], whole["rng"]["cpu"])


@pytest.mark.parametrize("seen", [0, 4, 8, 16, 20])
@pytest.mark.parametrize(("batch", "processes"), [(4, 1), (2, 2), (1, 4), (2, 1), (8, 1), (3, 2)])
def test_the_images_left_of_an_epoch_are_shared_out_anew(seen: int, batch: int, processes: int) -> None:
    whole = order(size=22)
    shares = []
    for rank in range(processes):
        sampler = EpochSampler(22, seed=3, shuffle=True, flips=True, rank=rank, world_size=processes)
        loader = ResumableLoader(_Keys(), sampler, batch_size=batch, drop_last=True, collate_fn=list)
        loader.load_state_dict({"epoch": 0, "images": seen})
        done = loader.batches_done(0)
        shares.append([key for each in loader for key in each])
        assert len(shares[-1]) == batch * (len(loader) - done)
    left = [key for share in shares for key in share]
    assert len(set(left)) == len(left)
    assert set(left) == set(whole[seen : seen + len(left)])
    assert 22 - seen - len(left) < batch * processes


@pytest.mark.parametrize(("size", "said"), [(1, "there is 1;"), (3, "there are 3;")])
def test_fewer_images_than_processes_are_refused_by_all_of_them(size: int, said: str) -> None:
    for rank in range(4):
        with pytest.raises(SettingsError, match=f"each of the 4 processes needs an image .* {said} lower"):
            EpochSampler(size, seed=0, shuffle=False, flips=False, rank=rank, world_size=4)
    assert len(EpochSampler(4, seed=0, shuffle=False, flips=False, rank=3, world_size=4)) == 1


def fit_plainly(folder: Path, batch: int, resumed: Path | None = None, **settings: Any) -> tuple[Any, list[int]]:
    """Train with a loss that is a mean over images, and no random number whose use depends on the number of batches."""
    task = tiny_task(residual_weight=0.0, step_jitter=0)
    seen = _Seen()
    keep = ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, every_n_train_steps=1)
    going = trainer(folder, max_epochs=2, callbacks=[seen, *([] if resumed else [keep])], **settings)
    going.fit(task, tiny_data(train_size=20, batch_size=batch), ckpt_path=resumed, weights_only=True)
    assert (going.global_step, going.current_epoch) == (10, 2)
    return task.state_dict(), seen.labels


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[int]]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("whole")
    return folder, *fit_plainly(folder, 4)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.parametrize("resume", ["epoch=0-step=3.ckpt", "epoch=0-step=5.ckpt", "epoch=1-step=7.ckpt"])
def test_a_run_goes_on_with_batches_of_another_size(whole: Any, tmp_path: Path, resume: str) -> None:
    """In the middle of an epoch and at its last batch: each image once, the same steps, the same end."""
    folder, weights, order = whole
    again, rest = fit_plainly(tmp_path, 2, folder / resume, accumulate_grad_batches=2)
    assert rest == order[-len(rest) :]
    assert len(rest) == 40 - 4 * int(resume.split("=")[2].removesuffix(".ckpt"))
    for name, value in weights.items():
        torch.testing.assert_close(again[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
def test_another_number_of_images_a_step_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, every_n_train_steps=1)
    message = "trained with 4 images an optimiser step, this run has 2, .* choose data.batch_size, devices"
    with pytest.raises(SettingsError, match=message):
        trainer(tmp_path, max_epochs=3).fit(
            tiny_task(penalty=FrobeniusPenalty(weight=0.1)),
            tiny_data(batch_size=2),
            ckpt_path=tmp_path / "epoch=1-step=7.ckpt",
            weights_only=True,
        )
    trainer(tmp_path).validate(
        tiny_task(penalty=FrobeniusPenalty(weight=0.1)),
        tiny_data(batch_size=2),
        ckpt_path=tmp_path / "epoch=1-step=7.ckpt",
        weights_only=True,
        verbose=False,
    )


def test_a_place_counted_in_batches_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"\['batches', 'epoch'\], not as epoch and images"):
        tiny_data().train_dataloader().load_state_dict({"epoch": 0, "batches": 2})


class _Keys(Dataset[Any]):
    def __getitem__(self, key: Any) -> Any:
        return key


class _Seen(pl.Callback):
    """The images that training has seen, in order."""

    def __init__(self) -> None:
        self.labels: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.labels += batch["label"].tolist()


def test_the_last_checkpoint_is_of_the_last_step_whatever_is_best(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val/residual", mode="max", save_top_k=1)
    fit = trainer(tmp_path, max_epochs=1, val_check_interval=2, callbacks=[best, LastCheckpoint()])
    fit.fit(tiny_task(), tiny_data())
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == fit.global_step == 5
    for name, value in fit.lightning_module.state_dict().items():
        assert torch.equal(value, saved["state_dict"][name])
