"""What the commands share: their parser, its examples, and that their results will have a place."""

from __future__ import annotations

import argparse
import errno
import os
from pathlib import Path
from typing import NoReturn

from crbp.errors import CrbpError

_CONFIG = "configs/pathfinder/mini_hgru_crbp.yaml"
_RUN = "runs/mini_hgru_crbp/version_0"
_OF_RUN = f"--config {_RUN}/config.yaml --ckpt_path {_RUN}/checkpoints/best.ckpt"
# What each command's help ends with, the first also in the list of commands. They build on each other: what the one of
# `crbp fit` trains, the others take.
EXAMPLES = {
    "crbp fit": (f"crbp fit --config {_CONFIG}", f"crbp fit --config {_CONFIG} --seed_everything 1"),
    "crbp validate": (f"crbp validate {_OF_RUN}",),
    "crbp test": (f"crbp test {_OF_RUN}",),
    "crbp predict": (f"crbp predict {_OF_RUN} --out predictions",),
    "crbp generate": (
        "crbp generate --preset pf14 --size 10000 --split test --out data/pf14",
        "crbp generate --preset mini --size 100 --contour-length 3 --out data/short",
    ),
    "crbp generate shapes": ("crbp generate shapes --images 100,20 --size 128 --out data/shapes",),
    "crbp data": ("crbp data check --images val2017 --panoptic annotations/panoptic_val2017.json",),
    "crbp demo": ("crbp demo --quick", "crbp demo --seed 1 --out demo1"),
    "crbp analyze": ("crbp analyze small9_hgru_crbp", f"crbp analyze {_RUN} --images 32 --out analysis"),
    "crbp compare": (
        "crbp compare small9_hgru_crbp small9_hgru_bptt",
        f"crbp compare mine={_RUN} shipped=small9_hgru_crbp --preset mini",
    ),
    "crbp app": ("crbp app --open", f"crbp app --checkpoint {_RUN} --port 8000"),
    "crbp model-summary": ("crbp model-summary rfpn --depth 50", "crbp model-summary fpn --things 20 --stuff 5"),
    "crbp bench": (
        "crbp bench --quick",
        "crbp bench --only step memory --threads 1 --out bench",
        "crbp bench --device cuda --only step convolutions rollout",
    ),
    "crbp export": (
        "crbp export small9_hgru_crbp --format onnx --steps 20 --out net.onnx",
        f"crbp export {_RUN}/weights/best.safetensors",
    ),
    "crbp doctor": ("crbp doctor", "crbp doctor --json"),
    "crbp completion": (
        "crbp completion bash > ~/.local/share/bash-completion/completions/crbp",
        "crbp completion zsh > ~/.zfunc/_crbp",
    ),
}


class Parser(argparse.ArgumentParser):
    """Reports a mistake as a `CrbpError`, which the command line tells in one line, and ends its help with examples."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print and exit with."""
        raise CrbpError(f"{message} (see {self.prog} --help)")

    def format_help(self) -> str:
        """What argparse makes of it, and the examples as they are typed."""
        return super().format_help() + told_examples(self.prog)


def told_examples(prog: str) -> str:
    """The end of a command's help."""
    found = EXAMPLES.get(prog, ())
    if not found:
        return ""
    where = " (in the folder of the project, where configs/ is)" if any("configs/" in each for each in found) else ""
    return "".join([f"\nexample{'s' if len(found) > 1 else ''}{where}:\n", *(f"  {each}\n" for each in found)])


def reserve(folder: Path, files: list[Path]) -> None:
    """Make the folders now, and see that files can be: minutes of work must not be lost to a path that cannot be.

    Raises:
        CrbpError: naming what cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
            probe = file.with_name(f".{file.name}.part")  # an empty file of the name itself could be taken for a result
            probe.touch()
            probe.unlink()
    except OSError as error:
        raise CrbpError(
            f"{error.filename} cannot be written ({error.strerror}); choose another --out or --json"
        ) from None
