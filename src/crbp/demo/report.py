"""The demo's numbers, its figures, and one HTML page that needs nothing beside it."""

from __future__ import annotations

import html
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import crbp
from crbp._code import code
from crbp.analysis import figures, memory_curve
from crbp.analysis.page import RESIDUAL, write_page
from crbp.demo.recipe import Recipe
from crbp.demo.training import RADII, validation
from crbp.tasks import Origin, save_net

if TYPE_CHECKING:
    from crbp.demo.training import Outcome

MEMORY_STEPS = (1, 2, 4, 8, 16, 32, 64)


def write(
    folder: Path, recipe: Recipe, outcomes: dict[str, Outcome], *, seed: int, quick: bool, since: float
) -> dict[str, Any]:
    """Write figures, weights and the page into ``folder``; return the numbers.

    Args:
        folder: exists already.
        recipe: what both models were trained by.
        outcomes: of ``"C-RBP"`` and ``"BPTT"``.
        seed: of both.
        quick: whether this is the quick recipe, which the page then says.
        since: `time.perf_counter` at the start of the demo.
    """
    image, mask = validation(recipe, seed)
    memory = _memory(recipe, image)
    drawn = _draw(recipe, outcomes, image, mask, memory)
    for name, outcome in outcomes.items():
        save_net(outcome.weights, folder / f"{_slug(name)}.safetensors", _origin(name, recipe))
    numbers = _numbers(recipe, outcomes, image, mask, memory)
    numbers |= {"seed": seed, "quick": quick, "machine": _machine(), "seconds": round(time.perf_counter() - since, 1)}
    captions = _captions(numbers, recipe)
    note = "<p class=note>This is the quick run: fewer images than the model needs.</p>"
    write_page(
        folder / "report.html",
        title="crbp demo: contours traced step by step",
        heading="A recurrent model traces contours, and stays right",
        lead=f"{note if quick else ''}<p>{_verdict(numbers, recipe)}</p>",
        table=_table(numbers, recipe),
        figures={name: (figure, captions[name]) for name, figure in drawn.items()},
        notes={"How it was made": _how(numbers, recipe)},
    )
    return numbers


def summary(numbers: dict[str, Any], recipe: Recipe) -> str:
    """What the demo found, in a few lines for the terminal."""
    n = recipe.steps
    return "\n".join(
        [
            "",
            f"F1 on {recipe.validation} images never trained on      C-RBP    BPTT",
            f"  after the {n} steps trained for        {numbers['f1_at_n']:.3f}    {numbers['bptt_f1_at_n']:.3f}",
            f"  after {4 * n} steps                     {numbers['f1_at_4n']:.3f}    {numbers['bptt_f1_at_4n']:.3f}",
            f"  marking every stroke                 {numbers['all_strokes_f1']:.3f}",
            f"Relative residual after {4 * n} steps      {numbers['residual_at_4n']:.0e}   "
            f"{numbers['bptt_residual_at_4n']:.0e}",
            f"In all {numbers['seconds']:.0f} s.",
        ]
    )


def _memory(recipe: Recipe, image: Tensor) -> dict[str, list[int]]:
    """Bytes saved for one image, for each method at each of `MEMORY_STEPS`."""
    net = recipe.net(crbp.BPTT())
    found = memory_curve(net, image[:1], gradient=recipe.rbp, steps=MEMORY_STEPS, penalty=recipe.penalty)
    return {"C-RBP": found, "BPTT": memory_curve(net, image[:1], gradient=crbp.BPTT(), steps=MEMORY_STEPS)}


