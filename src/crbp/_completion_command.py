"""`crbp completion`: a script by which a shell completes commands, options and files."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Protocol

from crbp._command import Parser
from crbp.errors import CrbpError

Make = Callable[[], argparse.ArgumentParser]
SHELLS = ("bash", "zsh", "tcsh")
_FILES = ("--config", "--ckpt_path")  # Lightning's, which do not say that they are files
_ABOUT = """Print a script by which a shell completes commands, options and files. It is made once and kept in a file:

  bash  crbp completion bash > ~/.local/share/bash-completion/completions/crbp
        (make the folder first, by mkdir -p; the package bash-completion reads it)
  zsh   crbp completion zsh > ~/.zfunc/_crbp
        (make the folder first, by mkdir -p; in ~/.zshrc: fpath+=~/.zfunc; autoload -Uz compinit; compinit)
  tcsh  crbp completion tcsh > ~/.crbp.tcsh
        (in ~/.tcshrc: source ~/.crbp.tcsh)

Make it again after crbp was updated. Commands whose extra is not installed complete by name alone."""


class Command(Protocol):
    """What is completed of a command."""

    @property
    def summary(self) -> str:
        """What it does."""

    @property
    def parser(self) -> Make:
        """Makes its parser."""

    @property
    def parts(self) -> Mapping[str, Make]:
        """Make the parsers of the commands within it, by name."""


def main(arguments: list[str], commands: Mapping[str, Command]) -> None:
    """Print the script.

    Raises:
        CrbpError: if the shell is none of `SHELLS`, or shtab is not installed.
    """
    shell = parser().parse_args(arguments).shell
    if find_spec("shtab") is None:
        raise CrbpError("this command needs shtab, not installed here; run: pip install 'crbp[completion]'")
    import shtab

    print(shtab.complete(_whole(commands), shell))


def parser() -> argparse.ArgumentParser:
    """The command's parser."""
    made = Parser(
        prog="crbp completion",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("shell", choices=SHELLS, help="that the script is for")
    return made


def _whole(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """One parser of all commands."""
    whole = argparse.ArgumentParser(prog="crbp")
    whole.add_argument("--version", action="store_true", help="print the version")
    names = whole.add_subparsers()
    for name, command in commands.items():
        made = _made(command.parser)
        within = names.add_parser(name, help=command.summary, parents=[made], add_help=False)
        if command.parts:
            parts = within.add_subparsers()
            for part, make in command.parts.items():
                made = _made(make)
                parts.add_parser(part, help=made.description or part, parents=[made], add_help=False)
    return whole


def _made(make: Make) -> argparse.ArgumentParser:
    """A command's parser, its arguments that are files marked as such; an empty one where its extra is missing."""
    import shtab

    try:
        made = make()
    except ImportError:
        return argparse.ArgumentParser()
    for action in made._actions:  # argparse has no other way to them
        if action.metavar == "DIR":
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]  # where shtab looks for it
        elif action.metavar == "FILE" or action.dest == "checkpoint" or {*action.option_strings} & {*_FILES}:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return made
