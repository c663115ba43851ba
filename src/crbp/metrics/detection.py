"""Average precision of boxes and masks, by pycocotools.

Of pycocotools itself and not through torchmetrics' `MeanAveragePrecision`, which waits for ever where processes have
seen different numbers of images, gathers each image of each process by itself, and takes its thresholds in float32, so
that an IoU of exactly .55 is no match.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

_KINDS = {"box": "bbox", "mask": "segm"}
_NUMBERS = ("", "50", "75", "_small", "_medium", "_large")  # the order in which pycocotools puts them first
_STATES = {  # each image adds rows to all of them, so that together they can be told apart again
    "images": torch.empty(0, 4, dtype=torch.int64),  # detections, targets, height, width
    "boxes": torch.empty(0, 4),  # of the detections and then the targets of an image: x, y, width, height
    "scores": torch.empty(0),  # 1 for targets
    "facts": torch.empty(0, 3, dtype=torch.int64),  # label, crowd, length of the mask's code
    "codes": torch.empty(0, dtype=torch.uint8),  # run lengths, as pycocotools has them compressed
}


class DetectionAP(Metric):
    """COCO's average precision of boxes and of masks: over 10 IoUs from .50 to .95, and by size.

    It has at most 100 detections of a class and image count. The size of a target is the area of its mask: small up to
    32² pixels, medium up to 96², large above. Crowds are neither found nor missed. Numbers are fractions in [0, 1], or
    −1 where there is no target to find, as COCO has it. Processes may have seen different numbers of images.

    Raises:
        ImportError: pycocotools is not installed.

    Source: Lin et al., *Microsoft COCO: Common Objects in Context*, ECCV 2014; the rules are those of ``pycocotools``.
    """

    images: list[Tensor]
    boxes: list[Tensor]
    scores: list[Tensor]
    facts: list[Tensor]
    codes: list[Tensor]
    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    def __init__(self) -> None:
        if find_spec("pycocotools") is None:
            raise ImportError(
                "crbp.metrics.DetectionAP needs pycocotools, not installed here; run: pip install 'crbp[panoptic]'"
            )
        super().__init__()
        for name in _STATES:
            self.add_state(name, [], dist_reduce_fx="cat")
        self._start()

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        self._start()

    def _start(self) -> None:
        """A process that saw no image must have tensors of the right type and shape for the others to gather."""
        for name, empty in _STATES.items():
            getattr(self, name).append(empty.to(self.device))

    def update(self, results: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add images.

        Args:
            results: of each image ``boxes`` ``(n, 4)``, corners x, y, x, y in pixels, ``scores`` ``(n,)``, ``labels``
                ``(n,)``, contiguous from 0, and ``masks`` ``(n, H, W)`` of bool. Other keys are left alone.
            targets: of each image ``boxes``, ``labels`` and ``masks``, and where there are crowds ``iscrowd`` ``(n,)``.

        Raises:
            ValueError: numbers of images, lengths or sizes do not agree, or a key is missing.
        """
        if len(results) != len(targets):
            raise ValueError(f"there are {len(results)} results and {len(targets)} targets; give one of each per image")
        rows = [_rows(result, target) for result, target in zip(results, targets, strict=True)]
        for row in rows:
            for name, value in row.items():
                getattr(self, name).append(value.to(self.device))

    def compute(self) -> dict[str, float]:
        """The numbers of the images since the last reset.

        Returns:
            ``box_ap``, ``box_ap50``, ``box_ap75``, ``box_ap_small``, ``box_ap_medium``, ``box_ap_large``, and the same
            from ``mask_ap`` on.
        """
        states = {name: dim_zero_cat(getattr(self, name)).cpu() for name in _STATES}
        found, truth = _annotations(states)
        numbers: dict[str, float] = {}
        for kind, iou_type in _KINDS.items():
            values = _evaluate(found[kind], truth, states["images"].tolist(), iou_type)
            numbers |= {f"{kind}_ap{name}": value for name, value in zip(_NUMBERS, values, strict=True)}
        return numbers


