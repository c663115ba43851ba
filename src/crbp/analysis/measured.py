"""What `crbp analyze` measures of a model, and how it is written down."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import crbp
from crbp._checks import non_negative
from crbp._files import write_whole
from crbp._logs import Curve, scalars
from crbp.analysis.inputs import parameters, unfused
from crbp.analysis.memory import memory_curve
from crbp.analysis.states import StateSpace, state_space
from crbp.analysis.trajectory import Trajectory, follow, late_radius, penalty_curve
from crbp.models import PathfinderNet
from crbp.ops._kept import passing
from crbp.tasks import Origin
from crbp.tasks.penalties import Penalty
from crbp.tasks.weights import WeightsError, build

SHOWN = 6  # images in the figures
PENALISED = 16  # images of the penalty: it is a mean over a hundred thousand units of each


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that one image's training step keeps for the backward pass.

    Attributes:
        steps: of recurrence, N and 4N among them.
        gradient: name of the model's own gradient method.
        own: bytes with that, for each number of steps.
        bptt: with `crbp.BPTT`.
        penalty: names of the penalties that are counted in both; empty for none.
    """

    steps: tuple[int, ...]
    gradient: str
    own: tuple[int, ...]
    bptt: tuple[int, ...]
    penalty: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainedPenalties(Penalty):
    """All penalties that a `crbp.tasks.ContourTask` adds to its loss, weighted as there at the end of the ramp.

    ``penalty.weight · penalty + residual_weight · residual² + spectral_weight · spectral``, the last two
    `crbp.residual_penalty` and `crbp.spectral_penalty`; what has weight 0 is not computed. The bound of the last is its
    own default: what memory the penalties take, for which this is here, does not depend on it.

    Raises:
        ValueError: for a weight out of range, or where there is no penalty at all.
    """

    weight: float = 1.0
    penalty: Penalty | None
    residual_weight: float
    spectral_weight: float

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative("residual_weight", self.residual_weight)
        non_negative("spectral_weight", self.spectral_weight)
        if not self.names:
            raise ValueError("there is no penalty: give one, or None in place of all of them")

    @property
    def names(self) -> list[str]:
        """Of what is computed."""
        weighted = {"residual_penalty": self.residual_weight, "spectral_penalty": self.spectral_weight}
        first = [] if self.penalty is None else [type(self.penalty).__name__]
        return first + [name for name, weight in weighted.items() if weight]

    @passing()
    def __call__(self, run: crbp.Run) -> Tensor:
        """The sum, for one run."""
        found = [] if self.penalty is None else [self.penalty.weight * self.penalty(run)]
        if self.residual_weight:
            found.append(self.residual_weight * crbp.residual_penalty(run))
        if self.spectral_weight:
            found.append(self.spectral_weight * crbp.spectral_penalty(run))
        return torch.stack(found).sum()


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What was measured of a model.

    Attributes:
        trained: N, the steps it was trained for.
        trajectory: what it does step by step.
        states: where its states go; None where they do not stay finite.
        radius: spectral radius of the step's Jacobian after the last step, one an image; inf where that is not finite.
        converged: whether each is to be trusted.
        penalty: Lipschitz coefficient penalty of each step, ``(T,)``.
        memory: of a training step.
        parameters: how many numbers it has learnt.
        training: what the log of its run has of the penalty and the residual; empty where there is none.
    """

    trained: int
    trajectory: Trajectory
    states: StateSpace | None
    radius: Tensor
    converged: Tensor
    penalty: Tensor
    memory: Memory
    parameters: int
    training: Mapping[str, Curve] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        """All of it that is a number; None for what is not finite, for which JSON has no word."""
        n, f1, residual = self.trained, self.trajectory.f1, self.trajectory.residual
        states, memory = self.states, self.memory
        found = {
            "parameters": self.parameters,
            "trained_steps": n,
            "steps": len(f1),
            "f1": f1.tolist(),
            "f1_at_n": float(f1[n - 1]),
            "f1_at_end": float(f1[-1]),
            "f1_best": float(f1.max()),
            "f1_best_at": int(f1.argmax()) + 1,
            "residual": residual.tolist(),
            "residual_at_n": float(residual[n - 1]),
            "residual_at_end": float(residual[-1]),
            "spectral_radius": self.radius.tolist(),
            "spectral_radius_converged": float(self.converged.double().mean()),
            "stable_share": float((self.radius < 1).double().mean()),
            "penalty": self.penalty.tolist(),
            "penalty_at_n": float(self.penalty[n - 1]),
            "penalty_at_end": float(self.penalty[-1]),
            "penalty_in_training": {name: list(curve) for name, curve in self.training.items()},
            "memory": {
                "steps": list(memory.steps),
                "gradient": memory.gradient,
                "penalty": memory.penalty or None,
                "own_bytes": list(memory.own),
                "bptt_bytes": list(memory.bptt),
            },
            "moved": states.moved.tolist() if states else None,
            "explained": states.explained.tolist() if states else None,
            "ks_statistic": states.statistic.tolist() if states else None,
            "ks_p_value": states.p_value.tolist() if states else None,
            "state_space": _rounded(states.coordinates) if states else None,
            "arrival_at_n": self.trajectory.arrival(n).tolist(),
            "arrival_at_end": self.trajectory.arrival(len(f1)).tolist(),
        }
        return {name: plain(value) for name, value in found.items()}


def analyse(
    net: PathfinderNet,
    image: Tensor,
    mask: Tensor,
    *,
    steps: int | None = None,
    radii: int = 64,
    evidential: bool = False,
    penalty: Penalty | None = None,
    training: Mapping[str, Curve] | None = None,
) -> Analysis:
    """Run a model beyond the steps it was trained for and measure what it does.

    Args:
        net: the model, in evaluation mode.
        image: ``(B, 1, H, W)``, at least two.
        mask: ``(B, H, W)`` of bool.
        steps: how far to run; None for four times the steps it was trained for.
        radii: of how many images the spectral radius is estimated.
        evidential: see `crbp.analysis.follow`.
        penalty: that it was trained with, all of them (`penalty_of`), counted in the memory of a training step.
        training: what the log of its run has.

    Raises:
        ValueError: if there are fewer than two images, or ``steps`` is not above the steps trained for.
    """
    trained = net.evolve.steps
    late = 4 * trained if steps is None else steps
    net = unfused(net)
    try:
        states = state_space(net, image, trained=trained, steps=late)
    except FloatingPointError:
        states = None
    radius, converged = late_radius(net, image[:radii], steps=late)
    return Analysis(
        trained=trained,
        trajectory=follow(net, image, mask, steps=late, shown=min(SHOWN, len(image)), evidential=evidential),
        states=states,
        radius=radius,
        converged=converged,
        penalty=penalty_curve(net, image[:PENALISED], steps=late),
        memory=training_memory(net, image[:1], steps=(1, trained, 2 * trained, 4 * trained), penalty=penalty),
        parameters=parameters(net),
        training=training or {},
    )


def training_memory(net: PathfinderNet, image: Tensor, *, steps: Sequence[int], penalty: Penalty | None) -> Memory:
    """What a training step keeps, with the model's own gradient and with `crbp.BPTT`."""
    steps = tuple(sorted(set(steps)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", crbp.DivergenceWarning)  # what is kept does not depend on it
        own, bptt = (
            tuple(memory_curve(net, image, gradient=gradient, steps=steps, penalty=penalty))
            for gradient in (net.evolve.gradient, crbp.BPTT())
        )
    return Memory(steps=steps, gradient=type(net.evolve.gradient).__name__, own=own, bptt=bptt, penalty=_named(penalty))


def penalty_of(file: Path, origin: Origin, *, trust: Sequence[str]) -> TrainedPenalties | None:
    """The penalties that a network was trained with; None for none, or where the file does not say.

    A weight that the run's configuration does not name did not exist when it was trained, and counts as 0; one that it
    leaves open is that of `crbp.tasks.ContourTask`, 1 where there is a penalty.

    Raises:
        WeightsError: if they cannot be made.
    """
    settings = origin.run.get("model")
    given = settings.get("init_args") if isinstance(settings, Mapping) else None
    if not isinstance(given, Mapping):
        return None
    config, what = given.get("penalty"), f"the penalty of {file}"
    penalty = None if config is None else build(Penalty, config, what, trust=trust)  # type: ignore[type-abstract]
    weights = {name: given.get(name, 0.0) for name in ("residual_weight", "spectral_weight")}
    left_open = 0.0 if penalty is None else 1.0
    weights = {name: left_open if value is None else value for name, value in weights.items()}
    if penalty is None and not any(weights.values()):
        return None
    try:
        return TrainedPenalties(penalty=penalty, **weights)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"the penalties of {file} cannot be made: {error}") from error


def _named(penalty: Penalty | None) -> str:
    if isinstance(penalty, TrainedPenalties):
        return ", ".join(penalty.names)
    return "" if penalty is None else type(penalty).__name__


def training_log(file: Path) -> dict[str, Curve]:
    """What the run that a checkpoint lies in has logged of penalty and residual."""
    tags = tuple(f"{split}/{name}" for split in ("train", "val") for name in ("penalty", "residual"))
    return scalars(file.absolute().parent.parent, tags=tags)


def write_numbers(file: Path, numbers: Mapping[str, Any]) -> None:
    """Write numbers as JSON, one name a line."""
    lines = [f"  {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in numbers.items()]
    write_whole(file, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def plain(value: Any) -> Any:
    """The same with None for every number in it that is not finite."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rounded(values: Tensor) -> Any:
    """Numbers for a figure: four digits of the largest are enough."""
    largest = float(values.abs().max())
    digits = 4 - math.ceil(math.log10(largest)) if largest > 0 else 0
    return torch.round(values.double(), decimals=digits).tolist()
