"""How soon the masks of a trained R-FPN settle, and what it saves to stop there: steps, quality and time by tolerance.

    python benchmarks/panoptic_settling.py --threads 2     # writes results/panoptic/settling.json

Quality and steps are those of the shipped network on generated shapes. Its time is that of one image after the other,
beside a Panoptic FPN that has its weights outside the mask head and so finds the same boxes. For ResNet-50, of which
there is no trained network, it is that of untrained ones whose instances all take as many steps, tests of convergence
included, as those of the shipped one do on average.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from functools import partial
from inspect import signature
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _runs import ROOT
from panoptic_cost import INSTANCES, beside_first, contracting, full_size_inference

from crbp.bench.measure import environment
from crbp.metrics import PanopticQuality
from crbp.models import RFPN, PanopticFPN
from crbp.models.panoptic.results import panoptic_result
from crbp.tasks import PanopticData, load_trained
from crbp.tasks.panoptic import segments_info
from crbp.tasks.weights import build

WEIGHTS = ROOT / "results" / "panoptic" / "weights" / "shapes_rfpn_crbp20.safetensors"
TOLERANCES = (None, 0.001, 0.003, 0.01, 0.02, 0.05)
TIMED = 50  # images
FPN = "Panoptic FPN"
Rows = Sequence[dict[str, Any]]


@torch.no_grad()
def by_tolerance(net: RFPN, data: PanopticData) -> Rows:
    """Panoptic quality on the validation split and the mean steps of an instance; the boxes are the same for all."""
    qualities = {tolerance: PanopticQuality(data.categories.as_json()) for tolerance in TOLERANCES}
    steps: dict[float | None, list[int]] = {tolerance: [] for tolerance in TOLERANCES}
    for batch in data.val_dataloader():
        assert batch.truths is not None
        images, (target,), (truth,) = net.batch(batch.images), batch.targets, batch.truths
        features = net.backbone(images.tensors)
        proposals, _ = net.rpn(images, features)
        (logits,) = net.semantic_head(features)
        for tolerance, quality in qualities.items():
            net.mask_head.tolerance = tolerance
            (seen,) = net.roi_heads.detect(features, proposals, images.image_sizes, at_least=net.merge.score)
            steps[tolerance] += [net.steps] * len(seen.boxes) if seen.steps is None else seen.steps.tolist()
            result = panoptic_result(seen, logits, images.image_sizes[0], target["size"], net.merge)
            quality.update(result.panoptic, segments_info(result, data.categories), *truth)
    return [
        {
            "name": named(tolerance),
            "tolerance": tolerance,
            "steps": mean(steps[tolerance]),
            "pq": float(quality.compute()["pq"]),
        }
        for tolerance, quality in qualities.items()
    ]


def small(net: RFPN, described: dict[str, Any], data: PanopticData, repeats: int) -> dict[str, Any]:
    """Seconds of the shipped network for some images one after the other, by tolerance."""
    shared = {
        name: value for name, value in described["init_args"].items() if name in signature(PanopticFPN).parameters
    }
    fpn = build(PanopticFPN, {"class_path": "crbp.models.PanopticFPN", "init_args": shared}, "a Panoptic FPN").eval()
    fpn.load_state_dict(fpn.state_dict() | {k: v for k, v in net.state_dict().items() if "mask_head" not in k})
    images = [batch.images for batch in islice(data.val_dataloader(), TIMED)]
    fpn.merged_only = net.merged_only = True

    def seen(by: PanopticFPN, tolerance: float | None = None) -> None:
        if isinstance(by, RFPN):
            by.mask_head.tolerance = tolerance
        for image in images:
            by(image)

    jobs = {FPN: partial(seen, fpn)} | {named(each): partial(seen, net, each) for each in TOLERANCES}
    with torch.no_grad():
        return {"images": len(images)} | beside_first(jobs, repeats)


def full_size(rows: Rows, instances: int, repeats: int) -> dict[str, Any]:
    """Seconds of untrained ResNet-50 networks for COCO on one image of 800×1088, by the steps of a tolerance."""
    recurrences = {
        row["name"]: contracting(max(round(row["steps"]), 1))
        | {"tolerance": None if row["tolerance"] is None else 0.0}  # tested, and never met
        for row in rows
    }
    return beside_first(full_size_inference(instances, recurrences), repeats)


def named(tolerance: float | None) -> str:
    """What a tolerance is called."""
    return "all steps" if tolerance is None else f"tolerance {tolerance:g}"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="held-out images for the quality")
    parser.add_argument("--repeats", type=int, default=3, help="turns of the timings")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "panoptic" / "settling.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    net, origin = load_trained(WEIGHTS)
    assert isinstance(net, RFPN)
    described = copy.deepcopy(origin.run)
    described["data"]["init_args"]["source"]["init_args"]["val"] = options.images
    data = build(PanopticData, described["data"], f"the data of {WEIGHTS}")
    rows = by_tolerance(net, data)
    found = {
        "images": options.images,
        "rows": rows,
        "small": small(net, described["model"]["init_args"]["net"], data, options.repeats),
        "full_size": {f"{many} instances": full_size(rows, many, options.repeats) for many in INSTANCES},
        "environment": environment(),
    }
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
