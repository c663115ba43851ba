"""How soon training reaches a quality, and how soon a backward solver reaches the gradient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import crbp
from crbp.bench.measure import (
    CHECKOUT,
    Gradients,
    Numbers,
    Size,
    forget_compiled,
    make_cell,
    relative,
    textbook,
    timed,
    training_step,
)
from crbp.bench.speed import measured
from crbp.errors import CrbpError
from crbp.losses import focal_loss
from crbp.models import PathfinderNet
from crbp.solvers import Solver

if TYPE_CHECKING:
    from crbp.demo.recipe import Recipe

TARGET = 0.9
EVERY = 400  # images between two validations
WARMUP = 0.02
PRECISION = 1e-12  # relative residual of the reference solution


@dataclass
class _Runner:
    """One of the codes in training: its parameters, how it takes a step, how long that has taken so far."""

    net: nn.Module
    step: Callable[[Tensor, Tensor, int, float], tuple[Tensor, Gradients]]
    logits: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    spent: list[float] = field(default_factory=list)
    images: int = 0
    curve: list[Numbers] = field(default_factory=list)
    done: bool = False

    @property
    def seconds(self) -> float:
        return sum(self.spent)

    def train(self, image: Tensor, mask: Tensor, steps: int, weight: float, rate: float) -> None:
        """One optimiser step."""
        self.optimizer.param_groups[0]["lr"] = rate

        def update() -> None:
            self.step(image, mask, steps, weight)
            nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            self.optimizer.step()

        self.spent.append(timed(update)[1])
        self.images += len(image)

    @torch.no_grad()
    def validate(self, image: Tensor, mask: Tensor, size: int) -> None:
        found = torch.cat([self.logits(part).argmax(dim=1).bool() for part in torch.split(image, size)])
        f1 = 2 * float((found & mask).sum()) / max(float(found.sum() + mask.sum()), 1.0)
        self.curve.append({"images": self.images, "seconds": self.seconds, "f1": f1})
        self.done = f1 >= TARGET

    def numbers(self) -> Numbers:
        reached = self.curve[-1] if self.done else None
        return {
            "seconds": reached["seconds"] if reached else None,
            "images": reached["images"] if reached else None,
            "first_batch_seconds": self.spent[0],
            "seconds_per_image": sum(self.spent[1:]) / (self.images * (1 - 1 / len(self.spent))),
            "best_f1": max((point["f1"] for point in self.curve), default=None),
            "curve": self.curve,
        }


def time_to_f1(*, quick: bool) -> Numbers:
    """Seconds of training until validation F1 first reaches 0.9 on the demo's task, one thread each.

    All codes start from the same weights and see the same batches, one after the other, at the same rates, numbers of
    steps and weights of the penalty; crbp once as it is by default and once fused. Making images and validating is not
    counted; compiling is, in the first batch, which ``seconds_per_image`` leaves out. ``measured_seconds`` are those of
    one convolution, step and product of ours at this size, by name of the code.
    """
    from crbp.demo.recipe import FULL
    from crbp.demo.training import validation

    recipe = replace(FULL, images=160 if quick else 6_000, validation=32 if quick else 128)
    kinds = (False,) if quick else (False, True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seen = validation(recipe, seed=0)
        runners = _runners(recipe, fused=kinds)
        _race(recipe, runners, seen, every=80 if quick else EVERY)
        parts = {_named(fused): measured(_size(recipe, fused)) for fused in kinds}
    finally:
        torch.set_num_threads(threads)
    numbers: Numbers = {"target": TARGET, "seed": 0, "cap": recipe.images, "threads": 1, "measured_seconds": parts}
    codes = {name: runner.numbers() for name, runner in runners.items()}
    theirs = codes["textbook"]
    for found in codes.values():
        whole = found["seconds"] is not None and theirs["seconds"] is not None
        found["speedup"] = theirs["seconds"] / found["seconds"] if whole else None
        found["speedup_per_image"] = theirs["seconds_per_image"] / found["seconds_per_image"]
    return {**numbers, "codes": codes}


def _runners(recipe: Recipe, *, fused: Sequence[bool]) -> dict[str, _Runner]:
    """By name of the code; ours is fused or not, or both."""
    forget_compiled()
    torch.manual_seed(0)
    start = recipe.net(recipe.rbp)
    other: Any = textbook().TextbookNet(recipe.channels, recipe.kernel_size)
    other.load_state_dict(start.state_dict())

    def ours(net: PathfinderNet) -> _Runner:
        def step(image: Tensor, mask: Tensor, steps: int, weight: float) -> tuple[Tensor, Gradients]:
            return training_step(net, image, mask, steps=steps, weight=weight, gamma=recipe.gamma)

        return _Runner(net, step, lambda image: net(image).logits, adam(net))

    def theirs(image: Tensor, mask: Tensor, steps: int, weight: float) -> tuple[Tensor, Gradients]:
        result: tuple[Tensor, Gradients] = textbook().training_step(
            other, image, mask, steps=steps, terms=recipe.terms, weight=weight, gamma=recipe.gamma
        )
        return result

    def adam(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(module.parameters(), lr=recipe.learning_rate, betas=(0.9, recipe.beta2))

    return {
        **{_named(each): ours(_net(recipe, start, fused=each)) for each in fused},
        "textbook": _Runner(other, theirs, lambda image: other(image, recipe.steps), adam(other)),
    }


def _named(fused: bool) -> str:
    return "crbp, fused" if fused else "crbp"


def _size(recipe: Recipe, fused: bool) -> Size:
    return Size(
        channels=recipe.channels,
        kernel_size=recipe.kernel_size,
        image=recipe.config.image_size,
        batch=recipe.batch_size,
        steps=recipe.steps,
        terms=recipe.terms,
        fused=fused,
    )


def _net(recipe: Recipe, start: PathfinderNet, *, fused: bool) -> PathfinderNet:
    """The demo's model with the weights of another, around a cell that is fused or not."""
    net = recipe.net(recipe.rbp)
    net.cell = make_cell(recipe.channels, recipe.kernel_size, fused=fused, horizon=recipe.horizon)
    net.load_state_dict(start.state_dict())
    return net


