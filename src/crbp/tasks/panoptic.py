"""Panoptic segmentation as a training task: losses, metrics, what is logged, optimiser and schedule."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

import crbp
from crbp._checkpoint import checkpoint_file
from crbp._checks import choice, count, non_negative, share
from crbp._temporarily import temporarily
from crbp.data.panoptic import Categories
from crbp.metrics import DetectionAP, PanopticQuality, PanopticWriter
from crbp.models import RFPN, PanopticFPN
from crbp.models.panoptic import PanopticResult, load_weights
from crbp.tasks._backward import log_backward
from crbp.tasks._resume import ResumableModule
from crbp.tasks.panoptic_pictures import PanopticBatch, Truth, check_apart
from crbp.tasks.weights import WeightsError, load_net, trusted_packages

Optimizer = Literal["sgd", "adamw"]
Stage = Literal["val", "test"]

QUALITIES = tuple(f"{name}{kind}" for kind in ("", "_things", "_stuff") for name in ("pq", "sq", "rq"))
_CLASSIFIED = ("rpn_class", "box_class", "mask", "semantic")  # losses that are cross-entropies
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_NORMS = (_BATCH_NORM, nn.GroupNorm, nn.LayerNorm)


class PanopticTask(ResumableModule):
    """Train Panoptic FPN or R-FPN; measure panoptic quality and average precision.

    The sum of the network's losses is minimised by stochastic gradient descent or AdamW. The rate is
    ``learning_rate · n / reference_batch`` with ``n`` the images of an optimiser step, over all processes and
    accumulated batches; it rises linearly from a thousandth of that over ``warmup_steps`` and falls to a tenth at each
    of the ``milestones``. Norms have no weight decay. The defaults are the published 1× schedule, with
    ``max_steps=90000``.

    Logged in training, under ``train/``: ``loss`` and each of its parts; of R-FPN also ``residual`` and what
    `ContourTask` logs of the backward solve. In validation and test: ``pq``, ``sq``, ``rq``, the same of things and of
    stuff, and, unless ``average_precision`` is off, ``box_ap`` and ``mask_ap``, of the visible pixels of things as the
    panoptic labels have them, and therefore not comparable with figures for COCO's instances, which overlap.

    Args:
        net: the network, for as many classes of things and stuff as the data have.
        optimizer: ``"sgd"`` or ``"adamw"``.
        learning_rate: for a batch of ``reference_batch`` images.
        reference_batch: see there.
        momentum: of stochastic gradient descent, or ``β₁`` of AdamW, in [0, 1).
        beta2: of AdamW, in [0, 1): how long it remembers squared gradients; 0.99 suits mask heads that C-RBP trains.
        weight_decay: of all but norms.
        warmup_steps: optimiser steps over which the rate rises.
        milestones: shares of all optimiser steps, rising, at which the rate falls.
        average_precision: measure it in validation and test; it takes about as long as panoptic quality.
        steps: of the mask head's recurrence in validation, test and prediction; None for those it is trained with.
        weights: to start training from, as `crbp.models.panoptic.load_weights` takes them: ``"imagenet"``, a file of
            detectron2's or torchvision's, or of either network what `crbp analyze` takes: the file or folder
            that `crbp fit` wrote; None to train from scratch. Where no checkpoint is read, validation, test and
            prediction measure these.
        without: beginnings of names of what is not taken from those weights but trained from scratch all the same, such
            as ``["roi_heads.mask_head."]`` where an R-FPN starts from a Panoptic FPN.
        trained: beginnings of names of what is trained, such as ``["roi_heads.mask_head."]``; all else keeps its
            weights, and the statistics of its norms. Empty for the whole network.
        results: write what a test or a prediction finds as COCO's server takes it: this JSON, and PNGs in the folder of
            the same name. None for nothing. With several processes each writes its own, its rank in the name.

    Raises:
        ValueError: for values out of range, or ones that do not go together.
        TypeError: if ``trained`` is one text.

    Source: Kirillov et al., Panoptic feature pyramid networks, CVPR 2019; Linsley et al., NeurIPS 2020.
    """

    monitor = "val/pq"  # what the best checkpoint is chosen by

    def __init__(
        self,
        net: PanopticFPN,
        *,
        optimizer: Optimizer = "sgd",
        learning_rate: float = 0.02,
        reference_batch: int = 16,
        momentum: float = 0.9,
        beta2: float = 0.999,
        weight_decay: float = 1e-4,
        warmup_steps: int = 1000,
        milestones: tuple[float, ...] = (2 / 3, 8 / 9),
        average_precision: bool = True,
        steps: int | None = None,
        weights: str | None = None,
        without: tuple[str, ...] = (),
        trained: Sequence[str] = (),
        results: str | None = None,
    ) -> None:
        super().__init__()
        choice("optimizer", optimizer, get_args(Optimizer))
        count("reference_batch", reference_batch)
        share("momentum", momentum)
        share("beta2", beta2)
        non_negative("weight_decay", weight_decay)
        count("warmup_steps", warmup_steps, at_least=0)
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise ValueError(f"learning_rate must be finite and above 0, not {learning_rate!r}")
        for each in milestones:
            share("milestones", each)
        if list(milestones) != sorted(milestones):
            raise ValueError(f"milestones must rise, not be {milestones}")
        if steps is not None:
            count("steps", steps)
            if not isinstance(net, RFPN):
                raise ValueError(f"steps={steps} needs a recurrent mask head; {type(net).__name__} has none")
        if without and weights is None:
            raise ValueError(f"without={list(without)} leaves out of weights, and there are none to start from")
        if trained:
            _train_only(net, trained, without)
        self.save_hyperparameters(ignore=["net"])
        self.net = net
        self.trained = tuple(trained)
        self.optimizer, self.learning_rate, self.reference_batch = optimizer, learning_rate, reference_batch
        self.momentum, self.beta2, self.weight_decay = momentum, beta2, weight_decay
        self.warmup_steps, self.milestones = warmup_steps, tuple(milestones)
        self.average_precision, self.steps = average_precision, steps
        self.weights, self.without, self.results = weights, tuple(without), results
        self._files = ExitStack()
        self._writer: PanopticWriter | None = None
        self.categories: Categories | None = None
        self.quality: PanopticQuality | None = None
        self.precision: DetectionAP | None = None

    def setup(self, stage: str) -> None:
        """Take the categories from the data.

        Raises:
            SettingsError: if there is no data module, or the network has other numbers of classes.
        """
        if stage == "predict":
            return  # pictures need no data set: the checkpoint knows the categories
        self._take(self._data().categories)
        assert self.categories is not None
        self.quality = PanopticQuality(self.categories.as_json())
        self.precision = DetectionAP() if self.average_precision else None

    def on_fit_start(self) -> None:
        """Take the weights to start from, once, and none where a checkpoint was read.

        Raises:
            CheckpointError: if they cannot be had or do not fit.
            WeightsError: if a `.safetensors` file cannot be read.
        """
        self._take_weights()

    def on_validation_start(self) -> None:
        """Take the same weights to measure, where nothing was trained and no checkpoint read.

        Raises:
            SettingsError: if they are of a ResNet alone.
        """
        self._take_weights(whole=True)

    def has_weights(self) -> bool:
        """Whether there is anything to measure: weights were taken up, or will be, and of all parts."""
        return self._loaded or not (self.weights in (None, "imagenet") or self.without)

    def _take_weights(self, *, whole: bool = False) -> None:
        if self.weights is not None and not self._loaded:
            found = load_weights(self.net, _source(self.weights), without=self.without)
            if whole and not found:
                raise crbp.SettingsError(
                    f"{self.weights} has a ResNet alone, and the rest is untrained; train it first"
                )
            self._loaded = True

    def on_train_start(self) -> None:
        """Let norms that are not trained keep their statistics."""
        super().on_train_start()
        for name, module in self.net.named_modules():
            if self.trained and isinstance(module, _BATCH_NORM) and not f"{name}.".startswith(self.trained):
                module.eval()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the categories as well."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["categories"] = self.categories.as_json() if self.categories is not None else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the categories, where training has not given them."""
        super().on_load_checkpoint(checkpoint)
        if self.categories is None and checkpoint.get("categories"):
            self._take(Categories(checkpoint["categories"]))

    def on_predict_start(self) -> None:
        """Take the categories from the data, where no checkpoint has given them, and weights as before validation."""
        self._take_weights(whole=True)
        if self.categories is None:
            self._take(self._data().categories)
        self._open_results()

    def on_predict_end(self) -> None:
        """Close the files of the results."""
        self.on_test_end()

    def _data(self) -> Any:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data is None:
            raise crbp.SettingsError(
                "PanopticTask takes categories and batch size from a crbp.tasks.PanopticData; give one"
            )
        return data

    def _take(self, categories: Categories) -> None:
        wanted, has = (len(categories.things), len(categories.stuff)), (self.net.things, self.net.stuff)
        if wanted != has:
            raise crbp.SettingsError(
                f"the data have {wanted[0]} classes of things and {wanted[1]} of stuff, the network {has[0]} and "
                f"{has[1]}; set things={wanted[0]} and stuff={wanted[1]}"
            )
        self.categories = categories

    def training_step(self, batch: PanopticBatch, batch_idx: int) -> Tensor:
        """The sum of the losses of a batch."""
        losses: dict[str, Tensor] = self.net(batch.images, batch.targets)
        loss = torch.stack(list(losses.values())).sum()
        size = len(batch.images)
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, batch_size=size)
        classified = torch.stack([losses[name].detach() for name in _CLASSIFIED]).sum()
        self.progress = classified, torch.full_like(classified, self._uniform_loss())
        if (report := self.training_report()) is not None:
            self.log("train/residual", report.residual, batch_size=size)
        return loss

    def on_after_backward(self) -> None:
        """Log how the backward equation was solved, which is known only now."""
        method = self.net.mask_head.evolve.gradient if isinstance(self.net, RFPN) else None
        log_backward(self, self.training_report(), method=method, batch_size=1)

    def training_report(self) -> crbp.Report | None:
        """What the mask head's run of the last batch says of itself."""
        return self.net.report if isinstance(self.net, RFPN) else None

    def validation_step(self, batch: PanopticBatch, batch_idx: int) -> None:
        """Count the segments of a batch."""
        self._evaluate(batch)

    def on_test_start(self) -> None:
        """Take weights as before validation; open the files of the results, where they are asked for."""
        self._take_weights(whole=True)
        self._open_results()

    def _open_results(self) -> None:
        self._files.pop_all()  # of a run that failed, whose JSON is not to be written
        if self.results is not None:
            path, rank = Path(self.results), self.trainer.global_rank
            pictures, listing = (getattr(self._data(), name, None) for name in ("predict", "predict_list"))
            check_apart(path.with_suffix(""), pictures)
            if listing is not None and path.resolve() == listing.resolve():
                raise crbp.SettingsError(f"{path} is the list of the pictures; choose other results")
            name = path.stem if self.trainer.world_size == 1 else f"{path.stem}_{rank}"
            self._writer = self._files.enter_context(PanopticWriter(path.with_name(f"{name}.json")))

    def on_test_end(self) -> None:
        """Close them: only now is the JSON written."""
        self._files.close()
        self._writer = None

    def test_step(self, batch: PanopticBatch, batch_idx: int) -> None:
        """Like `validation_step`, under ``test/``."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over all images."""
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics over all images."""
        self._log_epoch("test")

    def predict_step(self, batch: PanopticBatch, batch_idx: int) -> list[PanopticResult]:
        """What is seen in each image: the panoptic map and the instances in it."""
        results = self._results(batch, merged_only=True)
        if self._writer is not None:
            for result, target in zip(results, batch.targets, strict=True):
                self._writer.write(target["image_id"], result.panoptic, self.segments(result))
        return results

    def prediction_writer(self, folder: str) -> pl.Callback:
        """What ``crbp predict`` writes the results with."""
        from crbp.tasks.panoptic_predictions import PanopticPredictionWriter

        return PanopticPredictionWriter(folder)

    def segments(self, result: PanopticResult) -> list[dict[str, Any]]:
        """The segments of a result as COCO's ``segments_info``, with the ids of the data set's categories."""
        assert self.categories is not None  # taken in setup
        return segments_info(result, self.categories)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser, and a factor on its rate for every step."""
        total = self.trainer.estimated_stepping_batches
        if not (math.isfinite(total) and total > 0):
            raise crbp.SettingsError(
                "the schedule needs to know the number of steps; set trainer.max_steps or max_epochs"
            )
        rate = self.learning_rate * self._images_per_step() / self.reference_batch
        groups = _parameter_groups(self.net, self.weight_decay)
        made: torch.optim.Optimizer
        if self.optimizer == "sgd":
            made = torch.optim.SGD(groups, lr=rate, momentum=self.momentum)
        else:
            made = torch.optim.AdamW(groups, lr=rate, betas=(self.momentum, self.beta2))

        def factor(step: int) -> float:
            done = step / self.warmup_steps if self.warmup_steps else 1.0
            rise = 1.0 if done >= 1 else 0.001 + 0.999 * done
            return rise * 0.1 ** bisect.bisect_right(self.milestones, step / total)

        scheduler = torch.optim.lr_scheduler.LambdaLR(made, factor)
        return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _images_per_step(self) -> int:
        return int(self._data().batch_size) * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def _uniform_loss(self) -> float:
        """What an answer costs that takes all classes to be equally likely."""
        things, stuff = math.log(self.net.things + 1), math.log(self.net.stuff + 1)
        return 2 * math.log(2) + things + float(self.net.semantic_head.weight) * stuff

    def _results(self, batch: PanopticBatch, *, merged_only: bool) -> list[PanopticResult]:
        wanted: dict[str, Any] = {"merged_only": merged_only} if isinstance(self.net, PanopticFPN) else {}
        if self.steps is not None:
            wanted["steps"] = self.steps
        with temporarily(self.net, **wanted):
            return self.net(batch.images, sizes=[target["size"] for target in batch.targets])  # type: ignore[no-any-return]

    def _evaluate(self, batch: PanopticBatch) -> None:
        assert self.quality is not None  # made in setup
        assert self.categories is not None
        assert batch.truths is not None
        results = self._results(batch, merged_only=self.precision is None)
        for result, target, truth in zip(results, batch.targets, batch.truths, strict=True):
            segments = self.segments(result)
            self.quality.update(result.panoptic, segments, *truth)
            if self._writer is not None:
                self._writer.write(target["image_id"], result.panoptic, segments)
            if self.precision is not None:
                found = {name: getattr(result, name) for name in ("boxes", "scores", "labels", "masks")}
                self.precision.update([found], [instances(truth, self.categories)])

    def _log_epoch(self, stage: Stage) -> None:
        assert self.quality is not None
        found = self.quality.compute()
        values = {name: float(found[name]) for name in QUALITIES}
        self.quality.reset()
        if self.precision is not None:
            values |= {name: v for name, v in self.precision.compute().items() if name in ("box_ap", "mask_ap")}
            self.precision.reset()
        for name, value in values.items():
            # All processes hold the same value already; synchronised once more only because Lightning asks for it.
            self.log(f"{stage}/{name}", value, prog_bar=name == "pq", sync_dist=True)


