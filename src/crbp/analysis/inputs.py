"""The networks and the images that are looked at."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from crbp.cells import HGRU
from crbp.data.pathfinder import PRESETS, DataError, GenerationError
from crbp.errors import CrbpError
from crbp.models import PathfinderNet
from crbp.tasks import ContourData, ContourSource, Generated, Origin, load_trained
from crbp.tasks.sampling import stacked
from crbp.tasks.weights import build


@dataclass(frozen=True, kw_only=True)
class Images:
    """What networks are looked at on.

    Attributes:
        image: ``(B, 1, H, W)``.
        mask: ``(B, H, W)`` of bool.
        task: what they are of.
        seed: that they were made with.
    """

    image: Tensor
    mask: Tensor
    task: str
    seed: int


def add_images(parser: argparse.ArgumentParser, *, default: str = "what it was trained on") -> None:
    """Add the options that choose the images; ``default`` says which they are otherwise."""
    parser.add_argument("--images", type=int, default=128, metavar="B", help="of the validation split (default: 128)")
    parser.add_argument("--preset", choices=sorted(PRESETS), help=f"task (default: {default})")
    parser.add_argument("--seed", type=int, default=0, help="of the images of a preset (default: 0)")


def check_images(options: argparse.Namespace) -> None:
    """See that the options are in range.

    Raises:
        CrbpError: naming the option that is not.
    """
    if options.images < 2:
        raise CrbpError(f"--images must be at least 2, not {options.images}")
    if options.seed < 0:
        raise CrbpError(f"--seed must be at least 0, not {options.seed}")


def load(file: Path, *, trust: Sequence[str]) -> tuple[PathfinderNet, Origin]:
    """A recurrent network and where it came from.

    Raises:
        CrbpError: if the file cannot be read or is of another network.
    """
    net, origin = load_trained(file, trust=trust)
    if not isinstance(net, PathfinderNet):
        raise CrbpError(f"{file} is of a {type(net).__name__}; give a recurrent model that traces contours")
    return net, origin


def evidential(origin: Origin) -> bool:
    """Whether a network is known to be trained with `crbp.losses.evidential_loss`."""
    task = origin.run.get("model")
    settings = task.get("init_args") if isinstance(task, Mapping) else None
    return isinstance(settings, Mapping) and settings.get("loss") == "evidential"


def unfused(net: PathfinderNet) -> PathfinderNet:
    """A copy to follow step by step, which neither stops early nor is compiled for every size of batch."""
    net = copy.deepcopy(net)
    net.evolve = replace(net.evolve, tolerance=None, on_divergence="warn")
    for module in net.modules():
        if isinstance(module, HGRU):
            module.fused = False
    return net


def trained_on(file: Path, origin: Origin, *, trust: Sequence[str]) -> tuple[ContourSource, int]:
    """The source of the images that a network was trained on, and their seed.

    Raises:
        CrbpError: if that is not known.
    """
    if "data" not in origin.run:
        raise CrbpError(f"{file} does not say what it was trained on; choose a task with --preset")
    data = build(ContourData, origin.run["data"], f"the data of {file}", trust=trust)
    return data.source, data.seed


def task_named(origin: Origin) -> str:
    """What `task_of` says of the images that a network was trained on, by its configuration; empty where it does not.

    Nothing is built: those images need not be there.
    """
    found: Any = origin.run
    for name in ("data", "init_args", "source"):
        found = found.get(name) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping):
        return ""
    kind = str(found.get("class_path", "")).rpartition(".")[2]
    return str((found.get("init_args") or {}).get("preset", Generated.preset)) if kind == "Generated" else kind


def task_of(source: ContourSource) -> str:
    """A name for what a source gives."""
    return source.preset if isinstance(source, Generated) else type(source).__name__


def images_of(source: ContourSource, count: int, *, seed: int) -> Images:
    """The first images of the validation split.

    Raises:
        CrbpError: if there are too few.
    """
    try:
        image, mask = stacked(source.items("val", count, seed), count)
    except (DataError, GenerationError) as error:
        raise CrbpError(f"{error}; --images says how many, --preset of which task") from error
    return Images(image=image, mask=mask, task=task_of(source), seed=seed)


def images(options: argparse.Namespace, file: Path, origin: Origin, *, trust: Sequence[str]) -> Images:
    """The images that the options ask for: of a preset, or of what the network was trained on.

    Raises:
        CrbpError: if they cannot be had.
    """
    if options.preset is not None:
        return images_of(Generated(preset=options.preset), options.images, seed=options.seed)
    source, seed = trained_on(file, origin, trust=trust)
    return images_of(source, options.images, seed=seed)


def parameters(net: Any) -> int:
    """How many numbers a network has learnt."""
    return sum(parameter.numel() for parameter in net.parameters())
