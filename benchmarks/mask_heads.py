"""How deep a mask head has to be: heads trained alone, on the same crops, from no convolution to eight.

    python benchmarks/mask_heads.py --weights runs/start_shapes/version_0/weights/last.safetensors --seeds 0 1
    python benchmarks/mask_heads.py --start start_heaps --weights runs/start_heaps/version_0/weights/last.safetensors
    python benchmarks/mask_heads.py --weights … --boxes proposed --trained 200 --images 1000

What a trained Panoptic FPN pools from generated shapes is kept, in boxes that are moved a little from the true ones or
in those that the network proposes, as in its own training, and each head learns the masks from it: every head sees the
same crops in the same order. Where more convolutions do not help, more steps of a recurrent head cannot be expected to.
Results are written after each head; heads that are in the file already are left out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal, get_args

import torch
import yaml
from _runs import ROOT
from _tables import with_tables
from panoptic import CONFIGS, iou, measure
from panoptic_results import FEW_IMAGES, TRAINED, tables
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.ops import box_iou

import crbp
from crbp.bench.measure import environment
from crbp.data.panoptic import Shapes
from crbp.data.panoptic._looks import ALIKE
from crbp.data.panoptic.shapes import Split
from crbp.models import PanopticFPN
from crbp.models.panoptic.mask_head import (
    MaskFeatures,
    MaskHead,
    MaskPredictor,
    RecurrentMaskHead,
    mask_loss,
    mask_targets,
)
from crbp.tasks import LipschitzPenalty, PanopticData, load_trained
from crbp.tasks.weights import build

CHANNELS, THINGS = 64, 10
START = "start_shapes"
FILES = {START: "mask_heads.json", "start_heaps": "mask_heads_heaps.json"}  # by what is started from
KEPT = ("pq", "pq_things", "sq_things", "rq_things", "true_box_pq_things")  # of what is measured
BATCH, RATE = 16, 0.003
LONG = 30  # steps, beyond all that are trained for
MOVED = 0.1  # standard deviation of the corners of boxes trained in, in sides of the box
LEAST = 4.0  # pixels: sides of boxes trained in
Boxes = Literal["true", "moved", "proposed"]
MOST = 8  # proposals of an image
NEAR = 0.5  # how far they overlap an object (IoU) at least, as those that masks are trained in
PENALTY = LipschitzPenalty(weight=0.001, bound=0.95, reduction="sum_square")  # as in configs/panoptic/shapes_*
WEAKER = replace(PENALTY, weight=0.0001)


class Convolutions(MaskRCNNHeads, MaskHead):
    """So many 3×3 convolutions with ReLU."""

    def __init__(self, depth: int) -> None:
        super().__init__(CHANNELS, [CHANNELS] * depth, 1)

    def forward(self, pooled: Tensor) -> MaskFeatures:
        """``(n, C, s, s)`` to features of the same size."""
        return MaskFeatures(MaskRCNNHeads.forward(self, pooled))


@dataclass(frozen=True)
class Trial:
    """A head, what is added to its loss for the last step of its run, and the optimiser's rate and β₂."""

    build: Callable[[], MaskHead]
    penalty: LipschitzPenalty | None = None
    rate: float = RATE
    beta2: float = 0.999


def convolutions(depth: int) -> Trial:
    """A head of so many convolutions, which has no run to penalise."""
    return Trial(lambda: Convolutions(depth))


def bptt(steps: int, **settings: Any) -> Trial:
    """The head of R-FPN trained by BPTT."""
    return Trial(lambda: RecurrentMaskHead(CHANNELS, crbp.Evolve(steps=steps, gradient=crbp.BPTT()), **settings))


def c_rbp(steps: int, penalty: LipschitzPenalty = PENALTY, terms: int = 15, **settings: Any) -> Trial:
    """The same by C-RBP, as in `configs/panoptic/shapes_rfpn_crbp10.yaml`."""
    gradient = crbp.RBP(crbp.Neumann(terms=terms, tolerance=0.01), on_divergence="fallback")
    return Trial(lambda: RecurrentMaskHead(CHANNELS, crbp.Evolve(steps=steps, gradient=gradient), **settings), penalty)


