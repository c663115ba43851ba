"""Processes of one group, forked from the test's own: started at once, joined within a bound."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def in_ranks(
    processes: int, function: Callable[..., Any], *arguments: Any, folder: Path, bound: float = 60
) -> list[Any]:
    """What ``function(rank, *arguments)`` returns in each process of a group; it fails after ``bound`` seconds."""
    started = torch.multiprocessing.start_processes(
        _member, (processes, function, arguments, folder), nprocs=processes, join=False, start_method="fork"
    )
    assert started is not None
    end = time.monotonic() + bound
    while not started.join(timeout=1):
        if time.monotonic() > end:
            for process in started.processes:
                process.kill()
            raise TimeoutError(f"{processes} processes have not ended within {bound} s")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def _member(rank: int, processes: int, function: Callable[..., Any], arguments: tuple[Any, ...], folder: Path) -> None:
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), processes), rank=rank, world_size=processes
    )
    torch.save(function(rank, *arguments), folder / f"{rank}.pt")
    dist.destroy_process_group()
