"""What every task logs of a backward solve."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

import crbp
from crbp.solvers import StopReason

_FAILED = (StopReason.DIVERGED, StopReason.NOT_FINITE)


def log_backward(module: pl.LightningModule, report: crbp.Report | None, batch_size: int | None = None) -> None:
    """Log how the backward equation of a run was solved; nothing where there was none."""
    backward = report.backward if report is not None else None
    if backward is None:
        return
    size: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
    module.log("train/backward_terms", float(backward.terms), **size)
    module.log("train/backward_residual", backward.residual, **size)
    counted: dict[str, Any] = {"on_step": False, "on_epoch": True, "reduce_fx": "sum", "sync_dist": True, **size}
    module.log("train/backward_failed", float(backward.stop in _FAILED), **counted)
    module.log("train/backward_fell_back", float(backward.fell_back), **counted)
