import os
from pathlib import Path

import pytest
import torch

from crbp._threads import lent_cores, set_threads, usable_cores


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "1000 100000\n"}, 1),
        ({"cpu.max": "100000 50000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "300000\n"}, None),
        ({"cpu.max": "\n"}, None),
        ({"cpu.max": "100000 0\n"}, None),
    ],
    ids=str,
)
def test_a_quota_lends_whole_cores(tmp_path: Path, files: dict[str, str], cores: int | None) -> None:
    assert lent_cores(written(tmp_path, files)) == cores


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not tell")
@pytest.mark.parametrize(("quota", "least"), [("50000", 1), ("max", None), ("1000000000", None)])
def test_a_quota_only_lessens_the_cores_that_may_be_run_on(tmp_path: Path, quota: str, least: int | None) -> None:
    allowed = len(os.sched_getaffinity(0))
    assert usable_cores(written(tmp_path, {"cpu.max": f"{quota} 100000"})) == (least or allowed)


def test_a_command_takes_as_many_threads_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = usable_cores() or torch.get_num_threads()
    torch.set_num_threads(cores + 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    set_threads()
    assert torch.get_num_threads() == cores + 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    set_threads()
    assert torch.get_num_threads() == cores + (not hasattr(os, "sched_getaffinity"))