def _race(recipe: Recipe, runners: dict[str, _Runner], seen: tuple[Tensor, Tensor], *, every: int) -> None:
    """Train all until each is done, or the images are used up."""
    total = recipe.images // recipe.batch_size
    draw = torch.Generator().manual_seed(0)
    batches = _batches(recipe)
    for t in range(total):
        image, mask = next(batches)
        done = t / total
        rate = recipe.learning_rate * min(1.0, (t + 1) / (WARMUP * total + 1)) * (1 + math.cos(math.pi * done)) / 2
        reach = round(recipe.step_jitter * done)
        steps = recipe.steps + max(0, int(torch.randint(-reach, reach + 1, (), generator=draw)))
        weight = recipe.penalty.weight * float(100 ** min(done / recipe.penalty_ramp - 1.0, 0.0))
        racing = [runner for runner in runners.values() if not runner.done]
        # Who goes first changes from batch to batch: the caches are then as warm for the one as for the other.
        for runner in racing if t % 2 else racing[::-1]:
            runner.train(image, mask, steps, weight, rate)
            if runner.images // every > (runner.images - len(image)) // every:
                runner.validate(*seen, size=recipe.batch_size)  # another size would compile anew
        if all(runner.done for runner in runners.values()):
            return


def _batches(recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """The demo's training batches, without end."""
    data = recipe.data(seed=0)
    for batch in itertools.chain.from_iterable(itertools.repeat(data.train_dataloader())):
        yield batch["image"], batch["mask"]


def solvers(*, quick: bool) -> Numbers:
    """Relative error of the gradient against the vector-Jacobian products spent, of networks that C-RBP has trained.

    The error is ``‖(u − u*)ᵀ ∂f/∂θ‖ / ‖u*ᵀ ∂f/∂θ‖`` over all parameters of the cell, in float64, with ``u*`` solved to
    a relative residual of 1e-12. The networks are those of `results/pathfinder`, as they are, on two images each, after
    so many steps that the state hardly moves.
    """
    products = (1, 2, 4, 8, 16) if quick else tuple(range(1, 41))
    networks = {name: _solved(name, products) for name in (NETWORKS[:1] if quick else NETWORKS)}
    return {"seed": 0, "products": list(products), "networks": networks}


NETWORKS = ("small5_hgru_crbp", "small9_hgru_crbp", "small14_hgru_crbp")
SETTLING = 8  # times N steps
_SOLVERS: dict[str, Callable[[int], Solver]] = {
    "Neumann": lambda terms: crbp.Neumann(terms=terms),
    "Anderson": lambda terms: crbp.Anderson(terms=terms, tolerance=0.0),
    "GMRES": lambda terms: crbp.GMRES(terms=terms, tolerance=0.0),
}


def _solved(name: str, products: Sequence[int]) -> Numbers:
    """What each solver makes of the backward equation of one network."""
    from crbp.tasks import Generated, load_net
    from crbp.tasks.sampling import stacked

    net: Any = load_net(CHECKOUT / "results" / "pathfinder" / "weights" / f"{name}.safetensors").double()
    images, mask = stacked(Generated(preset=name.split("_")[0]).items("val", 2, 0), 2)
    image, settle = images.double(), SETTLING * net.evolve.steps
    radius = crbp.spectral_radius(
        net(image, steps=settle).run, per_sample=True, generator=torch.Generator().manual_seed(0)
    ).radius.max()
    last, previous, g = _linear_problem(net, image, mask, settle=settle)
    parameters = list(net.cell.parameters())

    def vjp(v: Tensor) -> Tensor:
        return torch.autograd.grad(last, previous, v, retain_graph=True)[0]

    def gradient(u: Tensor) -> Tensor:
        return torch.cat([p.flatten() for p in torch.autograd.grad(last, parameters, u, retain_graph=True)])

    found = crbp.GMRES(terms=200, tolerance=PRECISION).solve(vjp, g)
    if not found.residual < 1e-8:
        raise CrbpError(
            f"the reference solution of {name} ended at a residual of {found.residual:.1e}; its spectral radius is "
            f"{float(radius):.3f}"
        )
    wanted = gradient(found.solution)
    curves = {
        solver: [relative(gradient(make(terms).solve(vjp, g).solution), wanted) for terms in products]
        for solver, make in _SOLVERS.items()
    }
    return {
        "steps": net.evolve.steps,
        "spectral_radius": float(radius),
        "reference": {"products": found.terms, "residual": found.residual},
        "relative_error": curves,
        "one_step_error": relative(gradient(g), wanted),
    }


def _linear_problem(net: PathfinderNet, image: Tensor, mask: Tensor, *, settle: int) -> tuple[Tensor, Tensor, Tensor]:
    """The last step on a graph, the state it starts from, and the gradient ``g`` of the loss at its end."""
    with torch.no_grad():
        drive = net.drive(image)
        state = net.cell.initial_state(drive)
        for _ in range(settle):
            state = net.cell(state, drive)
    previous = state.requires_grad_()
    last = net.cell(previous, drive)
    end = last.detach().requires_grad_()
    (g,) = torch.autograd.grad(focal_loss(net.read(end), mask), end)
    return last, previous, g
