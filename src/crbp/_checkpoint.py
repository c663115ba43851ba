"""The argument CHECKPOINT of the commands that look at a trained network: what it may name, and whom it may trust."""

from __future__ import annotations

import argparse
import json
from collections.abc import Container
from pathlib import Path

from crbp.errors import CrbpError

_WEIGHTS = ("weights/best.safetensors", "weights/last.safetensors", "model.safetensors")
LONGEST = 4096  # letters of a path, on Linux
_WHAT = "a .safetensors file, a .ckpt file in the folder of its run, that folder, or the name of a shipped network"


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the argument of a command that takes one network, and the packages to trust."""
    parser.add_argument("checkpoint", type=Path, help=_WHAT)
    add_trust(parser)


def add_checkpoints(parser: argparse.ArgumentParser) -> None:
    """Add the argument of a command that takes several networks, and the packages to trust."""
    several = f"{_WHAT}, or an analysis.json; NAME=… says what to call it"
    parser.add_argument("checkpoint", type=Path, nargs="+", help=several)
    add_trust(parser)


def trusted(options: argparse.Namespace) -> tuple[str, ...]:
    """The packages whose classes a checkpoint may name."""
    return ("crbp", *options.trust)


def named_file(given: Path) -> tuple[str, Path]:
    """The name that ``NAME=…`` gives, empty where there is none, and the file of weights that is meant."""
    name, _, rest = str(given).partition("=") if not given.exists() else ("", "", "")
    return (name, checkpoint_file(Path(rest))) if rest else ("", checkpoint_file(given))


def not_taken(wanted: str, taken: Container[str]) -> str:
    """The name itself, or with the first number that tells it apart."""
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted} ({count})"
    return name


def checkpoint_file(named: Path) -> Path:
    """The file of weights that is meant, which does not have to be there.

    Args:
        named: the file; a folder that ``crbp fit`` or `crbp.hub.save_pretrained` wrote; the ``analysis.json`` that
            ``crbp analyze`` wrote, or its folder; or one of `crbp.hub.shipped`.

    Raises:
        CrbpError: if a folder has no weights, or an ``analysis.json`` does not say of which it is.
    """
    if len(str(named)) > LONGEST:
        raise CrbpError(f"{str(named)[:80]}… is no name of a checkpoint: it has {len(str(named))} letters")
    if named.is_dir():
        found = next((named / each for each in _WEIGHTS if (named / each).is_file()), None)
        if found is None and (named / "analysis.json").is_file():
            return checkpoint_file(named / "analysis.json")
        if found is None:
            raise CrbpError(f"{named} has no {', '.join(_WEIGHTS)}; name a file of weights, or the folder of a run")
        return found
    if named.suffix == ".json":
        return _analysed(named)
    if not named.exists() and named.name == str(named):
        from crbp.hub import shipped

        return shipped().get(str(named), named)
    return named


def _analysed(file: Path) -> Path:
    try:
        weights = Path(json.loads(file.read_text(encoding="utf-8"))["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CrbpError(
            f"{file} does not say which weights it is of ({type(error).__name__}: {error}); name these themselves"
        ) from error
    if not weights.is_file():
        raise CrbpError(f"{file} is of {weights}, which is not there from here; name the weights themselves")
    return weights


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add the packages to trust."""
    parser.add_argument("--trust", nargs="+", default=(), metavar="PACKAGE", help="of the classes a file may name")
