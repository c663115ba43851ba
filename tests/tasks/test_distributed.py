from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_contours import LEAF_SPEC, tiny_data, tiny_task, trainer

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks its processes"),
    pytest.mark.filterwarnings(LEAF_SPEC),
    # The processes are forked from one with a single thread of torch; Python cannot know that the others are idle.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]


def fit(folder: Path, *, processes: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Train on 16 images an epoch in batches of 4 over all processes, and validate on 9."""
    together: dict[str, Any] = {"devices": processes, "strategy": "ddp_fork"} if processes > 1 else {}
    task = tiny_task(learning_rate=1e-3)
    fitted = trainer(folder, max_epochs=2, **together)
    fitted.fit(task, tiny_data(batch_size=4 // processes, train_size=16, val_size=9))
    return {name: float(value) for name, value in fitted.callback_metrics.items()}, task.net.state_dict()


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    one, weights = fit(tmp_path / "one", processes=1)
    two, same_weights = fit(tmp_path / "two", processes=2)
    for name, value in weights.items():
        torch.testing.assert_close(
            same_weights[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )
    for name in one:
        if name.startswith("val/") and "radius" not in name:  # the radius is of each process's first batch
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    assert two["train/backward_failed"] == 2 * one["train/backward_failed"]  # each process has solves of its own
