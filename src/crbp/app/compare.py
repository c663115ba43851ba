"""What the app measures of a model on one image, and how it is handed to the page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import crbp
from crbp._tree import flatten_state, relative_residual
from crbp.analysis.evidence import evidential_uncertainty, reaction_time
from crbp.analysis.inputs import evidential
from crbp.analysis.trajectory import states_of
from crbp.app.images import Picture
from crbp.cells import HGRU
from crbp.errors import CrbpError
from crbp.losses import expected_probability
from crbp.models import PathfinderNet
from crbp.ops import shared_spectra
from crbp.tasks import load_trained

POWER_STEPS = 40  # of the power iteration, at most; what has not converged by then is marked


@dataclass(frozen=True, kw_only=True)
class Model:
    """A contour-tracing model whose steps can be followed.

    Attributes:
        name: on the page.
        net: itself.
        evidential: whether it is known to be trained with `crbp.losses.evidential_loss`: its uncertainty then means
            something, and its probabilities are those that this loss is of.
    """

    name: str
    net: PathfinderNet
    evidential: bool


@dataclass(frozen=True, kw_only=True)
class Followed:
    """What a model did on one image over ``T`` steps.

    Attributes:
        model: that it was.
        probability: of the target after step 1 … T, ``(T, H, W)``.
        uncertainty: evidential, ``(T, H, W)``; see `crbp.analysis.evidential_uncertainty`.
        residual: ``‖h_t − h_{t−1}‖ / ‖h_t‖``, ``(T,)``.
        f1: after step 1 … T, ``(T,)``; None where the target is not known.
    """

    model: Model
    probability: Tensor
    uncertainty: Tensor
    residual: Tensor
    f1: Tensor | None

    @property
    def reaction_time(self) -> Tensor:
        """ξ of each pixel, ``(H, W)``."""
        return reaction_time(self.uncertainty)


def load_recurrent(file: Path, *, trust: Sequence[str] = ("crbp",)) -> Model:
    """A model as the app runs it, named after the run that trained it.

    Raises:
        CrbpError: if the file cannot be read or is of another kind of model.
    """
    net, origin = load_trained(file, trust=trust)
    if not isinstance(net, PathfinderNet):
        raise CrbpError(f"{file} is of a {type(net).__name__}; give a recurrent model that traces contours")
    for module in net.modules():
        if isinstance(module, HGRU):
            module.fused = False  # it would be compiled for every size of image
    return Model(name=origin.name or file.stem, net=net.requires_grad_(False), evidential=evidential(origin))


@torch.no_grad()
def follow_one(model: Model, picture: Picture, *, steps: int) -> Followed:
    """Run a model for so many steps on one image and read it out after each."""
    net = model.net
    logits, residual = [], []
    with shared_spectra():
        for before, state in states_of(net, picture.image, steps=steps):
            logits.append(net.read(state)[0])
            residual.append(relative_residual(flatten_state(before)[0], flatten_state(state)[0]))
    read = torch.stack(logits)
    return Followed(
        model=model,
        probability=(expected_probability(read) if model.evidential else read.softmax(dim=1))[:, 1],
        uncertainty=evidential_uncertainty(read),
        residual=torch.stack(residual),
        f1=None if picture.mask is None else _f1(read.argmax(dim=1).bool(), picture.mask),
    )


def _f1(traced: Tensor, mask: Tensor) -> Tensor:
    hits = (traced & mask).sum(dim=(1, 2))
    return 2 * hits / (traced.sum(dim=(1, 2)) + mask.sum()).clamp_min(1)


def radii_steps(trained: int, last: int) -> list[int]:
    """The steps at which the spectral radius is estimated: at N first, then where it changes most, then late."""
    order = [trained, 1, last, trained // 2, 2 * trained, 3 * trained, trained // 4]
    return [step for step in dict.fromkeys(order) if 1 <= step <= last]


def radii(net: PathfinderNet, image: Tensor, *, steps: Sequence[int]) -> Iterator[tuple[int, float, bool]]:
    """The spectral radius of the step's Jacobian at the state after each of ``steps``, in their order.

    Yields:
        The step, the radius, and whether the estimate has converged. States that are not finite are left out.
    """
    with torch.no_grad():
        drive = net.drive(image)
        before = {}
        with shared_spectra():
            for step, (state, _) in enumerate(states_of(net, image, steps=max(steps)), start=1):
                if step in steps:
                    before[step] = state
    for step in steps:
        try:
            with torch.no_grad():
                run = crbp.Evolve(steps=1)(lambda h: net.cell(h, drive), before[step])
        except crbp.DivergenceError:
            continue
        generator = torch.Generator(image.device).manual_seed(0)
        found = crbp.spectral_radius(run, iterations=POWER_STEPS, generator=generator)
        yield step, float(found.radius), bool(found.converged)


def shown(picture: Picture, found: Sequence[Followed], *, number: int) -> dict[str, Any]:
    """All that the page's player needs, as JSON can hold it.

    Args:
        picture: that was followed.
        found: of each model, over the same number of steps.
        number: of this run, so that what comes later finds its player.
    """
    maps = [each.reaction_time for each in found]
    unsure = [float(limit) for limit in _limits([each.uncertainty for each in found])]
    slow = [float(limit) for limit in _limits(maps)]
    return {
        "number": number,
        "steps": len(found[0].residual),
        "width": picture.image.shape[-1],
        "height": picture.image.shape[-2],
        "image": _png(_bytes(picture.image[0, 0])),
        "target": None if picture.mask is None else _png(_bytes(picture.mask[0].float())),
        "told": picture.told,
        "uncertaintyRange": unsure,
        "reactionRange": slow,
        "models": [
            {
                "name": each.model.name,
                "trained": each.model.net.evolve.steps,
                "evidential": each.model.evidential,
                "probability": _png(_strip(each.probability, (0.0, 1.0))),
                "uncertainty": _png(_strip(each.uncertainty, unsure)),
                "reaction": _png(_bytes(_scaled(each.reaction_time, slow))),
                "reactionMean": _numbers(each.reaction_time.mean()[None])[0],
                "meanUncertainty": _numbers(each.uncertainty.mean(dim=(1, 2))),
                "residual": _numbers(each.residual),
                "f1": None if each.f1 is None else _numbers(each.f1),
            }
            for each in found
        ],
    }


def _limits(maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    finite = torch.cat([each[each.isfinite()].flatten() for each in maps])
    return (finite.min(), finite.max()) if len(finite) else (torch.tensor(0.0), torch.tensor(1.0))


def _scaled(values: Tensor, limits: Sequence[float]) -> Tensor:
    return (values - limits[0]) / max(limits[1] - limits[0], 1e-12)


def _strip(frames: Tensor, limits: Sequence[float]) -> NDArray[np.uint8]:
    """Frames ``(T, H, W)`` below each other."""
    return _bytes(_scaled(frames, limits).flatten(0, 1))


def _bytes(values: Tensor) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = (values.nan_to_num(0).clamp(0, 1) * 255).round().byte().numpy()
    return pixels


def _png(pixels: NDArray[np.uint8]) -> str:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def _numbers(curve: Tensor) -> list[float | None]:
    """A curve as JSON can hold it, which has no word for what is not finite."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in curve.tolist()]