HEADS = {
    "no convolution": convolutions(0),
    "1 convolution": convolutions(1),
    "2 convolutions": convolutions(2),
    "3 convolutions": convolutions(3),  # with about as many parameters as R-FPN's
    "4 convolutions (Panoptic FPN)": convolutions(4),
    "8 convolutions": convolutions(8),
    "R-FPN, BPTT, 1 step": bptt(1),
    "R-FPN, BPTT, 3 steps": bptt(3),
    "R-FPN, BPTT, 3 steps, scales start at 1": bptt(3, norm_scale=1.0),
    "R-FPN, C-RBP, 10 steps": c_rbp(10),
    "R-FPN, C-RBP, 10 steps, scales start at 1": c_rbp(10, norm_scale=1.0),
    "R-FPN, C-RBP, 5 steps, scales start at 1, gates of 3": c_rbp(5, norm_scale=1.0, horizon=3),
    "R-FPN, C-RBP, 5 steps, scales start at 1, gates of 3, a tenth of the penalty": c_rbp(
        5, WEAKER, norm_scale=1.0, horizon=3
    ),
    # As many terms as steps came before the last: the series of 15 counts on steps that were never taken.
    "R-FPN, C-RBP, 5 steps, scales start at 1, gates of 3, a tenth of the penalty, 4 terms": c_rbp(
        5, WEAKER, terms=4, norm_scale=1.0, horizon=3
    ),
}
# As for contour tracing, where squared gradients are remembered for less long; and at half and twice the rate.
AGAIN = (
    "4 convolutions (Panoptic FPN)",
    "R-FPN, C-RBP, 5 steps, scales start at 1, gates of 3, a tenth of the penalty, 4 terms",
)
HEADS |= {f"{name}, β₂ .99": replace(HEADS[name], beta2=0.99) for name in AGAIN}
HEADS |= {
    f"{name}, β₂ .99, rate {rate:g}": replace(HEADS[name], beta2=0.99, rate=rate)
    for name in AGAIN
    for rate in (0.0015, 0.006)
}


@dataclass(frozen=True)
class Crops:
    """What is pooled in boxes, ``(n, C, s, s)``, the masks there, ``(n, m, m)`` of bool, and the classes, ``(n,)``."""

    pooled: Tensor
    masks: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Any) -> Crops:
        return Crops(self.pooled[chosen], self.masks[chosen], self.labels[chosen])


def trained_on(start: str, weights: Path) -> nn.Module:
    """The network of a file; SystemExit unless it was trained on shapes of that kind."""
    net, origin = load_trained(weights)
    kinds = (origin.run["data"]["init_args"]["source"]["init_args"], shapes(start))
    seen, wanted = ({"alike": ALIKE, **kind} for kind in kinds)
    if wrong := [key for key in ("size", "objects", "looks", "zoom", "alike") if seen[key] != wanted[key]]:
        raise SystemExit(f"{weights} was trained on shapes of other {', '.join(wrong)} than those of {start}")
    return net


def shapes(start: str) -> dict[str, Any]:
    """The settings of the shapes of the row that is started from, but of another seed: images that it has not seen."""
    config = yaml.safe_load((CONFIGS / f"{start}.yaml").read_text())
    return {**config["data"]["init_args"]["source"]["init_args"], "seed": 1}


@torch.no_grad()
def crops(net: PanopticFPN, start: str, split: Split, images: int, *, kind: Boxes = "true") -> Crops:
    """What a network pools in the true boxes of a split, in boxes moved a little, or in those that it proposes."""
    settings = {key: value for key, value in shapes(start).items() if key not in ("train", "val")}
    data = Shapes(**settings, split=split, images=images)
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(len(data)):
        image, target = data[index]
        boxes = target["boxes"]
        if len(boxes) == 0:
            continue
        batch, matched = net.batch([image]), torch.arange(len(boxes))
        features = net.backbone(batch.tensors)
        if kind == "moved":
            sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
            boxes = (boxes + MOVED * sides * torch.randn(boxes.shape, generator=generator)).clamp(0, data.size)
            matched = matched[(boxes[:, 2:] - boxes[:, :2]).amin(1) > LEAST]
            boxes = boxes[matched]
        elif kind == "proposed":
            every = torch.cat([boxes, net.rpn(batch, features)[0][0]])
            overlaps, nearest = box_iou(every, boxes).max(dim=1)
            near = torch.where(overlaps >= NEAR)[0]
            chosen = near[torch.randperm(len(near), generator=generator)[:MOST]]
            boxes, matched = every[chosen], nearest[chosen]
        if len(boxes) == 0:
            continue
        pooled = net.roi_heads.mask_roi_pool(features, [boxes])
        masks = mask_targets(target["masks"], boxes, matched, 2 * pooled.shape[-1])
        found.append((pooled, masks, target["labels"][matched]))
    pooled, masks, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Crops(pooled, masks, labels)


