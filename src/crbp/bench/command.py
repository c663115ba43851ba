"""The command: options, the parts one after the other, what is written and printed."""

from __future__ import annotations

import argparse
import json
import re
import time
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console

from crbp._command import Parser, reserve
from crbp._threads import set_threads
from crbp.bench import convergence, devices, figures, memory, speed, tables
from crbp.bench.measure import Numbers, environment, textbook
from crbp.errors import CrbpError
from crbp.ops import keep_freed_memory


class Part(Protocol):
    """One part of the benchmark: measures, and returns what JSON can hold."""

    def __call__(self, *, quick: bool) -> Numbers:
        """Measure, at tiny sizes where ``quick``."""


class PartAnywhere(Protocol):
    """A part that is measured on any device."""

    def __call__(self, *, quick: bool, device: str) -> Numbers:
        """Measure there, at tiny sizes where ``quick``."""


ANYWHERE: dict[str, PartAnywhere] = {
    "step": speed.step,
    "kernels": speed.kernels,
    "precision": speed.precision,
    "scaling": speed.scaling,
    "convolutions": devices.convolutions,
    "rollout": devices.rollout,
}
ON_CPU: dict[str, Part] = {
    "compiling": speed.compiling,
    "memory": memory.memory,
    "time_to_f1": convergence.time_to_f1,
    "solvers": convergence.solvers,
    "roofline": speed.roofline,
    "images": speed.images,
}
SLOW = ("compiling", "rollout")  # at any size, and therefore not part of --quick unless asked for


def main(arguments: list[str]) -> None:
    """Run the benchmark.

    Raises:
        CrbpError: if the options are wrong, the folder cannot be written to, or crbp is no checkout.
    """
    options = _options(arguments)
    textbook()
    keep_freed_memory()  # for both codes
    folder, console = Path(options.out), Console()
    files = [folder / "bench.json", *([Path(options.json)] if options.json else [])]
    reserve(folder, files)
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    set_threads()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 in both codes
    try:
        numbers: Numbers = {"environment": _environment(options.device), "quick": options.quick, "parts": {}}
        parts: dict[str, Part] = {name: partial(part, device=options.device) for name, part in ANYWHERE.items()}
        parts |= ON_CPU
        for name in _wanted(options):
            start = time.perf_counter()
            with console.status(f"Measuring {name} …"):
                found = parts[name](quick=options.quick)
            numbers["parts"][name] = {**found, "measured_in_seconds": round(time.perf_counter() - start, 1)}
            for file in files:
                _write(file, numbers)
            if name in figures.DRAWN:
                figures.DRAWN[name](found).savefig(folder / f"{name}.png", dpi=140)
            console.print(tables.TABLES[name](found))
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = tf32
    console.print(f"All numbers are in [bold]{files[-1]}[/].", soft_wrap=True)


def parser() -> argparse.ArgumentParser:
    """The command's parser."""
    made = Parser(
        prog="crbp bench", description="Measure crbp beside the textbook C-RBP on this machine.", allow_abbrev=False
    )
    made.add_argument("--out", default="bench", metavar="DIR", help="folder of numbers and figures (default: bench)")
    made.add_argument("--json", metavar="FILE", help="write the numbers to this file as well")
    made.add_argument("--quick", action="store_true", help="tiny sizes: that it works, not how fast")
    names = [*ANYWHERE, *ON_CPU]
    made.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    made.add_argument(
        "--device", default="cpu", help=f"where: cpu, or a GPU, on which there are {', '.join(ANYWHERE)} (default: cpu)"
    )
    made.add_argument("--threads", type=int, metavar="N", help="of the computation (default: the cores at hand)")
    return made


def _options(arguments: list[str]) -> argparse.Namespace:
    options = parser().parse_args(arguments)
    if options.threads is not None and options.threads < 1:
        raise CrbpError(f"--threads must be at least 1, not {options.threads}")
    if options.device == "cpu":
        return options
    if elsewhere := [name for name in options.only or () if name in ON_CPU]:
        raise CrbpError(f"--only {' '.join(elsewhere)} is for the CPU; on a GPU there are {', '.join(ANYWHERE)}")
    if (found := re.fullmatch(r"cuda(?::(\d+))?", options.device)) is None:
        raise CrbpError(f"--device must be cpu, cuda or cuda:N, not {options.device}")
    index, there = int(found[1] or 0), torch.cuda.device_count()
    if index >= there:
        raise CrbpError(f"--device {options.device} cannot be used here: PyTorch finds {there} GPUs; give cpu")
    torch.cuda.set_device(index)  # which times are taken of
    return options


def _environment(device: str) -> Numbers:
    """What the numbers depend on, the device among it."""
    name = torch.cuda.get_device_name() if device != "cpu" else None
    return {**environment(), "device": device, "gpu": name}


def _wanted(options: argparse.Namespace) -> list[str]:
    """Names of the parts to measure."""
    every = [*ANYWHERE, *ON_CPU] if options.device == "cpu" else list(ANYWHERE)
    return options.only or [name for name in every if not (options.quick and name in SLOW)]


def _write(file: Path, numbers: Numbers) -> None:
    """Replace the file in one go, so that a run cut short leaves the last whole one."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    part.replace(file)
