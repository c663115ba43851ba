"""Step functions of several kinds and the dense linear algebra against which the core is checked."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import crbp

SOLVERS = {
    "neumann": crbp.Neumann(terms=400, tolerance=1e-14),
    "anderson": crbp.Anderson(terms=100, memory=8, tolerance=1e-13),
    "gmres": crbp.GMRES(terms=100, tolerance=1e-13),
}


@dataclass
class Problem:
    """A step, where it starts, and everything a gradient should reach: parameters first, the drive last."""

    step: Callable[[Any], Any]
    start: Any
    wanted: dict[str, Tensor]

    def __post_init__(self) -> None:
        self.targets = [torch.randn_like(leaf) for leaf in tree_leaves(self.start)]

    def loss(self, state: Any) -> Tensor:
        """A quadratic loss that depends on every number of the state."""
        pairs = zip(tree_leaves(state), self.targets, strict=True)
        return torch.stack([(leaf - target).square().sum() for leaf, target in pairs]).sum()

    def grads(self, loss: Tensor, **options: Any) -> dict[str, Tensor]:
        """Gradients of a loss by name; zero where it does not depend on a tensor."""
        found = torch.autograd.grad(loss, list(self.wanted.values()), materialize_grads=True, **options)
        return dict(zip(self.wanted, found, strict=True))

    def run(self, gradient: crbp.GradientMethod, *, steps: int, **options: Any) -> crbp.Run:
        return crbp.Evolve(steps=steps, gradient=gradient, **options)(self.step, self.start)

    def state_after(self, steps: int) -> Any:
        """The state after so many steps, by a plain loop without a graph."""
        state = self.start
        with torch.no_grad():
            for _ in range(steps):
                state = self.step(state)
        return state

    def jacobian(self, state: Any) -> Tensor:
        """The dense Jacobian of the step, (units, units)."""
        return dense_jacobian(self.step, state)

    def pulled_back(self, state: Any, u: Tensor) -> dict[str, Tensor]:
        """``uᵀ ∂f/∂·`` at a state, for the flat vector ``u``."""
        state = tree_map(Tensor.detach, state)
        return self.grads(flat(self.step(state)) @ u)

    def outer_gradient(self, state: Any) -> Tensor:
        """``g = ∂L/∂h``, flat."""
        state = tree_map(lambda leaf: leaf.detach().requires_grad_(), state)
        return torch.cat([g.flatten() for g in torch.autograd.grad(self.loss(state), tree_leaves(state))])


def flat(state: Any) -> Tensor:
    return torch.cat([leaf.flatten() for leaf in tree_leaves(state)])


def dense_jacobian(step: Callable[[Any], Any], state: Any) -> Tensor:
    leaves, spec = tree_flatten(state)
    sizes = [leaf.numel() for leaf in leaves]

    def on_flat(vector: Tensor) -> Tensor:
        parts = [part.view(leaf.shape) for part, leaf in zip(vector.split(sizes), leaves, strict=True)]
        return flat(step(tree_unflatten(parts, spec)))

    return torch.autograd.functional.jacobian(on_flat, flat(state).detach())


def contracting(units: int, norm: float) -> Tensor:
    """A random matrix of the given spectral norm."""
    matrix = torch.randn(units, units, dtype=torch.float64)
    return matrix * (norm / torch.linalg.matrix_norm(matrix, 2))


def _drive(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def linear(norm: float = 0.8) -> Problem:
    weight = contracting(6, norm).requires_grad_()
    drive = _drive(3, 6)
    return Problem(lambda h: h @ weight.T + drive, torch.zeros(3, 6).double(), {"weight": weight, "drive": drive})


def conv_tanh() -> Problem:
    weight = (0.15 * torch.randn(2, 2, 3, 3, dtype=torch.float64)).requires_grad_()
    drive = _drive(2, 2, 4, 4)
    start = torch.zeros(2, 2, 4, 4).double()
    return Problem(
        lambda h: torch.tanh(F.conv2d(h, weight, padding=1) + drive), start, {"weight": weight, "drive": drive}
    )


def _of_cell(cell: nn.Module) -> Problem:
    cell.double()
    drive = _drive(2, 2, 4, 4)
    wanted = {**dict(cell.named_parameters()), "drive": drive}
    return Problem(lambda state: cell(state, drive), cell.initial_state(drive.detach()), wanted)


def hgru() -> Problem:
    return _of_cell(crbp.cells.HGRU(2, 3, horizon=3))


def convlstm() -> Problem:
    cell = crbp.cells.ConvLSTM(2, 3, horizon=3)
    with torch.no_grad():
        cell.gates.weight.mul_(0.5)
    return _of_cell(cell)


def convgru() -> Problem:
    return _of_cell(crbp.cells.ConvGRU(2, 3, horizon=3))


def nested() -> Problem:
    """A state that is a dictionary holding a tuple, its leaves of different shapes."""
    mix = contracting(4, 0.5).requires_grad_()
    drive = _drive(4)

    def step(state: Any) -> Any:
        slow, (fast,) = state["slow"], state["fast"]
        return {"slow": 0.5 * slow + 0.1 * fast.mean(0), "fast": (torch.tanh(fast @ mix + slow + drive),)}

    start = {"slow": torch.zeros(4).double(), "fast": (torch.zeros(3, 4).double(),)}
    return Problem(step, start, {"mix": mix, "drive": drive})


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "linear": linear,
    "conv_tanh": conv_tanh,
    "hgru": hgru,
    "convlstm": convlstm,
    "convgru": convgru,
    "nested": nested,
}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Compare gradients by name, relative to the largest entry of all."""
    scale = max(float(tensor.abs().max()) for tensor in wanted.values())
    assert scale > 0
    for name, tensor in wanted.items():
        worst = float((got[name] - tensor).abs().max()) / scale
        assert worst <= tolerance, f"{name}: off by {worst:.2e} of the largest gradient"
