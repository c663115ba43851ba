"""Every command's help ends with examples that its parser takes, and a shell completes what it is asked to."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from crbp._command import EXAMPLES
from crbp.cli import COMMANDS, main
from crbp.errors import CrbpError

ROOT = Path(__file__).parents[1]
MAKERS = {f"crbp {name}": command.parser for name, command in COMMANDS.items()}
MAKERS |= {f"crbp {name} {part}": make for name, each in COMMANDS.items() for part, make in each.parts.items()}


def test_every_command_has_examples() -> None:
    assert set(EXAMPLES) == set(MAKERS)


@pytest.mark.parametrize("prog", MAKERS)
def test_help_ends_with_examples_that_parse(
    prog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.yaml", "checkpoints/best.ckpt"):  # what the example of crbp fit leaves
        file = tmp_path / "runs" / "mini_hgru_crbp" / "version_0" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text((ROOT / "configs" / "pathfinder" / "mini_hgru_crbp.yaml").read_text())
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    parser = MAKERS[prog]()
    with pytest.raises(SystemExit):
        main([*prog.split()[1:], "--help"])
    shown = capsys.readouterr().out
    examples = EXAMPLES[prog]
    assert shown.endswith("".join(f"  {each}\n" for each in examples))
    for example in examples:
        assert example.startswith(f"{prog} ") or example == prog
        command, _, _ = example.partition(" > ")  # what it prints goes to a file
        parser.parse_args(shlex.split(command)[len(prog.split()) :])


def test_an_example_that_is_wrong_would_be_seen() -> None:
    with pytest.raises(CrbpError):
        MAKERS["crbp analyze"]().parse_args(["a", "--presets", "mini"])


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("shtab", reason="the extra completion is not installed")
    file = tmp_path_factory.mktemp("completion") / "crbp.bash"
    done = subprocess.run(
        [sys.executable, "-m", "crbp.cli", "completion", "bash"], capture_output=True, text=True, check=True
    )
    file.write_text(done.stdout)
    return file


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        (["ana"], {"analyze"}),
        (["analyze", "--p"], {"--preset"}),
        (["analyze", "--preset", "sm"], {"small5", "small9", "small14"}),
        (["analyze", "weig"], {"weights.safetensors"}),
        (["fit", "--conf"], {"--config"}),
        (["fit", "--config", "weig"], {"weights.safetensors"}),
        (["fit", "--trainer.max_e"], {"--trainer.max_epochs"}),
        (["generate", "sh"], {"shapes"}),
        (["generate", "shapes", "--o"], {"--out", "--objects"}),
        (["completion", "z"], {"zsh"}),
    ],
    ids=lambda value: " ".join(sorted(value) if isinstance(value, set) else value),
)
def test_bash_completes_commands_options_and_files(
    typed: list[str], wanted: set[str], script: Path, tmp_path: Path
) -> None:
    (tmp_path / "weights.safetensors").touch()
    words = shlex.join(["crbp", *typed])
    ask = f"source {script}; COMP_WORDS=({words}); COMP_CWORD={len(typed)}; _shtab_crbp; "
    ask += "printf '%s\\n' \"${COMPREPLY[@]}\""
    done = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert set(done.stdout.split()) == wanted, done.stderr


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="the extra completion is not installed")
    assert main(["completion", shell]) == 0
    shown = capsys.readouterr().out
    assert "crbp" in shown
    assert "model-summary" in shown


def test_a_command_whose_extra_is_missing_completes_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("shtab", reason="the extra completion is not installed")

    def missing() -> argparse.ArgumentParser:
        raise ImportError("crbp.demo needs scipy")

    for name, command in COMMANDS.items():
        monkeypatch.setitem(COMMANDS, name, command._replace(parser=missing, parts={}))
    assert main(["completion", "bash"]) == 0
    shown = capsys.readouterr().out
    assert "demo" in shown
    assert "--quick" not in shown


def test_without_shtab_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("crbp._completion_command.find_spec", lambda name: None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'crbp[completion]'" in capsys.readouterr().err
