"""Weights to start from: of detectron2, of the released R-FPN, of ResNets trained on ImageNet, of another network."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor
from torchvision.models import get_model_weights

from crbp.models.panoptic._names import caffe2_name, detectron2_name
from crbp.models.panoptic._unpickle import CheckpointError, read_checkpoint, tensors
from crbp.models.panoptic.panoptic_fpn import PanopticFPN
from crbp.models.panoptic.settings import PixelSettings

__all__ = ["CheckpointError", "load_weights"]

IMAGENET = "imagenet"
_BODY = "backbone.body."
_THEIR_BODY = "backbone.bottom_up."
_STATISTICS = ("running_mean", "running_var")
_COUNTER = "num_batches_tracked"


def load_weights(
    model: PanopticFPN, source: str | Path | Mapping[str, Any] | PanopticFPN, *, without: Sequence[str] = ()
) -> bool:
    """Load weights that were made elsewhere.

    Of a whole model: a `.pkl` or `.pth` checkpoint of detectron2's Panoptic FPN, or of the released R-FPN. Of its
    ResNet only: MSRA's ImageNet weights as detectron2 has them (`R-50.pkl`, with names such as ``res2_0_branch2a_w``),
    or torchvision's. Nothing in a file is run: only tensors, arrays and containers are read. Or of another network,
    such as `crbp.tasks.load_net` gives. An R-FPN starts from a Panoptic FPN
    ``without=["roi_heads.mask_head."]``, and a model for other classes without the predictors.

    Every tensor is accounted for. What detectron2 stores beside the weights, anchors and, in its older versions, the
    scaling of pixels, is compared with the model's. It does not store the place of the stride: where that, or pixels
    that are not stored, differ from those of the models that it publishes, a warning says so. The classifier of
    ImageNet is left out.

    Args:
        model: to be changed, on any device.
        source: a file, the table of tensors itself, another network, or ``"imagenet"`` for torchvision's weights, which
            are downloaded unless torch's cache has them.
        without: beginnings of names, as in ``model.state_dict()``, of what is not taken from the source, where it may
            be missing or of another shape; it stays as it is in the model.

    Returns:
        Whether they are of a whole model; False for a ResNet's alone.

    Raises:
        CheckpointError: if the source cannot be read; if names are unknown, missing, or of other shapes, all of which
            are listed; if nothing that the source could give has a name that begins as one in ``without`` does; or if
            the weights were trained with another place of the stride, other pixels, anchors or norms than the model's.
            The model is then left as it was.
        TypeError: if ``without`` is one text.
    """
    if isinstance(without, str):
        raise TypeError(f"without must be a list of beginnings of names, not the text {without!r}")
    ours, stays = dict(model.state_dict()), tuple(without)
    whole = True
    if isinstance(source, PanopticFPN):
        new = _matched(ours, {name: name for name in ours}, _of_network(model, source), stays)
    else:
        table = _table(model, source)
        whole = any(name.startswith(("roi_heads.", "proposal_generator.", "sem_seg_head.")) for name in table)
        new = (_whole if whole else _resnet)(model, ours, table, stays)
    model.load_state_dict(ours | new)
    return whole


def _table(model: PanopticFPN, source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    if str(source) == IMAGENET:
        return _download(model.depth)
    if not isinstance(source, Mapping) and Path(source).suffix == ".safetensors":
        raise CheckpointError(f"{source} is for crbp.tasks.load_net; give the network that it returns")
    if not isinstance(source, Mapping) and Path(source).is_dir():
        raise CheckpointError(f"{source} is a folder; give a file of weights")
    table = tensors(source if isinstance(source, Mapping) else read_checkpoint(Path(source)))
    if any(name.startswith(_BODY) for name in table):
        raise CheckpointError("these are weights of a network of crbp's; give the network itself")
    return table


def _of_network(model: PanopticFPN, other: PanopticFPN) -> dict[str, Tensor]:
    """The tensors of another network, once it is seen to look at images as the model does."""
    if model.depth > 18 and model.stride_in_1x1 != other.stride_in_1x1:
        raise CheckpointError(
            f"the weights were trained with stride_in_1x1={other.stride_in_1x1}; give the model the same"
        )
    norms = [type(each.backbone.body.bn1).__name__ for each in (model, other)]
    if norms[0] != norms[1]:
        raise CheckpointError(
            f"the weights were trained with {norms[1]} in the ResNet, and the model has {norms[0]} there"
        )
    if model.pixels != other.pixels:
        raise CheckpointError(f"the weights were trained with pixels={other.pixels}; give the model the same")
    for ours, theirs in zip(
        model.rpn.anchor_generator.cell_anchors, other.rpn.anchor_generator.cell_anchors, strict=True
    ):
        _compare({"anchors": theirs}, "anchors", ours)
    return dict(other.state_dict())


def _whole(
    model: PanopticFPN, ours: Mapping[str, Tensor], table: dict[str, Tensor], stays: tuple[str, ...]
) -> dict[str, Tensor]:
    table = _named_once(table)
    _warn_unless_published(model, pixels_known="pixel_mean" in table)
    _compare(table, "pixel_mean", model.pixel_mean)
    _compare(table, "pixel_std", model.pixel_std)
    for level, anchors in enumerate(model.rpn.anchor_generator.cell_anchors):
        _compare(table, f"proposal_generator.anchor_generator.cell_anchors.{level}", anchors)
    return _matched(ours, {name: detectron2_name(name) for name in ours}, table, stays)


def _named_once(table: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The table without the second names of the cell's tensors: the released R-FPN registers its cell twice."""
    found, twice = dict(table), "roi_heads.mask_head.mask_fcn_rnn."
    for name in [each for each in table if each.startswith(twice)]:
        value, other = found.pop(name), name.replace(twice, "roi_heads.mask_head.recurrent.")
        if not torch.equal(found.setdefault(other, value), value):
            raise CheckpointError(f"{name} and {other} are one tensor in the released R-FPN, and differ here")
    return found


