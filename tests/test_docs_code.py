"""The documentation does what it says: its Python runs, its `crbp` command lines parse, its YAML is a configuration.

A page is told in comments that no reader sees what its blocks need, each right above its block:

- `<!-- test: prelude … -->` is Python to run first, for what a page speaks of without making it.
- `<!-- test: slow -->` leaves the block to the slow tests; a `sh` block is then really run.
- `<!-- test: skip REASON -->` is for what cannot run here. `SKIPPED` has to know of it. Its commands still parse.
- `<!-- test: over CONFIG -->` says which configuration a piece of YAML is laid over.

A block with a `title` is the file of that name. A `text` block right after a Python block is what that one prints.
"""

from __future__ import annotations

import ast
import doctest
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser, set_parsing_settings
from torch import nn

from crbp import _command, cli
from crbp.tasks import command_line
from hub_server import reached

ROOT = Path(__file__).parents[1]
OTHERS = ("README.md", "CONTRIBUTING.md", "examples/README.md")
PAGES = [
    *(ROOT / name for name in OTHERS),
    *sorted((ROOT / "results").glob("*/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
BLOCK = re.compile(r"^```(?P<kind>\w+)(?P<info>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- test: (?P<word>\w+)(?P<rest>(?:(?!-->).)*)-->\s*\Z", re.DOTALL)
TITLE = re.compile(r'title="([^"]+)"')
SKIPPED: set[tuple[str, int]] = set()  # pages and the places of the blocks in them, from 0, that cannot run here

# What stands in a line beside crbp; `python` is looked at further.
OTHER_COMMANDS = {"pip", "uv", "pytest", "cd", "export", "python", "tensorboard", "sbatch", "sha256sum", "torchrun"}
OTHER_COMMANDS |= {"mkdocs", ".ci/run", "source", "mkdir"}
LAUNCHERS = ("configs/launch/slurm.sh", "configs/launch/torchrun.sh")
PLACEHOLDER = {"--config": "configs/panoptic/mini_rfpn_crbp10.yaml"}  # of `--config …`

README_PRELUDE = """
    import shutil, torch
    from torch.nn.functional import cross_entropy as criterion
    drive, target = torch.rand(1, 25, 20, 20), torch.zeros(1, 20, 20, dtype=torch.long)
    readout = torch.nn.Conv2d(25, 2, 1)
    image, mask = torch.rand(3, 64, 64) * 255, torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, 16:48, 16:48] = True
    semantic, box = torch.zeros(64, 64, dtype=torch.long), torch.tensor([[16.0, 16.0, 48.0, 48.0]])
    images = [image]
    targets = [{"boxes": box, "labels": torch.tensor([0]), "masks": mask, "semantic": semantic}]
    shutil.copy("results/pathfinder/weights/small9_hgru_crbp.safetensors", "best.safetensors")
"""
README_SLOW = ("crbp.hub.from_pretrained", "crbp.models.RFPN")  # in README blocks, where comments would be seen


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block of a page."""

    page: str
    place: int
    line: int
    kind: str
    title: str | None
    code: str
    word: str
    rest: str
    follows: bool  # right after a Python block

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def slow(self) -> bool:
        return self.word == "slow" or (
            self.page == "README.md" and self.kind == "python" and any(name in self.code for name in README_SLOW)
        )


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix().removeprefix("docs/")


def blocks(page: Path) -> list[Block]:
    text, found, end, before = page.read_text(encoding="utf-8"), [], 0, ""
    for place, match in enumerate(BLOCK.finditer(text)):
        between = text[end : match.start()]
        mark, title = MARK.search(between), TITLE.search(match["info"])
        found.append(
            Block(
                page=named(page),
                place=place,
                line=text.count("\n", 0, match.start()) + 1,
                kind=match["kind"],
                title=title[1] if title else None,
                code=match["code"],
                word=mark["word"] if mark else "",
                rest=mark["rest"] if mark else "",
                follows=before == "python" and not between.strip(),
            )
        )
        end, before = match.end(), match["kind"]
    return found


BLOCKS = {named(page): blocks(page) for page in PAGES}
WITH_PYTHON = [name for name, found in BLOCKS.items() if any(each.kind == "python" for each in found)]


def every(kind: str) -> list[Any]:
    return [pytest.param(each, id=each.name) for found in BLOCKS.values() for each in found if each.kind == kind]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder that has the files of the project beside it, as a checkout has."""
    for name in ("configs", "examples", "benchmarks", "results"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hub on this machine in the place of the one that README publishes to."""
    with reached(monkeypatch, tmp_path / "cache"):
        yield


# --- which blocks there are -------------------------------------------------------------------------------------------


def test_blocks_are_of_a_kind_that_is_tested() -> None:
    kinds = {each.kind for found in BLOCKS.values() for each in found}
    assert kinds <= {"python", "sh", "yaml", "text"}


def test_nothing_is_skipped_but_what_is_known_to_be() -> None:
    skipped = [each for found in BLOCKS.values() for each in found if each.word == "skip"]
    assert {(each.page, each.place) for each in skipped} == SKIPPED
    assert all(len(each.rest.split()) > 3 for each in skipped), "say why"


def test_marks_are_known_words() -> None:
    assert {each.word for found in BLOCKS.values() for each in found} <= {"", "prelude", "slow", "skip", "over"}


def test_fences_are_closed() -> None:
    for page in PAGES:
        fences = re.findall(r"^```", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(BLOCKS[named(page)]), page


# --- Python -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_runs(page: str, folder: Path) -> None:
    assert run_page(page, slow=False) == len([each for each in wanted(page) if not each.slow])


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name in WITH_PYTHON if any(each.slow for each in BLOCKS[name])])
@pytest.mark.filterwarnings("default")  # of the libraries that export
def test_python_that_takes_longer_runs(page: str, folder: Path, hub: None) -> None:
    assert run_page(page, slow=True) == len(wanted(page))


def wanted(page: str) -> list[Block]:
    """The Python blocks of a page that are to be run."""
    return [each for each in BLOCKS[page] if each.kind == "python" and not each.title and each.word != "skip"]


def run_page(page: str, *, slow: bool) -> int:
    """Run the Python blocks of a page in order, in one namespace, and compare what they print; how many were run."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    if page == "README.md":
        exec(textwrap.dedent(README_PRELUDE), namespace)
    printed, ran = "", 0
    for block in BLOCKS[page]:
        if block.title:
            Path(block.title).write_text(block.code, encoding="utf-8")
        elif block.kind == "python" and block.word != "skip" and (slow or not block.slow):
            if block.word == "prelude":
                exec(compile(textwrap.dedent(block.rest), f"{block.name} prelude", "exec"), namespace)
            with redirect_stdout(io.StringIO()) as out:
                exec(compile("\n" * block.line + block.code, str(ROOT / page), "exec"), namespace)
            printed, ran = out.getvalue(), ran + 1
        elif block.kind == "text" and block.follows:
            compare(block, printed)
    return ran


def compare(block: Block, printed: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    same = doctest.OutputChecker().check_output(block.code, printed, flags)
    assert same, f"{block.name} says\n{block.code}\nand the block above printed\n{printed}"


def test_messages_in_tables_are_those_of_the_code() -> None:
    """Every code in the first column of a table headed `message`, piece by piece between the `…`."""
    told: list[str] = []
    for page in PAGES:
        for table in re.findall(r"^\| message \|.*\n(?:\|.*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE):
            told += re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    sources = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "src" / "crbp").rglob("*.py")]
    nodes = [node for tree in sources for node in ast.walk(tree)]
    strings = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    unknown = [
        (message, piece) for message in told for piece in message.split("…") if not any(piece in s for s in strings)
    ]
    assert told
    assert not unknown


# --- command lines ----------------------------------------------------------------------------------------------------


class ParsedError(Exception):
    """A command line was understood; what it asks for is not done."""


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """A function that takes the arguments of `crbp` as far as they are parsed, by the real parsers, and no farther."""
    parse = _command.Parser.parse_args

    def stop(self: _command.Parser, *args: Any) -> None:
        parse(self, *args)
        raise ParsedError

    def stop_before_building(self: Any) -> None:
        raise ParsedError

    monkeypatch.setattr(_command.Parser, "parse_args", stop)
    monkeypatch.setattr(command_line._CommandLine, "_parse_ckpt_path", lambda self: None)  # there is no such file
    monkeypatch.setattr(command_line._CommandLine, "before_instantiate_classes", stop_before_building)

    known = command_line._CommandLine.subcommands()

    def check(arguments: list[str]) -> None:
        # The parser of one command takes a quarter of the time that those of all four take to build.
        asked = {name: skip for name, skip in known.items() if name == arguments[0]}
        monkeypatch.setattr(command_line._CommandLine, "subcommands", staticmethod(lambda: asked))
        with pytest.raises((ParsedError, SystemExit)) as ended:  # `--print_config` ends the program, well
            cli._dispatch(arguments)
        assert isinstance(ended.value, ParsedError) or not ended.value.code

    return check


@pytest.mark.parametrize("block", every("sh"))
def test_command_lines_are_understood(block: Block, folder: Path, parses: Callable[[list[str]], None]) -> None:
    files(block)
    for words in commands(block.code):
        if words[0] == "crbp":
            parses(filled(words[1:]))
        elif launched := [i for i, word in enumerate(words) if word in LAUNCHERS]:
            parses(filled(["fit", "--config", *words[launched[0] + 1 :]]))
        else:
            assert words[0] in OTHER_COMMANDS, f"{block.name}: {words[0]} is not known here"
            script = words[1] if words[0] == "python" else "configs"
            assert Path(script).exists(), f"{block.name}: there is no {script}"
            if words[0] == "python":
                known = Path(script).read_text(encoding="utf-8")
                unknown = [word for word in words[2:] if word.startswith("--") and word not in known]
                assert not unknown, f"{block.name}: {script} takes no {', '.join(unknown)}"


@pytest.mark.slow
@pytest.mark.parametrize("block", [each for each in every("sh") if each.values[0].word == "slow"])
def test_command_lines_run(block: Block, folder: Path) -> None:
    files(block)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", block.code], env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def files(block: Block) -> None:
    """Write the files that the page has shown before this block."""
    for each in BLOCKS[block.page]:
        if each.title and each.place < block.place:
            Path(each.title).write_text(each.code, encoding="utf-8")


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command line: variables put in, and without what only starts crbp."""
    variables: dict[str, str] = {}
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        words = [re.sub(r"\$(\w+)", lambda found: variables.get(found[1], found[0]), word) for word in words]
        while words and (assigned := re.fullmatch(r"(\w+)=(\S*)", words[0])):
            variables[assigned[1]] = assigned[2]
            words = words[1:]
        if words[:2] == ["uv", "run"]:
            words = words[2:]
        words = list(takewhile(lambda word: word not in ("|", ">", "&&"), words))
        if words:
            yield words


def filled(arguments: list[str]) -> list[str]:
    """The arguments with something in the place of `…`, and with the configuration that a run would have written."""
    pairs = pairwise(["", *arguments])
    words = [PLACEHOLDER.get(before, word) if word == "…" else word for before, word in pairs]
    for flag, word in pairwise(words):
        if flag == "--config" and (name := re.fullmatch(r"runs/(\w+)/\w+/config\.yaml", word)):
            (source,) = ROOT.glob(f"configs/*/{name[1]}.yaml")
            Path(word).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, word)
    return words


# --- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", every("yaml"))
def test_yaml_is_a_configuration(block: Block, folder: Path, parses: Callable[[list[str]], None]) -> None:
    if block.title:
        later = [each.code for each in BLOCKS[block.page] if each.kind == "sh" and each.place > block.place]
        assert any(block.title in code for code in later), "a command line has to name the file, which parses it"
    elif block.word == "over":
        files(block)
        Path("piece.yaml").write_text(block.code, encoding="utf-8")
        parses(["fit", "--config", block.rest.strip(), "--config", "piece.yaml"])
    else:
        set_parsing_settings(import_path_allowlist=["crbp"])  # `crbp.cli` denies others, for the whole process
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(nn.Module, "module")
        text = "module:\n" + textwrap.indent(block.code, "  ")
        assert isinstance(parser.instantiate(parser.parse_string(text)).module, nn.Module)
