"""What the recurrence of the mask head costs: memory of training against its steps, and time beside Panoptic FPN.

    python benchmarks/panoptic_cost.py --out results/panoptic/cost.json

Untrained networks of one start, those of full size as the rows for COCO have them; R-FPN shares all weights with
Panoptic FPN but those of the mask head, so that both find the same boxes. Every box is kept, 100 of an image for
ResNet-50: what masks cost is then at its highest. In training the number of masks is that of the proposals which lie
on an object. The networks take turns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import FrozenBatchNorm2d

import crbp
from crbp.bench.measure import environment, in_turns, spread
from crbp.data.panoptic import Resize, Shapes, collate
from crbp.models import RFPN, PanopticFPN
from crbp.models.panoptic import BoxSettings, MergeSettings, mini_settings
from crbp.tasks import LipschitzPenalty

COUNTS = (5, 20, 100)  # steps
INSTANCES = (10, 100)  # of the image that is as large as one of COCO
PARTS = ("memory", "small", "full_size", "full_size_training")
Batch = tuple[list[Tensor], list[dict[str, Any]]]


def contracting(steps: int) -> dict[str, Any]:
    """What an R-FPN trained by C-RBP is made with."""
    penalty = LipschitzPenalty(weight=0.001, bound=0.95, reduction="sum_square")
    return {"evolve": crbp.Evolve(steps=steps, gradient=crbp.RBP(on_divergence="fallback")), "penalty": penalty}


def small() -> dict[str, Any]:
    """Settings of the small models that keep every box."""
    settings = mini_settings(192)
    return settings | {"boxes": replace(settings["boxes"], score=0.0), "things": 10, "stuff": 6}


def started(settings: dict[str, Any]) -> PanopticFPN:
    """An untrained Panoptic FPN; were its frozen norms the identity, values would grow from block to block."""
    torch.manual_seed(0)
    net = PanopticFPN(**settings)
    for module in net.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.fill_(0.5)
    return net


def recurrent(settings: dict[str, Any], shared: PanopticFPN, **recurrence: Any) -> RFPN:
    """An R-FPN that has the weights of a Panoptic FPN outside its mask head."""
    torch.manual_seed(1)
    net = RFPN(**settings, **recurrence)
    own = net.state_dict()
    net.load_state_dict(own | {name: value for name, value in shared.state_dict().items() if name in own})
    return net


def saved(net: PanopticFPN, batch: Batch) -> int:
    """Bytes that autograd saves in a training step."""
    net.train()
    torch.manual_seed(0)  # proposals are drawn
    with crbp.activation_memory(exclude=[*net.parameters(), *batch[0]]) as memory:
        torch.stack(list(net(*batch).values())).sum().backward()
    net.zero_grad()
    return memory.bytes


def training_step(net: PanopticFPN, batch: Batch) -> Callable[[], None]:
    """Losses and gradients of a batch."""

    def step() -> None:
        net.train()
        torch.manual_seed(0)
        torch.stack(list(net(*batch).values())).sum().backward()
        net.zero_grad()

    return step


def inference(net: PanopticFPN, images: list[Tensor]) -> Callable[[], Any]:
    """What a network sees in images."""
    net.eval()
    return lambda: net(images)


def memory(batch: Batch) -> dict[str, Any]:
    """Bytes saved in training of each method, by number of steps."""
    settings = small()
    fpn = started(settings)
    methods: dict[str, Callable[[int], dict[str, Any]]] = {
        "C-RBP": contracting,
        "BPTT": lambda steps: {"evolve": crbp.Evolve(steps=steps, gradient=crbp.BPTT())},
    }
    found = {
        name: {steps: saved(recurrent(settings, fpn, **made(steps)), batch) for steps in COUNTS}
        for name, made in methods.items()
    }
    return {"Panoptic FPN": saved(fpn, batch)} | found


def times(batch: Batch, repeats: int) -> dict[str, Any]:
    """Seconds of the small models, in training and in inference."""
    settings = small()
    fpn = started(settings)
    nets = {"Panoptic FPN": fpn, "R-FPN, N = 20": recurrent(settings, fpn, **contracting(20))}
    return {
        "training": compared({name: training_step(net, batch) for name, net in nets.items()}, repeats),
        "inference": compared({name: inference(net, batch[0][:1]) for name, net in nets.items()}, repeats),
    }


def full_size_training(repeats: int) -> dict[str, Any]:
    """Seconds and saved bytes of a training step of ResNet-50 networks on one image of 800×800, and its masks."""
    images, targets = collate([Shapes(512, objects=(30, 40), transform=Resize(shortest=800))[0]])
    batch = (images, list(targets))
    fpn = started({})
    masks: list[int] = []
    hook = fpn.roi_heads.mask_head.register_forward_pre_hook(lambda _, pooled: masks.append(len(pooled[0])))
    nets = {"Panoptic FPN": fpn, "R-FPN, N = 20": recurrent({}, fpn, **contracting(20))}
    bytes_ = {name: saved(net, batch) for name, net in nets.items()}
    hook.remove()
    seconds = compared({name: training_step(net, batch) for name, net in nets.items()}, repeats)
    return {"masks": masks[0], "bytes": bytes_} | seconds


def full_size(repeats: int) -> dict[str, Any]:
    """Seconds of ResNet-50 networks for COCO on one image of 800×1088, by number of instances."""
    found: dict[str, Any] = {}
    for instances in INSTANCES:
        jobs = full_size_inference(instances, {"R-FPN, N = 20": contracting(20)})
        found[f"{instances} instances"] = compared(jobs, repeats)
    return found


def full_size_inference(instances: int, recurrences: Mapping[str, dict[str, Any]]) -> dict[str, Callable[[], Any]]:
    """What a ResNet-50 Panoptic FPN sees in one image with so many boxes, and R-FPNs with these recurrences by name."""
    image = torch.randint(256, (3, 800, 1088), generator=torch.Generator().manual_seed(0)).float()
    settings: dict[str, Any] = {
        "boxes": BoxSettings(score=0.0, detections=instances),
        "merge": MergeSettings(score=1.0),
    }
    fpn = started(settings)
    nets = {name: recurrent(settings, fpn, **recurrence) for name, recurrence in recurrences.items()}
    return {name: inference(net, [image]) for name, net in ({"Panoptic FPN": fpn} | nets).items()}


def compared(jobs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Seconds of two jobs, and the second over the first in every turn."""
    found = beside_first(jobs, repeats)
    _, second = found.values()
    return {name: each["seconds"] for name, each in found.items()} | {"ratio": second["ratio"]}


def beside_first(jobs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds of each job, and their ratio to the first's in every turn."""
    in_turns(jobs, 1)
    seconds = in_turns(jobs, repeats)
    first = next(iter(seconds.values()))
    return {
        name: {"seconds": spread(values), "ratio": spread([b / a for a, b in zip(first, values, strict=True)])}
        for name, values in seconds.items()
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="turns of the timings")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("panoptic_cost.json"))
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="parts to measure")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = Shapes(192)
    images, targets = collate([shapes[index] for index in range(2)])
    batch = (images, list(targets))
    large = max(options.repeats // 2, 1)
    parts: dict[str, Callable[[], Any]] = {
        "memory": lambda: memory(batch),
        "small": lambda: times(batch, options.repeats),
        "full_size": lambda: full_size(large),
        "full_size_training": lambda: full_size_training(large),
    }
    found = {name: parts[name]() for name in options.only} | {"environment": environment()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