def _train_only(net: nn.Module, trained: Sequence[str], without: Sequence[str]) -> None:
    """Freeze all parameters but those whose names begin so.

    Raises:
        TypeError: if ``trained`` is one text.
        ValueError: if there is nothing to train of such a name, or what is ``without`` weights would not be trained.
    """
    if isinstance(trained, str):
        raise TypeError(f"trained must be a list of beginnings of names, not the text {trained!r}")
    free = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    for start in trained:
        if not any(name.startswith(start) for name in free):
            parts = ", ".join(sorted({f"{name.split('.', 1)[0]}." for name in free}))
            raise ValueError(f"trained: nothing to train has a name that begins with {start!r}; parts are {parts}")
    if idle := [start for start in without if not start.startswith(tuple(trained))]:
        raise ValueError(f"without={idle} is neither taken from weights nor trained; add it to trained")
    for name, parameter in free.items():
        parameter.requires_grad_(name.startswith(tuple(trained)))


def _source(named: str) -> str | PanopticFPN:
    """What weights are to come from: a network of crbp's, or what `load_weights` reads by itself."""
    file = checkpoint_file(Path(named))
    if file.suffix not in (".safetensors", ".ckpt"):
        return named
    net = load_net(file, trust=trusted_packages())
    if not isinstance(net, PanopticFPN):
        raise WeightsError(f"{file} holds a {type(net).__name__}; a panoptic network starts from a panoptic one")
    return net


