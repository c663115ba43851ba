"""What every task logs of a backward solve."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

import crbp
from crbp.solvers import StopReason

_FAILED = (StopReason.DIVERGED, StopReason.NOT_FINITE)


def log_backward(
    module: pl.LightningModule,
    report: crbp.Report | None,
    *,
    method: crbp.GradientMethod | None = None,
    batch_size: int | None = None,
) -> None:
    """Log how the backward equation of a run was solved; nothing where there was none.

    A batch may have had no run, for want of an instance. Where ``method`` would have solved an equation, that counts as
    one that did not fail: the counts are summed over processes, and those that had a run wait for the others.
    """
    size: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
    backward = report.backward if report is not None else None
    if backward is not None:
        module.log("train/backward_terms", float(backward.terms), **size)
        module.log("train/backward_residual", backward.residual, **size)
    elif not isinstance(method, crbp.RBP):
        return
    counted: dict[str, Any] = {"on_step": False, "on_epoch": True, "reduce_fx": "sum", "sync_dist": True, **size}
    module.log("train/backward_failed", float(backward is not None and backward.stop in _FAILED), **counted)
    module.log("train/backward_fell_back", float(backward is not None and backward.fell_back), **counted)
