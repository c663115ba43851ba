"""Panoptic models in several processes: gradients, images without an instance, uneven shares, metrics."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import in_ranks
from lightning.pytorch.strategies import DDPStrategy
from tiny_contours import LEAF_SPEC
from tiny_shapes import tiny_data, tiny_net, trainer, true_result
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from crbp.data.panoptic import PanopticDataset, Shapes
from crbp.data.panoptic.dataset import Scene
from crbp.models.panoptic import PanopticResult
from crbp.tasks import GeneratedShapes, PanopticBatch, PanopticData, PanopticTask

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks its processes"),
    pytest.mark.filterwarnings(LEAF_SPEC),
    # The processes are forked from one with a single thread of torch; Python cannot know that the others are idle.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]


class _Sparse(Shapes):
    """Every other image has crowds alone, and so no instance to learn from."""

    def scene(self, index: int) -> Scene:
        scene = super().scene(index)
        return scene._replace(crowd=scene.crowd | True) if index % 2 else scene


@dataclass(frozen=True, kw_only=True)
class Sparse(GeneratedShapes):
    def split(self, name: str, transform: Any) -> PanopticDataset:
        images = self.train if name == "train" else self.val
        split: Any = name
        return _Sparse(self.size, split=split, images=images, objects=self.objects, seed=self.seed, transform=transform)


def sparse_batch(rank: int) -> PanopticBatch:
    """The image of a process; that of the second has no instance."""
    data = PanopticData(
        Sparse(size=128, train=2, val=2),
        batch_size=1,
        shortest=(128,),
        shortest_test=128,
        longest=128,
        workers=0,
        flips=False,
    )
    items = data.train_dataloader().dataset
    image, target = items[rank]
    assert (len(target["boxes"]) == 0) == (rank == 1)
    return PanopticBatch([image], [target])


def gradient(net: Any, rank: int) -> dict[str, Tensor]:
    batch = sparse_batch(rank)
    torch.manual_seed(rank)  # of the samples of anchors and boxes
    torch.stack(list(net(batch.images, batch.targets).values())).sum().backward()
    return {name.removeprefix("module."): parameter.grad for name, parameter in net.named_parameters()}


def of_a_process(rank: int, kind: str) -> dict[str, Tensor]:
    return gradient(DistributedDataParallel(tiny_net(kind)), rank)


@pytest.mark.parametrize("kind", ["fpn", "rfpn"])
def test_processes_have_the_mean_of_their_gradients_though_one_has_no_instance(kind: str, tmp_path: Path) -> None:
    found = in_ranks(2, of_a_process, kind, folder=tmp_path)
    alone = [gradient(tiny_net(kind), rank) for rank in range(2)]
    for name in alone[0]:
        wanted = (alone[0][name] + alone[1][name]) / 2
        for each in found:
            torch.testing.assert_close(
                each[name], wanted, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
            )


def together(**settings: Any) -> dict[str, Any]:
    """Two processes that give up where one waits for the other in vain."""
    strategy = DDPStrategy(start_method="fork", timeout=timedelta(seconds=30), **settings)
    return {"devices": 2, "strategy": strategy}


def test_a_process_without_an_instance_for_a_whole_epoch_trains_on(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_steps=-1, max_epochs=2, limit_val_batches=1.0, **together())
    data = PanopticData(
        Sparse(size=128, train=2, val=3), batch_size=1, shortest=(128,), shortest_test=128, longest=128, workers=0
    )
    task = PanopticTask(tiny_net(), optimizer="adamw", warmup_steps=0)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    fit.fit(task, data)
    assert fit.callback_metrics["train/loss"].isfinite()
    assert "val/pq" in fit.callback_metrics
    moved = [name for name, value in task.net.named_parameters() if not torch.equal(value, before[f"net.{name}"])]
    assert len(moved) > 0.9 * len(list(task.net.parameters()))
    assert fit.callback_metrics["train/backward_failed"] <= 1  # of the one process that had a solve


class Remembering(torch.nn.Module):
    """Stands in for the network: knows an image by its pixels, and overlooks a segment in every other one."""

    def __init__(self, data: PanopticData) -> None:
        super().__init__()
        self.things, self.stuff = len(data.categories.things), len(data.categories.stuff)
        self.results: dict[int, PanopticResult] = {}
        for place, batch in enumerate(data.val_dataloader()):
            result = true_result(batch.truths[0], data.categories)
            if place % 2:
                gone = result.segments.pop(0)
                result.panoptic[result.panoptic == gone["id"]] = 0
                result.labels[:1] += 1
            self.results[int(batch.images[0].sum())] = result

    def forward(self, images: Any, sizes: Any) -> list[PanopticResult]:
        return [self.results[int(image.sum())] for image in images]


def test_processes_measure_what_one_does_with_uneven_shares(tmp_path: Path) -> None:
    data = tiny_data(val_size=3)
    found = []
    for settings in ({}, together()):
        task = PanopticTask(Remembering(data))  # type: ignore[arg-type]
        measure = trainer(tmp_path, limit_val_batches=1.0, **settings)
        found.append(
            {name: float(v) for name, v in measure.validate(task, tiny_data(val_size=3), verbose=False)[0].items()}
        )
    assert 0.3 < found[0]["val/pq"] < 1
    assert 0.3 < found[0]["val/mask_ap"] < 1
    assert found[1] == pytest.approx(found[0], rel=1e-6)
