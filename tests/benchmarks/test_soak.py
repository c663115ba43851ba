"""The soak of kills, in short: what is killed and started again ends as if it had not been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks its processes")
def test_what_is_killed_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    command = [sys.executable, str(SOAK), "--folder", str(tmp_path), "--jobs", "fit", "generate shapes"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for kills in (1, 3):  # the second call goes on from the first
        done = subprocess.run([*command, "--kills", str(kills)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "soak.json").read_text())
    assert [each["job"] for each in found["kills"]].count("fit") == 3
    assert {each["job"] for each in found["runs"]} == {"fit", "generate shapes"}
    assert not any(each["differences"] for each in found["runs"])
    assert not any(each["broken_files"] for each in found["kills"])


def test_the_soak_tells_whole_files_from_broken_ones(tmp_path: Path, load_script) -> None:
    checks = load_script("benchmarks/soak_checks.py")
    torch.save({"numbers": torch.zeros(1000)}, tmp_path / "last.ckpt")
    (tmp_path / "found.json").write_text('{"f1": 0.9}')
    assert checks.broken_files(tmp_path) == []
    whole = checks.folder_result(tmp_path)
    for name in ("last.ckpt", "found.json"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        assert [each.split(":")[0] for each in checks.broken_files(tmp_path)] == [name]
        assert checks.differences(checks.folder_result(tmp_path), whole) == [name]
        (tmp_path / name).write_bytes(content)
    (tmp_path / "empty.html").touch()
    (tmp_path / ".last.ckpt.part").write_bytes(b"half")
    assert len(checks.broken_files(tmp_path)) == 1
