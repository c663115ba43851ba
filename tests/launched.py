"""Runs of `crbp fit` as processes of their own, found, signalled and waited for by their tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "pathfinder" / "mini_hgru_crbp.yaml"
# Two images a process and step, and a checkpoint every fifth step.
TINY = [
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1"),
    *("--trainer.val_check_interval", "5", "--trainer.max_epochs", "1000", "--trainer.num_sanity_val_steps", "0"),
    *("--model.net.cell.channels", "2", "--model.net.cell.kernel_size", "3", "--model.net.evolve.steps", "3"),
    *("--model.step_jitter", "1", "--data.batch_size", "2", "--data.train_size", "400", "--data.val_size", "3"),
    *("--data.lead_in", "null", "--data.lead_in_size", "0", "--data.workers", "0"),
]
BOUND = 240  # seconds in which anything here has to happen, on a machine that does other things as well


def environment(**settings: str) -> dict[str, str]:
    """That of a run: one thread, the commands of this Python first."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PL_"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", **settings}


def free_port() -> str:
    """A port that nothing listens on now, for one run: two that meet at one port wait for each other forever."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@contextmanager
def started(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process whose output goes to the file ``log``; whatever is left of it and its children is killed at the end."""
    with (folder / "log").open("a") as log:
        run = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
        )
        try:
            yield run
        finally:
            for pid in members(run.pid):
                os.kill(pid, signal.SIGKILL)
            run.wait()


def members(first: int) -> list[int]:
    """The processes of a session, and those that come from them in sessions of their own, as torchrun's do."""
    found = {first}
    processes = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended meanwhile
            continue
        if state != "Z":
            processes[int(stat.parent.name)] = (int(parent), int(session))
    before = 0
    while before != len(found):
        before = len(found)
        found |= {pid for pid, origin in processes.items() if found.intersection(origin)}
    return [pid for pid in found if pid in processes]


def with_variable(first: int, name: str, value: str) -> int:
    """The one of a process and its members that trains with a variable of the environment set to a value."""
    (found,) = [
        pid
        for pid in members(first)
        if f"{name}={value}" in Path(f"/proc/{pid}/environ").read_text().split("\0")
        and "fit" in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    ]
    return found


def wait_for(path: Path, run: subprocess.Popen[str]) -> None:
    """Return once a file is there."""
    end = time.monotonic() + BOUND
    while not path.exists():
        assert run.poll() is None, f"{run.args} ended with {run.returncode} before {path} was there"
        assert time.monotonic() < end, f"{path} has not come within {BOUND} s"
        time.sleep(0.1)


def wait_until_gone(pid: int, within: float) -> None:
    """Return once a process has ended."""
    end = time.monotonic() + within
    while pid in members(pid):
        assert time.monotonic() < end, f"process {pid} has not ended within {within} s"
        time.sleep(0.1)


def step_of(path: Path) -> int:
    """The optimiser steps after which a checkpoint was saved."""
    return int(torch.load(path, weights_only=True)["global_step"])
