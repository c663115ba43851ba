"""`crbp export`: a checkpoint as a file that runs without crbp, compared with the network before it is called done."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crbp._checkpoint import add_checkpoint, checkpoint_file, trusted
from crbp._command import Parser, reserve
from crbp.errors import CrbpError
from crbp.export import FORMATS, FixedSteps
from crbp.tasks import load_net

# Largest difference from the network, relative to its largest logit. torch.export runs the same operations, and nothing
# differed in any network tried. onnxruntime rounds otherwise: in networks of `results`, after the steps trained for, by
# up to 9e-6 where they come to rest, 4e-5 in ConvLSTMs and 7e-5 in an HGRU that do not.
LARGEST = {"pt2": 1e-5, "onnx": 1e-4}


def main(arguments: list[str]) -> None:
    """Run the command.

    Raises:
        CrbpError: if the options are wrong, the checkpoint cannot be had, or the file does not do as the network does.
    """
    options = parser().parse_args(arguments)
    needed = ("onnx", "onnxscript", "onnxruntime") if options.format == "onnx" else ()
    if missing := [name for name in needed if find_spec(name) is None]:
        raise CrbpError(f"--format onnx needs {', '.join(missing)}, not installed here; run: pip install 'crbp[onnx]'")
    checkpoint = checkpoint_file(options.checkpoint)
    net = load_net(checkpoint, trust=trusted(options))
    out = options.out or Path(f"{checkpoint.stem}.{options.format}")
    if out.absolute() == checkpoint.absolute():
        raise CrbpError(f"--out {out} is the checkpoint itself; name another file")
    reserve(out.parent, [out])
    try:
        fixed = FixedSteps(net, options.steps)
        FORMATS[options.format](net, trial := out.with_name(f".trial-{out.name}"), steps=options.steps)
    except (TypeError, ValueError) as error:
        raise CrbpError(str(error)) from error
    image = torch.rand(1, 1, 48, 36, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():  # RBP makes of any state one that has a gradient
            expected = fixed(image)
            wrong = (_run(trial, options.format, image) - expected).abs().max()
        difference = float(wrong / expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny))
        if not difference <= LARGEST[options.format]:
            raise CrbpError(
                f"{out} is not written: it would differ by {difference:.1e} of the network's largest logit, where at "
                f"most {LARGEST[options.format]:.0e} is taken for rounding; choose fewer --steps, since rounding grows "
                "where a network does not come to rest"
            )
        trial.replace(out)
    finally:
        trial.unlink(missing_ok=True)
    print(f"{out}: {fixed.steps} steps, images of any size; differs by {difference:.0e} of the network's largest logit")


def parser() -> argparse.ArgumentParser:
    """The command's parser."""
    made = Parser(
        prog="crbp export",
        description="Write a contour-tracing network, its number of steps fixed, as a file that runs without crbp.",
        allow_abbrev=False,
    )
    add_checkpoint(made)
    made.add_argument("--format", choices=sorted(FORMATS), default="pt2", help="pt2 is torch.export's (default: pt2)")
    made.add_argument("--steps", type=int, metavar="N", help="to take (default: the number trained for)")
    made.add_argument("--out", type=Path, metavar="FILE", help="to write (default: the checkpoint's name, here)")
    return made


def _run(file: Path, kind: str, image: Tensor) -> Tensor:
    """What the file makes of images."""
    if kind == "pt2":
        found: Tensor = torch.export.load(file).module()(image)
        return found
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": image.numpy()})[0])
