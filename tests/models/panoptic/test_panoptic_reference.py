"""Against what detectron2 computes for weights that are a function of their names."""

import json
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crbp.models import RFPN, PanopticFPN
from crbp.models.panoptic import MergeSettings, load_weights, merge_panoptic
from crbp.models.panoptic._names import detectron2_name

BOXES = [(10, 12, 90, 70), (0, 0, 224, 160), (30.5, 40.25, 60.75, 100.5), (100, 20, 215, 150), (5, 5, 21, 19)]


@pytest.fixture
def reference(shared_data: Path) -> dict[str, Any]:
    return json.loads((shared_data / "detectron2_reference" / "reference.json").read_text())


def _weight(name: str, shape: list[int]) -> Tensor:
    value = np.random.Generator(np.random.Philox(zlib.crc32(name.encode()))).standard_normal(shape)
    if name.endswith("running_var"):
        value = 1 + 0.1 * np.abs(value)
    elif len(shape) >= 2 and shape[1:] != [1, 1]:
        value *= np.sqrt(1 / np.prod(shape[1:]))
    elif name.endswith(("norm.weight", "alpha", "mu")) or (".bn." in name and name.endswith("weight")):
        value = 1 + 0.1 * value
    else:
        value *= 0.1
    return torch.from_numpy(value.astype(np.float32))


@pytest.fixture
def outputs(shared_data: Path, reference: dict[str, Any]) -> dict[str, Tensor]:
    del reference
    return _outputs(shared_data)


@lru_cache(maxsize=1)
@torch.no_grad()
def _outputs(shared_data: Path) -> dict[str, Tensor]:
    """Everything once: the models are as large as they are."""
    reference = json.loads((shared_data / "detectron2_reference" / "reference.json").read_text())
    state = {name: _weight(name, shape) for name, shape in reference["names"].items()}
    fpn = PanopticFPN().eval()
    load_weights(fpn, state)
    pixels = np.random.Generator(np.random.Philox(7)).integers(0, 256, (3, 160, 224)).astype(np.float32)
    batch = fpn.batch([torch.from_numpy(pixels[::-1].copy())])  # the reference's channels are B, G, R
    features = fpn.backbone(batch.tensors)
    levels, heads = list(features.values()), fpn.roi_heads
    logits, deltas = fpn.rpn.head(levels)
    anchors = fpn.rpn.anchor_generator(batch, levels)[0].split([each.numel() for each in logits])
    boxes = [torch.tensor(BOXES, dtype=torch.float32)]
    pooled, for_masks = heads.box_roi_pool(features, boxes), heads.mask_roi_pool(features, boxes)
    scores, box_deltas = heads.box_predictor(heads.box_head(pooled))
    found = {
        **{f"features.{name}": feature for name, feature in features.items()},
        **{f"rpn.objectness.{level}": each for level, each in enumerate(logits)},
        **{f"rpn.deltas.{level}": each for level, each in enumerate(deltas)},
        **{f"rpn.anchors.{level}": each for level, each in enumerate(anchors)},
        "semantic.logits_stride4": fpn.semantic_head(features),
        "box.pooled": pooled,
        "box.class_logits": scores,
        "box.deltas": box_deltas,
        "mask.pooled": for_masks,
        "mask.logits": heads.mask_predictor(heads.mask_head(for_masks).features),
    }
    shared = {name: value for name, value in state.items() if not name.startswith("roi_heads.mask_head.")}
    del fpn, heads
    recurrent = {name: _weight(name, shape) for name, shape in reference["rfpn_mask_head_names"].items()}
    rfpn = RFPN().eval()
    load_weights(rfpn, shared | recurrent)
    states: list[Tensor] = []
    rfpn.mask_head.cell.register_forward_hook(lambda cell, given, state: states.append(state))
    found["rfpn.logits"] = rfpn.roi_heads.mask_predictor(rfpn.mask_head(for_masks).features)
    return found | {f"rfpn.state.{steps}": states[steps - 1] for steps in (1, 2, 5, 20)}


@pytest.mark.slow
def test_every_output_of_detectron2(outputs, reference):
    assert outputs.keys() == reference["outputs"].keys()
    for name, wanted in reference["outputs"].items():
        got = outputs[name].double().flatten()
        assert got.numel() == wanted["numel"], name
        at = torch.from_numpy(np.linspace(0, wanted["numel"] - 1, 48).astype(int))
        scale = wanted["std"]
        # The state is driven by features of a deviation 250 times its own, whose rounding it inherits.
        limit = 1e-4 if name.startswith("rfpn.") else 1e-5
        error = float((got[at] - torch.tensor(wanted["values"]).double()).abs().max()) / scale
        assert error < limit, (name, error)
        assert abs(float(got.mean()) - wanted["mean"]) < 1e-6 * scale, name


def test_every_name_of_detectron2_has_one_of_ours(reference):
    with torch.device("meta"):
        fpn, rfpn = PanopticFPN().state_dict(), RFPN().state_dict()
    assert {detectron2_name(name): list(value.shape) for name, value in fpn.items()} == reference["names"]
    head = {detectron2_name(name): value.shape for name, value in rfpn.items() if "mask" in name}
    counters = {name for name in head if name.endswith("num_batches_tracked")}
    assert head.keys() - counters == reference["rfpn_mask_head_names"].keys()


def test_the_merge_of_detectron2(shared_data):
    cases = np.load(shared_data / "detectron2_reference" / "merge_cases.npz")
    for case in sorted({name.split("_")[0] for name in cases.files}):

        def read(name: str, case: str = case) -> Tensor:
            return torch.from_numpy(cases[f"{case}_{name}"])

        panoptic, segments = merge_panoptic(
            read("masks"),
            read("scores"),
            read("classes"),
            read("semantic"),
            MergeSettings(stuff_area=int(cases[f"{case}_stuff_area"])),
        )
        assert torch.equal(panoptic, read("panoptic"))
        wanted = json.loads(str(cases[f"{case}_info"]))
        assert len(segments) == len(wanted)
        for segment, info in zip(segments, wanted, strict=True):
            assert segment["area"] == int((panoptic == info["id"]).sum())
            theirs = {"label": info["category_id"], "id": info["id"], "isthing": info["isthing"]}
            if info["isthing"]:
                theirs |= {"score": info["score"], "instance": info["instance_id"]}
            assert segment == theirs | {"area": segment["area"]}