def segments_info(result: PanopticResult, categories: Categories) -> list[dict[str, Any]]:
    """The segments of a result as COCO's ``segments_info``, with the ids of the categories and scores of things."""
    found = []
    for segment in result.segments:
        label, thing = segment["label"], segment["isthing"]
        entry = {"id": segment["id"], "category_id": categories.things[label] if thing else categories.stuff[label - 1]}
        found.append(entry | ({"score": float(segment["score"])} if thing else {}))
    return found


def instances(truth: Truth, categories: Categories) -> dict[str, Tensor]:
    """The things of a map of segments as `crbp.metrics.DetectionAP` takes them, crowds included."""
    ids, segments = truth
    things = [each for each in segments if categories.isthing(each["category_id"])]
    numbers = ids.new_tensor([each["id"] for each in things])
    corners = torch.tensor([each["bbox"] for each in things], dtype=torch.float32, device=ids.device).view(-1, 4)
    return {
        "boxes": torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:]], dim=1),
        "labels": ids.new_tensor([categories.thing_label(each["category_id"]) for each in things]).long(),
        "masks": ids[None] == numbers[:, None, None],
        "iscrowd": ids.new_tensor([each["iscrowd"] for each in things]),
    }


def _parameter_groups(net: nn.Module, weight_decay: float) -> Sequence[dict[str, Any]]:
    norms = {id(p) for module in net.modules() if isinstance(module, _NORMS) for p in module.parameters(recurse=False)}
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if id(p) not in norms], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in norms], "weight_decay": 0.0},
    ]