def _numbers(
    recipe: Recipe, outcomes: dict[str, Outcome], image: Tensor, mask: Tensor, memory: dict[str, list[int]]
) -> dict[str, Any]:
    numbers: dict[str, Any] = {"steps": recipe.steps}
    last, late = recipe.steps - 1, 4 * recipe.steps - 1
    for name, prefix in (("C-RBP", ""), ("BPTT", "bptt_")):
        outcome = outcomes[name]
        found = outcome.trajectory
        numbers |= {
            f"{prefix}f1_at_n": float(found.f1[last]),
            f"{prefix}f1_at_4n": float(found.f1[late]),
            f"{prefix}f1_best": float(found.f1.max()),
            f"{prefix}residual_at_n": float(found.residual[last]),
            f"{prefix}residual_at_4n": float(found.residual[late]),
            f"{prefix}stable_share": float((outcome.radius < 1).double().mean()),
            f"{prefix}images": outcome.images,
            f"{prefix}training_seconds": round(outcome.seconds, 1),
            f"{prefix}memory_mib": {n: found / 2**20 for n, found in zip(MEMORY_STEPS, memory[name], strict=True)},
        }
    return numbers | {"all_strokes_f1": _all_strokes(recipe, image, mask)}


def _all_strokes(recipe: Recipe, image: Tensor, mask: Tensor) -> float:
    """F1 of marking every pixel that a stroke covers as much as the target must cover one of its own."""
    strokes = image[:, 0] > recipe.config.mask_threshold * recipe.config.contrast
    return float(2 * (strokes & mask).sum() / (strokes.sum() + mask.sum()))


def _draw(
    recipe: Recipe, outcomes: dict[str, Outcome], image: Tensor, mask: Tensor, memory: dict[str, list[int]]
) -> dict[str, Figure]:
    n, shown = recipe.steps, recipe.examples
    ours, theirs = outcomes["C-RBP"].trajectory, outcomes["BPTT"].trajectory
    arrivals = {
        f"C-RBP, {n} steps": ours.arrival(n),
        f"C-RBP, {4 * n} steps": ours.arrival(4 * n),
        f"BPTT, {n} steps": theirs.arrival(n),
        f"BPTT, {4 * n} steps": theirs.arrival(4 * n),
    }
    found = {name: outcome.trajectory for name, outcome in outcomes.items()}
    strokes = ("marking every stroke", _all_strokes(recipe, image, mask))
    return {
        "tracing": figures.tracing(image[:shown], mask[:shown], arrivals, steps=n),
        "filmstrip": figures.filmstrip(image[:3], ours.probability[:, :3], figures.steps_to_show(n, 4 * n)),
        "f1": figures.over_steps({k: v.f1 for k, v in found.items()}, trained=n, label="F1", level=strokes),
        "residual": figures.over_steps(
            {k: v.residual for k, v in found.items()}, trained=n, label="relative residual", log=True
        ),
        "spectral_radius": figures.radii({k: v.radius for k, v in outcomes.items()}),
        "memory": figures.memory(MEMORY_STEPS, memory),
    }


def _verdict(numbers: dict[str, Any], recipe: Recipe) -> str:
    n = recipe.steps
    change, other = (numbers[f"{p}f1_at_4n"] - numbers[f"{p}f1_at_n"] for p in ("", "bptt_"))
    return (
        f"After the {n} steps it was trained for, the model trained with C-RBP traces the marked contour with F1 "
        f"<b>{numbers['f1_at_n']:.3f}</b> on {recipe.validation} images it has never seen (marking every stroke "
        f"scores {numbers['all_strokes_f1']:.3f}). Run on to {4 * n} steps its F1 changes by <b>{change:+.3f}</b>; "
        f"that of the model trained with BPTT for the same time changes by <b>{other:+.3f}</b>, from "
        f"{numbers['bptt_f1_at_n']:.3f}."
    )