def _warn_unless_published(model: PanopticFPN, *, pixels_known: bool) -> None:
    """Say what a checkpoint of detectron2's does not: which pixels, and which place of the stride, it is for."""
    wrong = _unlike(model, stride_in_1x1=True, pixels=model.pixels if pixels_known else PixelSettings())
    if wrong:
        warnings.warn(
            f"this checkpoint does not say what it was trained with; those that detectron2 publishes need a model "
            f"made with {' and '.join(wrong)}, and are wrong in this one",
            stacklevel=4,
        )


def _resnet(
    model: PanopticFPN, ours: Mapping[str, Tensor], table: dict[str, Tensor], stays: tuple[str, ...]
) -> dict[str, Tensor]:
    ours = {name: value for name, value in ours.items() if name.startswith(_BODY)}
    if "conv1_w" in table:
        _trained_with(model, "MSRA's weights", stride_in_1x1=True, pixels=PixelSettings())
        # The bias before the first norm is one that detectron2 leaves out as well.
        idle = [name for name in table if name.endswith("_momentum") or name == "conv1_b"]
        table = {caffe2_name(name): value for name, value in table.items() if name not in idle}
        names = {name: detectron2_name(name).removeprefix(_THEIR_BODY) for name in ours}
    elif "layer1.0.conv1.weight" in table:
        _trained_with(model, "torchvision's weights", stride_in_1x1=False, pixels=PixelSettings.torchvision())
        names = {name: name.removeprefix(_BODY) for name in ours}
    else:
        table = {name.removeprefix(_THEIR_BODY): value for name, value in table.items()}
        names = {name: detectron2_name(name).removeprefix(_THEIR_BODY) for name in ours}
    classifier = ("fc.", "fc1000.", "linear.", "pred.", "stem.fc.")
    table = {name: value for name, value in table.items() if not name.startswith(classifier)}
    return _matched(ours, names, table, stays)


