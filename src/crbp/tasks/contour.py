"""Contour tracing as a training task: loss, penalty, what is logged, optimiser and schedule."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

import crbp
from crbp._checks import choice, count, non_negative, share
from crbp.metrics import contour_metrics
from crbp.models import Prediction
from crbp.ops._kept import passing
from crbp.tasks._backward import log_backward
from crbp.tasks._readout import Loss, readout
from crbp.tasks._resume import ResumableModule
from crbp.tasks.penalties import Penalty

Supervision = Literal["last", "all"]
Schedule = Literal["cosine", "constant"]
Stage = Literal["val", "test"]
Batch = dict[str, Tensor]

RAMP = 0.8  # share of the training over which a penalty's weight rises
LEFT = 1 / 6  # of what moves at step N, at 4N, where the penalty on growth costs nothing


class ContourTask(ResumableModule):
    """Train a network to say of each pixel whether it lies on the marked contour.

    ``loss = pixels + ramp · (weight · penalty + residual_weight · residual² + spectral_weight · spectral)``, the first
    the focal or the evidential loss of the readout, minimised by Adam. A batch is
    ``{"image": (B, 1, H, W) in [0, 1], "mask": (B, H, W) of bool}``. The learning rate rises linearly from 0 over the
    first ``warmup · T`` of all ``T`` optimiser steps and then stays or follows ``½ (1 + cos(π t / T))``.

    Logged in training, under ``train/``: ``loss``, ``focal`` or ``evidential``, ``penalty``, ``spectral_penalty``,
    ``residual`` of the last step; of the backward solve ``backward_terms``, ``backward_residual``, and, counted over an
    epoch, ``backward_failed`` (diverged or not finite) and ``backward_fell_back``. In validation and test: ``loss``,
    the numbers of `crbp.metrics.contour_metrics` over all pixels of all processes, ``residual``, ``penalty``, and of
    the first batch ``spectral_radius``, with ``spectral_radius_converged`` 0 where that estimate is not to be trusted.

    Args:
        net: maps images to a `crbp.models.Prediction`; a recurrent one has its `crbp.Evolve` as the attribute
            ``evolve`` and takes ``steps``, a number for one run, as `crbp.models.PathfinderNet` does.
        penalty: on the dynamics, such as `LipschitzPenalty`; None for none.
        penalty_ramp: share of all optimiser steps, in [0, 1), over which the weights of penalty and residual rise
            geometrically from a hundredth of themselves; 0 for their full weight throughout. A strong penalty from the
            start slows learning. None for 0.8 where there is a penalty.
        residual_weight: of `crbp.residual_penalty` in the loss; 0 for none, None for 1 where there is a penalty, which
            by itself can be small while the state keeps moving.
        spectral_weight: of `crbp.spectral_penalty` in the loss; 0 for none, None for 1 where there is a penalty, which
            by itself can be small while the dynamics do not contract.
        spectral_bound: the growth a step that costs nothing, λ of `crbp.spectral_penalty`, in [0, 1); None for
            ``6^(−1/3N)``, by which a sixth of what moves at step ``N`` is left at ``4N``. A lower one makes a state
            settle sooner and trace more slowly.
        step_jitter: train half of the batches with ``N`` steps and the others with up to so many more, drawn anew from
            ``U(1, j t / T)`` at optimiser step ``t`` of ``T``: the state is then asked to be right at ``N`` and to stay
            so, and settles. 0 for none; None for ``2N`` where there is a penalty, without which dynamics do not settle
            in late training; with `crbp.BPTT` the memory then grows to that of ``3N`` steps.
        supervision: ``"last"``, the loss sees the last step; ``"all"``, its mean over every step, which needs
            `crbp.BPTT`.
        loss: of the readout: ``"focal"``, or ``"evidential"``, which teaches the network to say how sure it is.
        gamma: of `crbp.losses.focal_loss`; None for 2.
        kl_weight: of `crbp.losses.evidential_loss` at the end of training, towards which it rises from 0, and in all
            of validation and test; None for 0.1.
        learning_rate: peak of the schedule.
        weight_decay: of Adam, added to the gradient.
        beta2: of Adam, in [0, 1): how long it remembers squared gradients; 0.99 suits runs of a thousand steps.
        schedule: what follows the warm-up.
        warmup: share of all optimiser steps over which the rate rises, in [0, 1).
        spectral_radius: estimate it in every validation; up to 100 vector-Jacobian products on one batch.
        predict_steps: let `predict_step` return the maps of every step as well.

    Raises:
        ValueError: for values out of range, or ones that do not go together.

    Source: Linsley et al., Stable and expressive recurrent vision models, NeurIPS 2020.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        penalty: Penalty | None = None,
        penalty_ramp: float | None = None,
        residual_weight: float | None = None,
        spectral_weight: float | None = None,
        spectral_bound: float | None = None,
        step_jitter: int | None = None,
        supervision: Supervision = "last",
        loss: Loss = "focal",
        gamma: float | None = None,
        kl_weight: float | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        beta2: float = 0.999,
        schedule: Schedule = "cosine",
        warmup: float = 0.02,
        spectral_radius: bool = True,
        predict_steps: bool = False,
    ) -> None:
        super().__init__()
        choice("supervision", supervision, get_args(Supervision))
        choice("schedule", schedule, get_args(Schedule))
        self.readout = readout(loss, gamma, kl_weight)
        non_negative("weight_decay", weight_decay)
        share("warmup", warmup)
        share("beta2", beta2)
        asked = {
            "a penalty": penalty is not None,
            "supervision='all'": supervision == "all",
            "predict_steps": predict_steps,
            "step_jitter": bool(step_jitter),
            "residual_weight": bool(residual_weight),
            "spectral_weight": bool(spectral_weight),
        }
        _check_net(net, [name for name, wanted in asked.items() if wanted])
        self.net = net
        given = penalty is not None
        ramp = (RAMP if given else 0.0) if penalty_ramp is None else penalty_ramp
        jitter = (2 * self._evolve().steps if given else 0) if step_jitter is None else step_jitter
        settle = float(given) if residual_weight is None else residual_weight
        contract = float(given) if spectral_weight is None else spectral_weight
        bound = spectral_bound
        if bound is None:
            bound = LEFT ** (1 / (3 * self._evolve().steps)) if contract else 0.0
        share("penalty_ramp", ramp)
        share("spectral_bound", bound)
        non_negative("residual_weight", settle)
        non_negative("spectral_weight", contract)
        count("step_jitter", jitter, at_least=0)
        if jitter and "steps" not in inspect.signature(net.forward).parameters:
            raise ValueError(
                f"step_jitter={jitter} needs a network that is told its number of steps: give "
                f"{type(net).__name__}.forward an argument `steps`, or set step_jitter=0"
            )
        if ramp and not (given or settle or contract):
            raise ValueError(f"penalty_ramp={ramp!r} has no penalty to raise; give one or leave the ramp at 0")
        if spectral_bound is not None and not contract:
            raise ValueError(
                f"spectral_bound={spectral_bound!r} has no penalty on growth; set spectral_weight or leave it out"
            )
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise ValueError(f"learning_rate must be finite and above 0, not {learning_rate!r}")
        # Only numbers and words: a checkpoint then holds no pickled object and loads with weights_only=True.
        self.save_hyperparameters(ignore=["net", "penalty"])
        self.penalty, self.penalty_ramp, self.step_jitter = penalty, ramp, jitter
        self.residual_weight, self.spectral_weight, self.spectral_bound = settle, contract, bound
        self.supervision, self.loss = supervision, loss
        self.learning_rate, self.weight_decay, self.beta2 = learning_rate, weight_decay, beta2
        self.schedule, self.warmup = schedule, warmup
        self.spectral_radius, self.predict_steps = spectral_radius, predict_steps
        self.val_metrics = contour_metrics().clone(prefix="val/")
        self.test_metrics = contour_metrics().clone(prefix="test/")
        measured = ["loss", *(["residual"] if _is_recurrent(net) else []), *(["penalty"] if penalty else [])]
        self.means = MetricCollection({name: MeanMetric() for name in measured}, compute_groups=False)
        self._report: crbp.Report | None = None

    def forward(self, image: Tensor) -> Tensor:
        """Probability ``(B, H, W)`` of each pixel of the images ``(B, 1, H, W)`` to lie on the marked contour."""
        return self.readout.probability(self.net(image).logits)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        prediction: Prediction = self.net(batch["image"], **self._asked_of_net())
        loss = pixels = self._of_steps(prediction, batch["mask"])
        values: dict[str, Tensor | float] = {f"train/{self.loss}": pixels}
        self.progress = self.readout.progress(prediction.logits.detach(), batch["mask"])
        if prediction.run is not None:
            loss = self._with_penalties(loss, prediction.run, values)
            self._report = prediction.run.report
            self.log("train/residual", self._report.residual)
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict(values)
        return loss

    @passing()
    def _with_penalties(self, loss: Tensor, run: crbp.Run, values: dict[str, Tensor | float]) -> Tensor:
        """The loss with all penalties on the dynamics; they are put among the values to log as well."""
        if self.penalty is not None:
            values["train/penalty"] = penalty = self.penalty(run)
            values["train/penalty_weight"] = weight = self.penalty.weight * self._ramp()
            loss = loss + weight * penalty
        if self.residual_weight:
            loss = loss + self.residual_weight * self._ramp() * crbp.residual_penalty(run)
        if self.spectral_weight:
            values["train/spectral_penalty"] = growth = crbp.spectral_penalty(run, bound=self.spectral_bound)
            loss = loss + self.spectral_weight * self._ramp() * growth
        return loss

    def on_after_backward(self) -> None:
        """Log how the backward equation was solved, which is known only now."""
        log_backward(self, self._report)
        self._report = None

    def training_report(self) -> crbp.Report | None:
        """What the run of the last batch says of itself."""
        return self._report

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count the pixels of a batch and log what its run did."""
        self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Like `validation_step`, under ``test/``."""
        self._evaluate("test", batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over all pixels."""
        self._log_epoch("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the metrics over all pixels."""
        self._log_epoch("test", self.test_metrics)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """``"probability"``, ``(B, H, W)`` in [0, 1], and, where asked for, that of ``"steps"``, ``(B, N, H, W)``."""
        if not self.predict_steps:
            return {"probability": self(batch["image"])}
        prediction: Prediction = self.net(batch["image"], every_step=True)
        assert prediction.steps is not None
        steps = torch.stack([self.readout.probability(logits) for logits in prediction.steps], dim=1)
        return {"probability": self.readout.probability(prediction.logits), "steps": steps}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, and a factor on its rate for every step."""
        optimizer = torch.optim.Adam(
            self.parameters(), lr=self.learning_rate, betas=(0.9, self.beta2), weight_decay=self.weight_decay
        )
        total = self.trainer.estimated_stepping_batches
        rising = self.warmup or self.penalty_ramp or self.step_jitter or self.readout.annealed
        scheduled = self.schedule == "cosine" or rising
        if scheduled and not (math.isfinite(total) and total > 0):
            raise crbp.SettingsError(
                "a schedule needs to know the number of steps; set trainer.max_epochs or trainer.max_steps, or choose "
                "schedule='constant' with warmup=0, penalty_ramp=0 and step_jitter=0, and kl_weight=0 if the loss is "
                "evidential"
            )
        warm = round(self.warmup * total) if self.warmup else 0

        def factor(step: int) -> float:
            rise = min(1.0, (step + 1) / (warm + 1))
            fall = (1 + math.cos(math.pi * min(step / total, 1.0))) / 2 if self.schedule == "cosine" else 1.0
            return rise * fall

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _asked_of_net(self) -> dict[str, Any]:
        """What a recurrent net is told beside the images of a batch; a feed-forward one takes nothing else."""
        asked: dict[str, Any] = {"every_step": True} if self.supervision == "all" else {}
        if self.step_jitter:
            reach = round(self.step_jitter * self._done())
            asked["steps"] = self._evolve().steps + max(0, int(torch.randint(-reach, reach + 1, ())))
        return asked

    def _evolve(self) -> crbp.Evolve:
        evolve = self.net.evolve
        assert isinstance(evolve, crbp.Evolve)  # checked when the task was made
        return evolve

    def _ramp(self) -> float:
        """What the weights of penalty and residual are multiplied by at this step."""
        if not self.penalty_ramp:
            return 1.0
        return float(100 ** min(self._done() / self.penalty_ramp - 1.0, 0.0))

    def _of_steps(self, prediction: Prediction, mask: Tensor) -> Tensor:
        """The loss of the readout in training: of the last step, or of all."""
        done = self._done() if self.readout.annealed else 0.0
        if (steps := prediction.steps) is None:
            return self.readout.cost(prediction.logits, mask, done)
        return self.readout.cost(steps.flatten(0, 1), mask.expand(len(steps), *mask.shape).flatten(0, 1), done)

    def _done(self) -> float:
        """Share of the training."""
        return self.trainer.global_step / self.trainer.estimated_stepping_batches

    def _evaluate(self, stage: Stage, batch: Batch, batch_idx: int) -> None:
        image, mask = batch["image"], batch["mask"]
        prediction: Prediction = self.net(image)
        (self.val_metrics if stage == "val" else self.test_metrics).update(prediction.logits, mask)
        found = {"loss": self.readout.cost(prediction.logits, mask, 1.0)}
        if (run := prediction.run) is not None:
            found["residual"] = torch.tensor(run.report.residual, device=self.device)
            # Random numbers of its own: those that training draws do not depend on how often it is validated.
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(batch_idx)
                if self.penalty is not None:
                    found["penalty"] = self.penalty(run)
                if self.spectral_radius and batch_idx == 0 and not self.trainer.sanity_checking:
                    self._log_spectral_radius(stage, run)
        for name, value in found.items():
            self.means[name].update(value, weight=len(image))

    def _log_epoch(self, stage: Stage, quality: MetricCollection) -> None:
        # Metric objects, since Lightning's own mean is wrong where processes have unequal numbers of images.
        values = {**quality.compute(), **{f"{stage}/{name}": mean for name, mean in self.means.compute().items()}}
        for name, value in values.items():
            # All processes hold the same value already; synchronised once more only because Lightning asks for it.
            self.log(name, value, prog_bar=name == "val/f1", sync_dist=True)
        quality.reset()
        self.means.reset()

    def _log_spectral_radius(self, stage: Stage, run: crbp.Run) -> None:
        if torch.is_inference_mode_enabled():
            raise crbp.CrbpError(
                "the spectral radius needs a graph, which inference mode rules out; use Trainer(inference_mode=False) "
                "or spectral_radius=False"
            )
        found = crbp.spectral_radius(run)
        worst: dict[str, Any] = {"on_epoch": True, "sync_dist": True, "batch_size": 1}
        self.log(f"{stage}/spectral_radius", found.radius, reduce_fx="max", **worst)
        self.log(f"{stage}/spectral_radius_converged", found.converged.float(), reduce_fx="min", **worst)


def _is_recurrent(net: nn.Module) -> bool:
    return isinstance(getattr(net, "evolve", None), crbp.Evolve)


def _check_net(net: nn.Module, asked: Sequence[str]) -> None:
    """Raise where the network cannot do what is asked of it."""
    if not _is_recurrent(net):
        if asked:
            raise ValueError(
                f"{asked[0]} needs a recurrent network, whose attribute `evolve` is a crbp.Evolve; "
                f"{type(net).__name__} has none"
            )
        return
    evolve: crbp.Evolve = net.evolve  # type: ignore[assignment]
    if "supervision='all'" in asked and not isinstance(evolve.gradient, crbp.BPTT):
        raise ValueError(
            "supervision='all' needs a gradient method that keeps the graph of every step: crbp.BPTT(), not "
            f"{evolve.gradient!r}"
        )
