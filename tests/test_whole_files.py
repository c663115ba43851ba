"""Files are whole or not there: through kills while they are written, full disks, and folders that refuse them."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

import crbp
from crbp._command import reserve
from crbp._files import write_whole
from crbp.cli import main
from crbp.tasks import WholeCheckpoints

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks its processes"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]

SIZE = 2_000_000  # numbers of a checkpoint: it takes milliseconds to write


def in_child(work: Callable[..., Any], *arguments: Any) -> Any:
    child = multiprocessing.get_context("fork").Process(target=on_one_thread, args=(work, *arguments))
    child.start()
    return child


def on_one_thread(work: Callable[..., Any], *arguments: Any) -> None:
    torch.set_num_threads(1)  # those that torch had before the fork are not in the child, which would wait for them
    work(*arguments)


def save_on_and_on(path: Path) -> None:
    for step in range(1, 10_000):
        WholeCheckpoints().save_checkpoint({"step": step, "numbers": torch.full((SIZE,), float(step))}, path)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    path, part = tmp_path / "last.ckpt", tmp_path / ".last.ckpt.part"
    while_writing = 0
    for kill in range(8):
        child = in_child(save_on_and_on, path)
        begun, before = time.monotonic(), path.stat().st_mtime_ns if path.exists() else None
        while time.monotonic() < begun + 60 and (not path.exists() or path.stat().st_mtime_ns == before):
            time.sleep(0.001)
        while time.monotonic() < begun + 60 and not part.exists():
            pass
        time.sleep(kill * 5e-4)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        while_writing += part.exists()
        found = torch.load(path, weights_only=True)
        assert torch.equal(found["numbers"], torch.full((SIZE,), float(found["step"])))
    assert while_writing, "no kill fell into a write; the test says nothing"
    WholeCheckpoints().save_checkpoint({"step": 0}, path)
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"], "what a kill left is gone with the next one"


def test_a_checkpoint_is_never_moved_between_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's own is: from the folder of temporary files, by a copy where that is on another file system."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError):
        TorchCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt")
    WholeCheckpoints().save_checkpoint({"step": 1}, tmp_path / "b.ckpt")
    assert torch.load(tmp_path / "b.ckpt", weights_only=True) == {"step": 1}


def with_small_disk(limit: int, work: Callable[[], Any], found: Any) -> None:
    """Carry out some work in a process in which no file may grow beyond a limit."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails, as one to a full disk does
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        work()
        found.put("written")
    except crbp.StorageError as error:
        found.put(str(error))


def test_a_full_disk_leaves_the_last_checkpoint_and_no_half_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"step": 1}, path)
    before, found = path.read_bytes(), multiprocessing.get_context("fork").Queue()

    def save() -> None:
        WholeCheckpoints().save_checkpoint({"step": 2, "numbers": torch.zeros(SIZE)}, path)

    child = in_child(with_small_disk, 100_000, save, found)
    message = found.get(timeout=60)
    child.join()
    assert message.startswith(f"{path} cannot be written (File too large); make room on its disk")
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(crbp.StorageError, match=r"runs/last.ckpt cannot be written \(File exists\)"):
        write_whole(tmp_path / "runs" / "last.ckpt", b"content")
    (tmp_path / "page").mkdir()
    with pytest.raises(crbp.CrbpError, match=r"page cannot be written \(Is a directory\)"):
        reserve(tmp_path, [tmp_path / "page"])
    reserve(tmp_path, [tmp_path / "report.html"])
    assert not (tmp_path / "report.html").exists(), "an empty file could be taken for a report"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own; skipped where none may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", str(place)], check=False)
    if done.returncode:
        pytest.skip("no file system may be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


GENERATE = {
    "contours": ["generate", "--preset", "mini", "--size", "60", "--workers", "1", "--out"],
    "shapes": ["generate", "shapes", "--images", "2,1", "--size", "128", "--jobs", "1", "--out"],
}


@pytest.mark.slow
@pytest.mark.parametrize("what", GENERATE)
def test_generation_goes_on_once_there_is_room(disk: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    free = os.statvfs(disk)
    (disk / "others").write_bytes(bytes((free.f_bavail - 15) * free.f_frsize))
    assert main([*GENERATE[what], str(disk / "set")]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"{disk}/set/" in message
    assert "cannot be written (No space left on device); make room" in message
    assert not list(disk.rglob("*.tmp"))
    assert not list(disk.rglob("*.sha256")), "which would say that a batch is whole"
    (disk / "others").unlink()
    assert main([*GENERATE[what], str(disk / "set")]) == 0
    assert main([*GENERATE[what], str(disk.parent / "elsewhere")]) == 0

    def content(folder: Path) -> dict[Path, bytes]:
        return {each.relative_to(folder): each.read_bytes() for each in folder.rglob("*") if each.is_file()}

    assert content(disk / "set") == content(disk.parent / "elsewhere")


@pytest.mark.slow
def test_a_read_only_folder_is_named(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for command in GENERATE.values():
        assert main([*command, str(disk / "set")]) == 2
        assert "cannot be written (Read-only file system)" in capsys.readouterr().err