def _matched(
    ours: Mapping[str, Tensor], names: Mapping[str, str], table: Mapping[str, Tensor], stays: tuple[str, ...]
) -> dict[str, Tensor]:
    """Our tensors by our names, from theirs by their names, but for those that stay by the beginnings of ours."""
    if strange := [each for each in stays if not (each and any(name.startswith(each) for name in ours))]:
        raise CheckpointError(
            f"nothing that these weights are for has a name that begins with {', '.join(map(repr, strange))}"
        )
    of = {theirs: name for name, theirs in names.items()}
    table = {name: value for name, value in table.items() if not of.get(name, name).startswith(stays)}
    ours = {name: value for name, value in ours.items() if not name.startswith(stays)}
    new, missing, misshapen = {}, [], []
    # Frozen statistics may have been merged into scale and shift; counters of batches say nothing of the function.
    merged = not any(name.endswith(_STATISTICS) and name.startswith(("stem.", _THEIR_BODY, "bn1.")) for name in table)
    for name, old in ours.items():
        theirs = names[name]
        if theirs not in table:
            if name.endswith(_COUNTER):
                continue
            if merged and name.startswith(_BODY) and name.endswith(_STATISTICS):
                new[name] = torch.full_like(old, float(name.endswith("running_var")))
            else:
                missing.append(theirs)
            continue
        value = table[theirs]
        if value.shape == old.shape or tuple(value.shape) == (*old.shape, 1, 1):
            new[name] = value.reshape(old.shape).to(old)
        else:
            misshapen.append(f"{theirs} {tuple(value.shape)} for {tuple(old.shape)}")
    unknown = [name for name in table if name not in set(names.values()) and not name.endswith(_COUNTER)]
    problems = [
        f"{what}: {', '.join(sorted(which))}"
        for what, which in (("missing", missing), ("unknown", unknown), ("of another shape", misshapen))
        if which
    ]
    if problems:
        raise CheckpointError(
            f"the weights do not fit the model ({'; '.join(problems)}); check its kind, depth, width, "
            "channels and numbers of classes, or name what is to be left out in without"
        )
    return new


def _compare(table: dict[str, Tensor], name: str, ours: Tensor) -> None:
    """Take a constant out of the table, and raise unless it is the model's."""
    theirs = table.pop(name, None)
    if theirs is None:
        return
    ours = ours.detach().cpu()
    same = theirs.numel() == ours.numel()
    if not (same and torch.allclose(theirs.reshape(ours.shape).to(ours), ours, rtol=1e-4, atol=1e-2)):
        raise CheckpointError(
            f"the weights were trained with {name} {_short(theirs)}, and the model has {_short(ours)}; give it the "
            "same settings"
        )


def _short(values: Tensor) -> list[float]:
    return [round(value, 3) for value in values.flatten().tolist()]


def _trained_with(model: PanopticFPN, whose: str, *, stride_in_1x1: bool, pixels: PixelSettings) -> None:
    """Raise unless the model shows its ResNet what the weights were trained on, and strides where they do."""
    if wanted := _unlike(model, stride_in_1x1=stride_in_1x1, pixels=pixels):
        raise CheckpointError(f"{whose} need a model made with {' and '.join(wanted)}")


def _unlike(model: PanopticFPN, *, stride_in_1x1: bool, pixels: PixelSettings) -> list[str]:
    """The settings in which a model differs, as they should be."""
    wanted = []
    if model.depth > 18 and model.stride_in_1x1 != stride_in_1x1:  # the blocks of ResNet-18 have no 1×1 to stride in
        wanted.append(f"backbone=BackboneSettings(stride_in_1x1={stride_in_1x1})")
    if model.pixels != pixels:
        wanted.append(f"pixels={pixels}")
    return wanted


def _download(depth: int) -> dict[str, Tensor]:
    weights = get_model_weights(f"resnet{depth}")["IMAGENET1K_V1"]
    try:
        found: dict[str, Tensor] = dict(weights.get_state_dict(progress=False, check_hash=True))
    except (URLError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{weights.url} cannot be downloaded ({error}); fetch it where there is a network and give the file"
        ) from error
    return found
