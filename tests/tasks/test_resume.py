from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_contours import LEAF_SPEC, Lines, tiny_data, tiny_task, trainer

from crbp.tasks import ContourData, FrobeniusPenalty, Generated, Stages
from crbp.tasks._resume import LastCheckpoint
from crbp.tasks.sampling import EpochSampler

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


def test_the_last_checkpoint_is_of_the_last_step_whatever_is_best(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val/residual", mode="max", save_top_k=1)
    fit = trainer(tmp_path, max_epochs=1, val_check_interval=2, callbacks=[best, LastCheckpoint()])
    fit.fit(tiny_task(), tiny_data())
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == fit.global_step == 5
    for name, value in fit.lightning_module.state_dict().items():
        assert torch.equal(value, saved["state_dict"][name])
