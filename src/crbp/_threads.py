"""How many cores this process may use: a container may lend it the time of fewer than it may run on."""

from __future__ import annotations

import os
from pathlib import Path

import torch

GROUPS = Path("/sys/fs/cgroup")


def set_threads() -> None:
    """Let torch take as many threads as this process may use cores, unless ``OMP_NUM_THREADS`` says otherwise.

    Torch counts the machine's cores, of which a container or a batch system may lend only some; more threads than
    cores cost up to ten times the time.
    """
    if "OMP_NUM_THREADS" not in os.environ and (cores := usable_cores()) is not None:
        torch.set_num_threads(cores)


def usable_cores(groups: Path = GROUPS) -> int | None:
    """Cores that this process may use at a time; None where the system does not tell."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    cores, lent = len(os.sched_getaffinity(0)), lent_cores(groups)
    return cores if lent is None else min(cores, lent)


def lent_cores(groups: Path = GROUPS) -> int | None:
    """Cores whose time ``docker run --cpus`` or a limit of Kubernetes lends, rounded up; None without such a quota."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroup v2, and v1
        try:
            quota, period = " ".join((groups / name).read_text(encoding="ascii") for name in names).split()
            return None if quota in ("max", "-1") else max(1, -(-int(quota) // int(period)))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return None
