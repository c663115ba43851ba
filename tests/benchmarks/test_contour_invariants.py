"""What must hold of every contour image holds of some of tasks drawn at random, and its checks see what breaks it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crbp.data.pathfinder import PathfinderConfig


@pytest.fixture(scope="module")
def invariants(load_script: Any) -> ModuleType:
    made: ModuleType = load_script("benchmarks/contour_invariants.py")
    return made


def test_images_of_random_tasks_keep_their_promises(invariants: ModuleType) -> None:
    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(st.randoms(use_true_random=False))
    def check(random: Any) -> None:
        assert invariants.look_at(random, 4)[1] == []

    check()


def test_strokes_that_cross_and_masks_in_pieces_are_seen(
    invariants: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = PathfinderConfig.preset("mini")
    made = invariants.scene(config, 3, split="train", seed=0)
    made.contours[1][0] = made.contours[0][0] + 0.1
    monkeypatch.setattr(invariants, "scene", lambda *_, **__: made)
    assert any("touch" in fault for fault in invariants.scene_faults(config, 3, seed=0))
    batch = invariants.generate_batch(config, split="train", seed=0, start=3, count=1)
    batch.masks[0, :2, :2], batch.masks[0, -2:, -2:] = True, True
    monkeypatch.setattr(invariants, "generate_batch", lambda *_, **__: batch)
    assert "the mask is in several pieces" in invariants.image_faults(config, 3, seed=0)
    apart = invariants.distances(np.array([[0, 0, 2, 0], [0, 1, 2, 1], [1, -1, 1, 0.5]]))
    np.testing.assert_allclose(apart[np.triu_indices(3, 1)], [1, 0, 0.5])
