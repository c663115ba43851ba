"""The files that launch training on clusters, and what becomes of a run of several processes that is cut off."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launched import (
    BOUND,
    CONFIG,
    ROOT,
    TINY,
    environment,
    free_port,
    members,
    started,
    step_of,
    wait_for,
    wait_until_gone,
    with_variable,
)

LAUNCH = ROOT / "configs" / "launch"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks its processes up in /proc")

# Stands in for the cluster: starts the tasks of a job on this machine, hands its signals on to them, and returns the
# highest status, as srun does.
SRUN = """#!{python} -S
import os, signal, subprocess, sys
arguments = sys.argv[1:]
tasks = int(os.environ["SLURM_NTASKS"])
while arguments[0].startswith("--"):
    option, _, value = arguments.pop(0).partition("=")
    tasks = int(value) if option == "--ntasks" else tasks
ranks = [dict(SLURM_PROCID=str(n), SLURM_LOCALID=str(n), SLURM_NODEID="0") for n in range(tasks)]
running = [subprocess.Popen(arguments, env=os.environ | rank) for rank in ranks]
signal.signal(signal.SIGUSR1, lambda number, _: [each.send_signal(number) for each in running])
codes = [each.wait() for each in running]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""


def slurm(folder: Path, tasks: int) -> dict[str, str]:
    """The environment of a job, with the commands of a cluster in a folder of their own."""
    commands = folder / "bin"
    commands.mkdir()
    (commands / "srun").write_text(SRUN.format(python=sys.executable))
    (commands / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {folder}/scontrol\n')
    for command in commands.iterdir():
        command.chmod(0o755)
    job = {"JOB_ID": "4711", "JOB_NAME": "crbp", "NTASKS": str(tasks), "NTASKS_PER_NODE": str(tasks), "NNODES": "1"}
    made = environment(**{f"SLURM_{name}": value for name, value in job.items()}, SLURM_NODELIST="127.0.0.1")
    made["MASTER_PORT"] = free_port()  # else one made of the job's number, which all tests share
    return {**made, "PATH": f"{commands}:{made['PATH']}"}


@pytest.mark.parametrize("file", ["slurm.sh", "torchrun.sh"])
def test_launch_files_are_bash_and_ask_for_a_configuration(file: str) -> None:
    subprocess.run(["bash", "-n", LAUNCH / file], check=True)
    asked = subprocess.run(["bash", LAUNCH / file], capture_output=True, text=True, check=False)
    assert asked.returncode != 0
    assert "which configuration?" in asked.stderr


def test_options_of_the_job_come_before_its_first_command() -> None:
    """sbatch reads no further."""
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH ")]
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    assert len(options) >= 5
    assert max(options) < min(commands)
    assert any(re.search(r"--signal=USR1@\d+", lines[number]) for number in options)


@pytest.mark.slow
def test_a_slurm_job_signalled_before_its_end_saves_requeues_and_goes_on(tmp_path: Path) -> None:
    job = slurm(tmp_path, tasks=2)
    command = ["bash", str(LAUNCH / "slurm.sh"), str(CONFIG), *TINY]
    last = tmp_path / "runs" / CONFIG.stem / "job_4711" / "checkpoints" / "last.ckpt"
    with started(command, tmp_path, job) as run:
        wait_for(last, run)
        os.kill(with_variable(run.pid, "SLURM_PROCID", "1"), signal.SIGUSR1)  # one is enough
        assert run.wait(BOUND) == 128 + signal.SIGUSR1
    assert (tmp_path / "scontrol").read_text() == "requeue 4711\n"
    reached = step_of(last)
    assert f"stopped on SIGUSR1 after {reached} steps" in (tmp_path / "log").read_text()
    with started([*command, "--trainer.max_steps", str(reached + 2)], tmp_path, job) as run:
        assert run.wait(BOUND) == 0
    assert step_of(last) == reached + 2
    assert (tmp_path / "scontrol").read_text() == "requeue 4711\n"
    assert "was not set" not in (tmp_path / "log").read_text()  # what Lightning says of a checkpoint at every saving


@pytest.mark.slow
def test_data_is_copied_to_the_node_and_read_there(tmp_path: Path) -> None:
    job = slurm(tmp_path, tasks=1) | {"DATA": str(tmp_path / "coco"), "TMPDIR": str(tmp_path)}
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "an image").touch()
    # `crbp` says what it was asked to do.
    (tmp_path / "bin" / "crbp").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "bin" / "crbp").chmod(0o755)
    command = ["bash", str(LAUNCH / "slurm.sh"), str(CONFIG)]
    asked = subprocess.run(command, cwd=tmp_path, env=job, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    assert asked[asked.index("--data.source.root") + 1] == str(tmp_path / "crbp-4711")
    assert (tmp_path / "crbp-4711" / "an image").exists()


@pytest.mark.slow
def test_torchrun_ends_a_run_that_lost_a_process_and_goes_on_when_called_again(tmp_path: Path) -> None:
    command = ["bash", str(LAUNCH / "torchrun.sh"), str(CONFIG), *TINY]
    last = tmp_path / "runs" / CONFIG.stem / "torchrun" / "checkpoints" / "last.ckpt"
    settings = environment(PROCESSES="2", PORT=free_port())
    with started(command, tmp_path, settings) as run:
        wait_for(last, run)
        os.kill(with_variable(run.pid, "RANK", "1"), signal.SIGKILL)
        begun = time.monotonic()
        assert run.wait(BOUND) != 0
        assert time.monotonic() - begun < 30
    assert "Signal 9 (SIGKILL) received by PID" in (tmp_path / "log").read_text()
    reached = step_of(last)
    with started([*command, "--trainer.max_steps", str(reached + 2)], tmp_path, settings) as run:
        assert run.wait(BOUND) == 0
    assert step_of(last) == reached + 2


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_run_that_lost_a_process_says_so_and_how_to_go_on(killed: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "crbp.cli", "fit", "--config", str(CONFIG), *TINY, "--trainer.devices", "2"]
    last = tmp_path / "runs" / CONFIG.stem / "version_0" / "checkpoints" / "last.ckpt"
    with started(command, tmp_path, environment()) as run:
        wait_for(last, run)
        other = with_variable(run.pid, "LOCAL_RANK", "1")
        os.kill(run.pid if killed == 0 else other, signal.SIGKILL)
        wait_until_gone(other, within=30)
        assert run.wait(30) == (-signal.SIGKILL if killed == 0 else 1)
    told = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("crbp: error: ")]
    assert len(told) == 1
    assert f"process {1 - killed} ends, since another of the 2 has ended" in told[0]
    assert "Traceback" not in (tmp_path / "log").read_text()
    (path,) = re.findall(r"resume with --ckpt_path (\S+)", told[0])
    assert (tmp_path / path).samefile(last)


@pytest.mark.slow
def test_a_run_whose_port_is_taken_says_which(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "crbp.cli", "fit", "--config", str(CONFIG), *TINY, "--trainer.devices", "2"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with started(command, tmp_path, environment(MASTER_PORT=port)) as run:
            assert run.wait(BOUND) == 1
            wait_until_gone(run.pid, within=30)
            assert not members(run.pid)
    told = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("crbp: error: ")]
    assert len(told) == 1
    assert f"port {port}" in told[0]
    assert "MASTER_PORT" in told[0]


@pytest.mark.slow
def test_sigterm_to_the_main_process_saves_and_ends_all(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "crbp.cli", "fit", "--config", str(CONFIG), *TINY, "--trainer.devices", "2"]
    last = tmp_path / "runs" / CONFIG.stem / "version_0" / "checkpoints" / "last.ckpt"
    with started(command, tmp_path, environment()) as run:
        wait_for(last, run)
        other = with_variable(run.pid, "LOCAL_RANK", "1")
        run.terminate()
        assert run.wait(30) == 128 + signal.SIGTERM
        wait_until_gone(other, within=30)
    told = (tmp_path / "log").read_text()
    assert f"stopped on SIGTERM after {step_of(last)} steps" in told
    assert "Traceback" not in told
