"""Every command where the disk is full or refuses: one line that names the file, and nothing half written."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from crbp.tasks import load_net

MINI = str(Path(__file__).parents[1] / "configs" / "pathfinder" / "mini_hgru_crbp.yaml")
TINY = [
    *("--config", MINI, "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--model.net.cell.channels", "2", "--model.net.cell.kernel_size", "3", "--model.net.evolve.steps", "3"),
    *("--model.step_jitter", "1", "--data.batch_size", "4", "--data.train_size", "8", "--data.val_size", "4"),
    *("--data.test_size", "3", "--data.lead_in_size", "4"),
]
RUN = Path("runs", "mini_hgru_crbp", "version_0")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="limits its processes"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]


def told(folder: Path, *arguments: str, limit: int = resource.RLIM_INFINITY) -> tuple[int, str]:
    """Exit status and last line of a command in a process in which no file may grow beyond a limit."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails, as one to a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    done = subprocess.run(
        [sys.executable, "-m", "crbp.cli", *arguments], cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=limited,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    return done.returncode, lines[-1] if lines else ""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    status, message = told(folder, "fit", *TINY)
    assert status == 0, message
    return folder


def unfinished(folder: Path) -> list[Path]:
    return [*folder.rglob("*.part"), *folder.rglob("*.tmp")]


@pytest.mark.slow
def test_a_full_disk_ends_training_and_leaves_the_last_checkpoint(trained: Path) -> None:
    last = trained / RUN / "checkpoints" / "last.ckpt"
    before, weights = last.read_bytes(), (trained / RUN / "weights" / "last.safetensors").read_bytes()
    again = ["fit", *TINY, "--trainer.max_epochs", "2", "--ckpt_path", str(last)]
    status, message = told(trained, *again, limit=len(before) - 1)
    assert status == 2
    assert message.startswith("crbp: error: ")
    assert ".ckpt cannot be written (File too large); make room on its disk or choose another folder" in message
    assert last.read_bytes() == before
    assert not unfinished(trained)
    assert len((trained / RUN / "weights" / "last.safetensors").read_bytes()) == len(weights)
    assert load_net(trained / RUN / "weights" / "last.safetensors")
    assert told(trained, *again)[0] == 0
    assert torch.load(last, weights_only=True)["global_step"] == 4


@pytest.mark.slow
def test_an_output_under_a_file_is_named_by_every_command(trained: Path) -> None:
    (trained / "taken").write_text("a file")
    best, weights = RUN / "checkpoints" / "best.ckpt", RUN / "weights" / "best.safetensors"
    commands: dict[str, list[Any]] = {
        "fit": ["fit", *TINY, "--trainer.logger.init_args.save_dir", "taken/here", "--trainer.default_root_dir", "x"],
        "predict": ["predict", *TINY, "--trainer.logger", "false", "--ckpt_path", best, "--out", "taken/here"],
        "analyze": ["analyze", weights, "--images", "2", "--out", "taken/here"],
        "generate": ["generate", "--preset", "mini", "--size", "4", "--workers", "1", "--out", "taken/here"],
        "shapes": ["generate", "shapes", "--images", "1,1", "--jobs", "1", "--out", "taken/here"],
    }
    for name, command in commands.items():
        status, message = told(trained, *map(str, command))
        assert (status, "taken/here" in message) == (2, True), (name, message)
        assert "cannot be written (Not a directory)" in message, name


@pytest.mark.slow
def test_a_full_disk_ends_predicting_and_analysing(trained: Path) -> None:
    best, weights = RUN / "checkpoints" / "best.ckpt", RUN / "weights" / "best.safetensors"
    predict = ["predict", *TINY, "--trainer.logger", "false", "--ckpt_path", str(best), "--out", "seen"]
    analyze = ["analyze", str(weights), "--images", "2", "--steps", "5", "--out", "page"]
    for command, folder, limit in ((predict, "seen", 50), (analyze, "page", 4000)):
        status, message = told(trained, *command, limit=limit)
        assert status == 2
        assert f"{folder}/" in message
        assert "cannot be written (File too large)" in message
        assert not unfinished(trained)
        assert all(path.stat().st_size for path in (trained / folder).rglob("*"))
