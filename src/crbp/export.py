"""A trained network with its number of steps fixed, as a file that runs without crbp: `torch.export` or ONNX.

What is exported takes images to logits. It is the same mathematics without the report of a run, which would have to
look at numbers, and with operations that any runtime has: direct convolutions, nothing compiled by hand.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_unflatten

from crbp._checks import count
from crbp._files import write_whole
from crbp._tree import flatten_state, leaf_step
from crbp.cells import HGRU
from crbp.gradients import Recurrence
from crbp.models import PathfinderNet
from crbp.ops import Conv2d
from crbp.ops.pointwise import as_pytorch

__all__ = ["FixedSteps", "exported", "to_onnx", "to_pt2"]

TRACED = (2, 1, 32, 40)  # what is traced; the sizes of what is then run are free


class FixedSteps(nn.Module):
    """A copy of a contour-tracing network, in evaluation mode, that takes a fixed number of steps.

    Equal to the network run so far with no tolerance: a network that has one may itself stop before.

    Args:
        net: to copy.
        steps: to take; None for the number that the network has.

    Raises:
        TypeError: if it is no `crbp.models.PathfinderNet`.
        ValueError: if ``steps`` is below 1.
    """

    def __init__(self, net: nn.Module, steps: int | None = None) -> None:
        super().__init__()
        if not isinstance(net, PathfinderNet):
            raise TypeError(
                f"a {type(net).__name__} cannot be exported with fixed steps, a crbp.models.PathfinderNet can; give "
                "other networks to torch.export yourself"
            )
        if steps is not None:
            count("steps", steps)
        self.net = copy.deepcopy(net).requires_grad_(False)
        self.steps = steps or net.evolve.steps
        for module in self.net.modules():
            if isinstance(module, Conv2d):
                module.method = "direct"
            if isinstance(module, HGRU):
                module.fused = False
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``(B, 2, H, W)`` of images ``(B, 1, H, W)`` in [0, 1]."""
        with as_pytorch():
            return self._run(image)

    def _run(self, image: Tensor) -> Tensor:
        drive = self.net.drive(image)
        start, spec = flatten_state(self.net.cell.initial_state(drive))
        step = leaf_step(lambda state: self.net.cell(state, drive), spec)
        recurrence = Recurrence(step=step, start=start, steps=self.steps, tolerance=None, record=lambda report: None)
        # By the gradient method, since one may end on other steps than plain ones.
        rolled = self.net.evolve.gradient(recurrence)
        return self.net.read(tree_unflatten(list(rolled.state), spec))


def exported(net: nn.Module, *, steps: int | None = None) -> ExportedProgram:
    """The network as a program of `torch.export`, for any number of images of any size.

    Args:
        net: a `crbp.models.PathfinderNet`.
        steps: to take; None for the number that the network has.

    Raises:
        TypeError: if it is another network.
        ValueError: if ``steps`` is below 1.
    """
    fixed = FixedSteps(net, steps).cpu()
    free = {"image": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}}
    dtype = next(fixed.parameters()).dtype
    with torch.no_grad():
        return torch.export.export(fixed, (torch.zeros(TRACED, dtype=dtype),), dynamic_shapes=free)


def to_pt2(net: nn.Module, path: str | Path, *, steps: int | None = None) -> None:
    """Write the network as a ``.pt2`` file; ``torch.export.load(path).module()(image)`` gives logits ``(B, 2, H, W)``.

    Args:
        net: a `crbp.models.PathfinderNet`.
        path: of the file to write.
        steps: to take; None for the number that the network has.

    Raises:
        TypeError: if it is another network.
        ValueError: if ``steps`` is below 1.
        StorageError: if the file cannot be written.
    """
    content = io.BytesIO()
    torch.export.save(exported(net, steps=steps), content)
    write_whole(Path(path), content.getbuffer())


def to_onnx(net: nn.Module, path: str | Path, *, steps: int | None = None) -> None:
    """Write the network as an ONNX file, of an input ``image`` and an output ``logits``.

    Args:
        net: a `crbp.models.PathfinderNet`.
        path: of the file to write.
        steps: to take; None for the number that the network has.

    Raises:
        ImportError: if the extra ``onnx`` is not installed.
        TypeError: if it is another network.
        ValueError: if ``steps`` is below 1.
        StorageError: if the file cannot be written.
    """
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise ImportError(f"an ONNX file needs {', '.join(missing)}, not installed here; run: pip install 'crbp[onnx]'")
    program = exported(net, steps=steps)
    made: Any = torch.onnx.export(program, (), dynamo=True, verbose=False, output_names=["logits"])
    write_whole(Path(path), made.model_proto.SerializeToString())


FORMATS: dict[str, Callable[..., None]] = {"pt2": to_pt2, "onnx": to_onnx}
