"""Numbers that are not finite: found at the step at which they appear, named, and dealt with as asked."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.utils._pytree import SequenceKey, keystr, tree_flatten_with_path

from crbp._checks import choice, count
from crbp.errors import NonFiniteError, NonFiniteWarning
from crbp.solvers import StopReason
from crbp.tasks._resume import ResumableModule, last_checkpoint
from crbp.tasks.sampling import ResumableLoader

FinitePolicy = Literal["raise", "skip", "restore"]

_LOWER = "lower learning_rate, or train with --trainer.precision 32-true"
_NAMED = 3  # tensors or images that a message names


class NonFinite(pl.Callback):
    """See that loss, gradients and weights stay finite, and say where a number that is not comes from.

    Every optimiser step measures the largest gradient before and the largest weight after it, and asks all processes
    whether theirs are finite: they decide alike. What is not is traced to the images of a batch, to parameters, to
    the backward series, or to the gradient of a parameter. Gradients that a scaler of 16-bit floats makes overflow are
    left to it.

    Args:
        policy: ``"raise"`` a `crbp.NonFiniteError`; ``"skip"`` the step, which then changes neither weights nor the
            optimiser, with a `crbp.NonFiniteWarning`; ``"restore"`` weights and optimiser from ``last.ckpt`` and go on
            with the next images, with that warning. How often, is logged as ``train/not_finite``.
        most_in_a_row: so many optimiser steps in a row may be skipped or restored; one more raises. Weights that are
            not finite raise with ``"skip"`` too, since no later step mends them.

    Raises:
        ValueError: for an unknown policy, or a number below 1.
    """

    def __init__(self, policy: FinitePolicy = "raise", *, most_in_a_row: int = 10) -> None:
        choice("policy", policy, get_args(FinitePolicy))
        count("most_in_a_row", most_in_a_row)
        self.policy, self.most_in_a_row = policy, most_in_a_row
        self.found = 0
        self._in_a_row = 0
        self._stepped = self._mended = False
        self._fault: str | None = None  # of the batches since the last step of the optimiser
        self._batch: tuple[Any, int] | None = None
        self._buffers: list[tuple[Tensor, Tensor]] | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at weights and images; keep what a fault is traced to, and what a skipped step puts back."""
        self._batch = batch, batch_idx
        self._look_at_weights(trainer, pl_module, f"{self._where(trainer)}: ")
        if self.policy == "skip" and self._buffers is None:
            # Statistics of batches change in the forward pass, before anything is known to be wrong.
            self._buffers = [(buffer, buffer.clone()) for buffer in pl_module.buffers()]
        floats = [leaf for _, leaf in _floats(batch)]
        if not _finite(floats):
            images = _in_batch(batch, trainer.train_dataloader, batch_idx)
            self._tell(trainer, f"{self._where(trainer)}: {images} not finite; correct the data or leave it out")
            for leaf in floats:
                # The gradients will be thrown away, but the forward pass has to reach them on every process.
                leaf.nan_to_num_(0.0, 0.0, 0.0)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Look at the loss of a batch."""
        value = float(loss.detach())
        if not math.isfinite(value):
            self._tell(trainer, f"{self._where(trainer)}: the loss is {value} of finite images and weights; {_LOWER}")

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at how the backward equation was solved."""
        report = pl_module.training_report() if isinstance(pl_module, ResumableModule) else None
        backward = report.backward if report is not None else None
        if _scaled(trainer):  # the series of a scaled loss overflows as its gradients do
            return
        if self._fault is None and backward is not None and backward.stop is StopReason.NOT_FINITE:
            if backward.fell_back:
                return  # to a solution that is finite
            self._fault = (
                f"{self._where(trainer)}: the backward series is not finite after {backward.terms} terms; raise the "
                "weight of the penalty, lower learning_rate, or choose on_divergence='fallback'"
            )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at the gradients; step, or do as the policy says."""
        self._stepped = True
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self._fault is None and not _scaled(trainer) and not _finite(gradients):
            self._fault = self._of_gradient(trainer, pl_module)
        self._mended = not _agreed(trainer, self._fault is None)
        if self._mended:
            self._mend(trainer, optimizer, self._fault)
        self._fault = self._buffers = None
        if self.policy != "raise":
            pl_module.log("train/not_finite", float(self.found), batch_size=1)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the weights that the step has made, before they are saved or measured."""
        self._batch = None
        if not self._stepped:
            return
        self._stepped = False
        fine = self._look_at_weights(trainer, pl_module, f"after step {trainer.global_step}: ")
        if fine and not self._mended:
            self._in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        """How often something was not finite."""
        return {"found": self.found}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Count on."""
        self.found = state_dict["found"]

    def _look_at_weights(self, trainer: pl.Trainer, module: pl.LightningModule, where: str) -> bool:
        """Whether they are finite on all processes; where they are not, the policy is carried out."""
        fault = None
        if not _finite([p.detach() for p in module.parameters()]):
            fault = f"{where}{_named(module.named_parameters())} not finite; {_LOWER}"
        if _agreed(trainer, fault is None):
            return True
        if self.policy == "skip":
            raise NonFiniteError(fault or _ELSEWHERE)
        self._mend(trainer, trainer.optimizers[0], fault)
        return False

    def _tell(self, trainer: pl.Trainer, fault: str) -> None:
        """Note the first fault since the last step, or end with it at once."""
        self._fault = self._fault or fault
        if self.policy == "raise" and trainer.world_size == 1:  # others would wait for this process's gradients
            raise NonFiniteError(self._fault)

    def _mend(self, trainer: pl.Trainer, optimizer: torch.optim.Optimizer, found: str | None) -> None:
        """Carry out the policy on a fault of this or, where none was found here, another process."""
        fault = found or _ELSEWHERE
        if self.policy == "raise":
            raise NonFiniteError(fault)
        self.found += 1
        self._in_a_row += 1
        if self._in_a_row > self.most_in_a_row:
            raise NonFiniteError(f"{fault}; this is so for more than {self.most_in_a_row} steps in a row")
        optimizer.zero_grad(set_to_none=True)  # an optimiser leaves alone what has no gradient
        if self.policy == "skip":
            with torch.no_grad():
                for buffer, before in self._buffers or ():
                    buffer.copy_(before)
            done = "the step is skipped"
        else:
            done = f"restored {_restore(trainer, fault)}"
        if trainer.is_global_zero or found is not None:
            warnings.warn(f"{fault}; {done} ({self.found} so far)", NonFiniteWarning, stacklevel=2)

    def _of_gradient(self, trainer: pl.Trainer, module: pl.LightningModule) -> str:
        names = _named((f"the gradient of {name}", p.grad) for name, p in module.named_parameters())
        return f"{self._where(trainer)}: {names} not finite, of a finite loss; {_LOWER}"

    def _where(self, trainer: pl.Trainer) -> str:
        assert self._batch is not None
        return f"step {trainer.global_step}, batch {self._batch[1]} of epoch {trainer.current_epoch}"


_ELSEWHERE = "another process has found a number that is not finite, and says which"


def _agreed(trainer: pl.Trainer, well: bool) -> bool:
    """Whether all is well on every process."""
    return bool(trainer.strategy.reduce_boolean_decision(well, all=True))


def _finite(tensors: list[Tensor]) -> bool:
    """Whether all numbers are finite; one reduction, and the only wait for the device."""
    if not tensors or math.isfinite(float(get_total_norm(tensors))):
        return True
    # The squares of numbers that are finite may not be; the largest number is, but takes longer to find.
    return math.isfinite(float(get_total_norm(tensors, norm_type=math.inf)))


def _named(tensors: Iterable[tuple[str, Tensor | None]]) -> str:
    """The first names of tensors that are not finite, as the subject of a sentence."""
    names = [name for name, each in tensors if each is not None and not _finite([each.detach().float()])]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more} {'is' if len(names) == 1 else 'are'}" if names else ""


def _scaled(trainer: pl.Trainer) -> bool:
    """Whether a scaler of 16-bit floats looks for gradients that overflow."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _floats(batch: Any) -> list[tuple[Any, Tensor]]:
    """The tensors of a batch that could hold a number that is not finite, and where they are in it."""
    leaves = tree_flatten_with_path(batch)[0]
    return [(path, leaf) for path, leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _in_batch(batch: Any, loader: Any, index: int) -> str:
    """Which images of a batch are not finite, by their number in the data set where the loader knows it."""
    rows: dict[str, set[int]] = {}
    for path, leaf in _floats(batch):
        if not _finite([leaf]):
            listed = [key.idx for key in path if isinstance(key, SequenceKey)]
            bad = listed[:1] or torch.nonzero(~leaf.isfinite().flatten(1).all(dim=1)).flatten().tolist()
            rows.setdefault(keystr(path[:1]), set()).update(bad)
    keys = loader.keys(index) if isinstance(loader, ResumableLoader) else None
    numbers = sorted({row if keys is None else keys[row].item for each in rows.values() for row in each})
    said = ", ".join(map(str, numbers[:_NAMED])) + (f" and {len(numbers) - _NAMED} more" if numbers[_NAMED:] else "")
    return f"{', '.join(rows)} of image {said} of the {'batch' if keys is None else 'training data'} is"


def _restore(trainer: pl.Trainer, fault: str) -> str:
    """Take weights and optimiser from the last checkpoint, whose path is returned."""
    path = last_checkpoint(trainer)
    if not path.exists():
        raise NonFiniteError(f"{fault}; there is no {path} yet that could be restored")
    checkpoint: Mapping[str, Any] = trainer.strategy.load_checkpoint(path, weights_only=True)
    trainer.strategy.load_model_state_dict(checkpoint, strict=True)
    trainer.strategy.load_optimizer_state_dict(checkpoint)
    return str(path)