def _rows(result: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Tensor]:
    size = _check("result", result, ("boxes", "scores", "labels", "masks"))
    if (target_size := _check("target", target, ("boxes", "labels", "masks"))) != size:
        raise ValueError(f"the masks of a result are {size} and of its target {target_size}; paste them at one size")
    labels = torch.cat([result["labels"].cpu(), target["labels"].cpu()])
    found = len(result["labels"])
    crowd = torch.zeros(len(labels), dtype=torch.int64)
    if "iscrowd" in target:
        crowd[found:] = torch.as_tensor(target["iscrowd"])
    scores = torch.ones(len(labels))
    scores[:found] = result["scores"].detach()
    codes = [code for masks in (result["masks"], target["masks"]) for code in _encode(masks)]
    lengths = torch.tensor([len(code) for code in codes], dtype=torch.int64)
    boxes = torch.cat([part["boxes"].detach().cpu().float() for part in (result, target)])
    return {
        "images": torch.tensor([[found, len(labels) - found, *size]]),
        "boxes": torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1),
        "scores": scores,
        "facts": torch.stack([labels.long(), crowd, lengths], dim=1),
        "codes": torch.from_numpy(np.frombuffer(b"".join(codes), np.uint8).copy()),
    }


def _check(owner: str, image: Mapping[str, Any], keys: Sequence[str]) -> tuple[int, int]:
    """Raise unless the parts of an image agree in length; its height and width."""
    if missing := [key for key in keys if key not in image]:
        raise ValueError(f"a {owner} has no {', '.join(map(repr, missing))}; it needs {', '.join(keys)}")
    shapes = {key: tuple(image[key].shape) for key in keys}
    n = shapes["labels"][0] if len(shapes["labels"]) == 1 else -1
    if shapes["boxes"] != (n, 4) or shapes.get("scores", (n,)) != (n,) or shapes["masks"][:-2] != (n,):
        raise ValueError(
            f"the parts of a {owner} have the shapes {shapes}; give boxes (n, 4), masks (n, H, W) and the others (n,)"
        )
    if image["masks"].dtype != torch.bool:
        raise ValueError(f"the masks of a {owner} are of {image['masks'].dtype}; give bool, such as masks > 0.5")
    height, width = shapes["masks"][-2:]
    return height, width


def _encode(masks: Tensor) -> list[bytes]:
    pixels = np.asfortranarray(masks.cpu().numpy().transpose(1, 2, 0).astype(np.uint8))
    return [code["counts"] for code in _tools().mask.encode(pixels)]


class _Tools(NamedTuple):
    coco: Any
    judge: Any
    mask: Any


def _tools() -> _Tools:
    """The parts of pycocotools, loaded on first use; its type stubs know only whole files of annotations."""
    from pycocotools import coco, cocoeval, mask

    return _Tools(coco.COCO, cocoeval.COCOeval, mask)


def _annotations(states: Mapping[str, Tensor]) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """COCO's annotations: of the detections for boxes and for masks, whose area differs, and of the targets."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in _KINDS}
    truth: list[dict[str, Any]] = []
    codes = states["codes"].numpy().tobytes()
    parts = zip(*(states[name].tolist() for name in ("boxes", "scores", "facts")), strict=True)
    start = 0
    for number, (detections, targets, height, width) in enumerate(states["images"].tolist()):
        for row in range(detections + targets):
            box, score, (label, crowd, length) = next(parts)
            code = {"size": [height, width], "counts": codes[start : start + length]}
            start += length
            entry = {"image_id": number, "category_id": label, "bbox": box, "segmentation": code, "iscrowd": crowd}
            mask_area = float(_tools().mask.area(code))
            if row < detections:
                found["box"].append({**entry, "score": score, "area": box[2] * box[3]})
                found["mask"].append({**entry, "score": score, "area": mask_area})
            else:
                truth.append({**entry, "area": mask_area})
    return found, truth


def _evaluate(
    found: list[dict[str, Any]], truth: list[dict[str, Any]], sizes: list[list[int]], iou_type: str
) -> list[float]:
    tools = _tools()
    sides = []
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress and its numbers
        for entries in (truth, found):
            side = tools.coco()
            side.dataset = {
                "images": [{"id": number, "height": size[2], "width": size[3]} for number, size in enumerate(sizes)],
                "categories": [{"id": label} for label in sorted({entry["category_id"] for entry in truth})],
                "annotations": [{**entry, "id": number} for number, entry in enumerate(entries, start=1)],  # 0 is none
            }
            side.createIndex()
            sides.append(side)
        judge = tools.judge(*sides, iou_type)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return [float(value) for value in judge.stats[: len(_NUMBERS)]]