def train(trial: Trial, seen: Crops, updates: int, seed: int) -> tuple[MaskHead, MaskPredictor, dict[str, float]]:
    """Train one head and its predictor.

    With them come the mean ``loss`` of the last tenth of the updates and, where a backward equation is solved, how many
    of all solutions ``fell_back``, and the mean ``residual`` of the last tenth.
    """
    torch.manual_seed(seed)
    head, predictor = trial.build(), MaskPredictor(CHANNELS, THINGS)
    parameters = [*head.parameters(), *predictor.parameters()]
    optimizer = torch.optim.AdamW(parameters, trial.rate, betas=(0.9, trial.beta2))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda update: min(1.0, (update + 1) / 100) * 0.1 ** ((update >= 0.6 * updates) + (update >= 0.9 * updates)),
    )
    generator, losses, solved = torch.Generator().manual_seed(seed), [], []
    for _ in range(updates):
        batch = seen[torch.randint(len(seen), (BATCH,), generator=generator)]
        features, run, _ = head(batch.pooled)
        loss = total = mask_loss(predictor(features), batch.labels, batch.masks)
        if trial.penalty is not None:
            total = loss + trial.penalty.weight * trial.penalty(run)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        rate.step()
        losses.append(loss.item())
        if run is not None and run.report.backward is not None:
            solved.append(run.report.backward)
    found = {"loss": round(mean(losses[-updates // 10 :]), 4)}
    if solved:
        found["fell_back"] = sum(each.fell_back for each in solved)
        found["residual"] = round(mean(each.residual for each in solved[-updates // 10 :]), 4)
    return head.eval(), predictor, found


@torch.no_grad()
def overlap(head: MaskHead, predictor: MaskPredictor, held_out: Crops) -> dict[str, float]:
    """Intersection over union of the masks in percent: the mean, and what a tenth is below and a tenth above."""
    found = []
    for rows in torch.arange(len(held_out)).split(64):
        part = held_out[rows]
        logits = predictor(head(part.pooled).features)[torch.arange(len(rows)), part.labels]
        found.append(iou(logits > 0, part.masks))
    every = 100 * torch.cat(found)
    low, high = torch.quantile(every, torch.tensor([0.1, 0.9])).tolist()
    return {"iou": round(float(every.mean()), 2), "iou_low": round(low, 2), "iou_high": round(high, 2)}


def quality(net: Any, start: str, head: MaskHead, predictor: MaskPredictor, images: int) -> dict[str, float]:
    """Panoptic quality, in percent, of the network with another mask head, on images that are held out."""
    config = yaml.safe_load((CONFIGS / f"{start}.yaml").read_text())
    config["data"]["init_args"]["source"]["init_args"] = {**shapes(start), "val": images}
    data = build(PanopticData, config["data"], "the held-out shapes")
    net.roi_heads.mask_head, net.roi_heads.mask_predictor = head, predictor
    counts = [None] if not isinstance(head, RecurrentMaskHead) else [head.steps, LONG]
    found = measure(net, data, counts)
    beyond = {f"pq_at_{LONG}": found[1]["pq"]} if len(found) > 1 else {}
    every = {name: found[0][name] for name in KEPT} | beyond
    return {name: round(100 * value, 2) for name, value in every.items()}


def main() -> None:
    """Train and measure the heads that the file lacks, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="of the Panoptic FPN that crops are pooled by")
    parser.add_argument("--start", choices=FILES, default=START, help="the row that trained it (default: %(default)s)")
    parser.add_argument(
        "--boxes", choices=get_args(Boxes)[1:], default="moved", help="to train in (default: %(default)s)"
    )
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--trained", type=int, default=TRAINED, help="images to train on (default: %(default)s)")
    parser.add_argument("--images", type=int, default=FEW_IMAGES, help="to measure on; the first are always these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS), metavar="NAME", help="all by default")
    parser.add_argument("--out", type=Path, help="file of the results, by default that of results/panoptic")
    options = parser.parse_args()
    start, out = options.start, options.out or ROOT / "results" / "panoptic" / FILES[options.start]
    torch.set_num_threads(1)
    net: Any = trained_on(start, options.weights).eval()
    seen = crops(net, start, "train", options.trained, kind=options.boxes)
    held_out = crops(net, start, "val", options.images)
    rows: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    for seed in options.seeds:
        for name in options.heads:
            asked = {key: getattr(options, key) for key in ("updates", "trained", "images", "boxes")}
            this = {"head": name, "seed": seed, **asked}
            if any(this == {key: row[key] for key in this} for row in rows):
                continue
            begun = time.process_time()
            head, predictor, found = train(HEADS[name], seen, options.updates, seed)
            seconds = round(time.process_time() - begun)
            rows.append(
                {
                    **this,
                    "parameters": sum(parameter.numel() for parameter in head.parameters()),
                    **found,
                    **overlap(head, predictor, held_out),
                    **quality(net, start, head, predictor, options.images),
                    "seconds": seconds,
                    **environment(),
                }
            )
            out.write_text(json.dumps(rows, indent=2) + "\n")
            print(
                *(rows[-1][key] for key in ("head", "seed", "parameters", "loss", "iou", "pq", "seconds")),
                sep=" | ",
                flush=True,
            )
    if (page := out.with_name("README.md")).exists():
        page.write_text(with_tables(page.read_text(), tables(out.parent)))


if __name__ == "__main__":
    main()