def _table(numbers: dict[str, Any], recipe: Recipe) -> list[tuple[str, str, str]]:
    n, most = recipe.steps, MEMORY_STEPS[-1]
    rows = [
        (f"F1 at N = {n}", "f1_at_n", "{:.3f}"),
        (f"F1 at 4N = {4 * n}", "f1_at_4n", "{:.3f}"),
        ("relative residual at N", "residual_at_n", "{:.1e}"),
        ("relative residual at 4N", "residual_at_4n", "{:.1e}"),
        ("images whose spectral radius at 4N is below 1", "stable_share", "{:.0%}"),
        ("images seen in training", "images", "{:,}"),
        ("seconds of training on one core", "training_seconds", "{:.0f}"),
    ]
    cells = [(label, form.format(numbers[key]), form.format(numbers["bptt_" + key])) for label, key, form in rows]
    ours, theirs = (numbers[f"{p}memory_mib"][most] for p in ("", "bptt_"))
    memory = f"saved activations of one image at {most} steps, MiB", f"{ours:.1f}", f"{theirs:.1f}"
    return [("", "C-RBP", "BPTT"), *cells, memory]


def _captions(numbers: dict[str, Any], recipe: Recipe) -> dict[str, str]:
    n = recipe.steps
    return {
        "tracing": "Images from the validation set, in order and not chosen. Colour: the step from which on a pixel "
        f"stays marked. With {4 * n} steps, yellow also stands for any step after {n}.",
        "filmstrip": "What the model trained with C-RBP believes after some of its steps, from 0 (black) to 1.",
        "f1": f"F1 over all pixels of {recipe.validation} validation images, read out after each step.",
        "residual": RESIDUAL,
        "spectral_radius": "Spectral radius of the step's Jacobian after 4N steps, by power iteration on each of "
        f"{RADII} images. Below 1, small perturbations of the state die out.",
        "memory": "What autograd keeps for the backward pass of one image; the penalty is counted for C-RBP.",
    }


def _how(numbers: dict[str, Any], recipe: Recipe) -> str:
    return (
        f"Task <code>{recipe.preset}</code>: two contours of {recipe.config.contour_length} dashes, "
        f"{recipe.config.n_distractors} distractors; the disc marks one end of the target. Model: hGRU with "
        f"{recipe.channels} channels and {recipe.kernel_size}×{recipe.kernel_size} kernels. Both models start from the "
        "same weights and are trained at the same time, each on one core, on the same learning-rate schedule; the one "
        f"trained with BPTT stops when the other has seen its {numbers['images']:,} images. That one is trained the "
        f"ordinary way, always with {recipe.steps} steps and without a penalty. C-RBP takes {recipe.terms} Neumann "
        f"terms, the Lipschitz coefficient penalty with a weight that rises to {recipe.penalty.weight:g}, and "
        f"{_range(recipe)}, drawn for each batch, at the end of training. Seed {numbers['seed']}; "
        f"{html.escape(numbers['machine'])}; crbp {crbp.__version__}, torch {torch.__version__}; "
        f"{numbers['seconds']:.0f} s in all."
    )


def _range(recipe: Recipe) -> str:
    return f"{recipe.steps} steps or, in half of the batches, up to {recipe.steps + recipe.step_jitter}"


def _slug(name: str) -> str:
    return name.lower().replace("-", "")


def _machine() -> str:
    return f"{platform.processor() or platform.machine()}, {platform.system()}, Python {platform.python_version()}"


def _origin(name: str, recipe: Recipe) -> Origin:
    gradient: dict[str, Any] = {"class_path": "crbp.BPTT"}
    if name == "C-RBP":
        neumann = {"class_path": "crbp.Neumann", "init_args": {"terms": recipe.terms}}
        gradient = {"class_path": "crbp.RBP", "init_args": {"solver": neumann, "on_divergence": "fallback"}}
    return Origin(
        name=f"demo, {name}",
        code=code(),
        net={
            "class_path": "crbp.models.PathfinderNet",
            "init_args": {
                "cell": {
                    "class_path": "crbp.cells.HGRU",
                    "init_args": {"channels": recipe.channels, "kernel_size": recipe.kernel_size},
                },
                "evolve": {"steps": recipe.steps, "gradient": gradient},
            },
        },
    )
