"""Identities of the core for random contracting maps: any nesting, shape, dtype and batch, found by hypothesis."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import crbp
from _core_cells import SOLVERS, contracting

settings.register_profile("core", max_examples=25, deadline=None, derandomize=True, database=None)
few = settings(settings.get_profile("core"))

shapes = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4)
seeds = st.integers(0, 2**31)
norms = st.floats(0.1, 0.8)


def nested(leaves: list[Any], depth: int) -> Any:
    """The leaves in tuples, lists and dicts, in their order."""
    if len(leaves) == 1:
        return leaves[0]
    middle = len(leaves) // 2
    parts = nested(leaves[:middle], depth + 1), nested(leaves[middle:], depth + 1)
    return [parts, list(parts), {"a": parts[0], "b": parts[1]}][depth % 3]


class Map:
    """``h ↦ tanh(A h + b)`` on the leaves laid end to end, with ``‖A‖₂`` below 1: a contraction of any state."""

    def __init__(self, seed: int, units: int, norm: float, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(seed)
        self.weight = contracting(units, norm).to(dtype).requires_grad_()
        self.bias = torch.randn(units, dtype=dtype, requires_grad=True)
        self.wanted = [self.weight, self.bias]

    def flat(self, h: Tensor) -> Tensor:
        return torch.tanh(self.weight @ h + self.bias)

    def on(self, state: Any) -> Any:
        leaves = tree_leaves(state)
        new = self.flat(torch.cat([leaf.reshape(-1) for leaf in leaves]))
        parts = iter(torch.split(new, [leaf.numel() for leaf in leaves]))
        return tree_map(lambda leaf: next(parts).view(leaf.shape), state)


def loss(state: Any) -> Tensor:
    return sum(((k + 1) * leaf).sin().sum() for k, leaf in enumerate(tree_leaves(state)))  # type: ignore[return-value]


def start(sizes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.zeros(size, dtype=dtype) for size in sizes]


def units_of(sizes: list[tuple[int, ...]]) -> int:
    return sum(leaf.numel() for leaf in start(sizes))


def methods(steps: int) -> dict[str, crbp.GradientMethod]:
    return {
        "bptt": crbp.BPTT(),
        "checkpointed": crbp.CheckpointedBPTT(),
        "truncated": crbp.TruncatedBPTT(window=max(1, steps // 2)),
        "rbp": crbp.RBP(SOLVERS["gmres"]),
        "phantom": crbp.Phantom(window=3, damping=0.6),
    }


@settings(few, max_examples=8)
@given(seeds, shapes, norms, st.integers(1, 6))
def test_any_nesting_gives_what_the_flat_state_gives(seed: int, sizes: Any, norm: float, steps: int) -> None:
    found = Map(seed, units_of(sizes), norm)
    for method in methods(steps).values():
        results = []
        for state in (start(sizes), nested(start(sizes), 0), {"x": nested(start(sizes), 1)}):
            run = crbp.Evolve(steps=steps, gradient=method)(found.on, state)
            penalty = crbp.lipschitz_penalty(run, bound=0.1, reduction="sum_square")
            grads = torch.autograd.grad(loss(run.state) + penalty, found.wanted, materialize_grads=True)
            results.append([*tree_leaves(run.state), penalty, *grads])
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-10)


@few
@given(seeds, st.integers(1, 8), norms, st.sampled_from(sorted(SOLVERS)))
def test_converged_rbp_is_the_implicit_gradient_is_long_bptt(seed: int, units: int, norm: float, solver: str) -> None:
    found = Map(seed, units, norm)
    h0 = torch.zeros(units, dtype=torch.float64)
    grads = {}
    for name, method in {"rbp": crbp.RBP(SOLVERS[solver]), "bptt": crbp.BPTT()}.items():
        run = crbp.Evolve(steps=250, gradient=method)(found.flat, h0)
        grads[name] = torch.autograd.grad(loss(run.state), found.wanted)
    fixed = run.state.detach().requires_grad_()
    J = torch.autograd.functional.jacobian(found.flat, fixed)
    (g,) = torch.autograd.grad(loss(fixed), fixed)
    u = torch.linalg.solve(torch.eye(units, dtype=torch.float64) - J.T, g)
    implicit = torch.autograd.grad(found.flat(fixed.detach()), found.wanted, u)
    for name in ("rbp", "bptt"):
        torch.testing.assert_close(
            grads[name], implicit, rtol=1e-7, atol=1e-9, msg=lambda text, of=name: f"{of}: {text}"
        )


@few
@given(seeds, st.integers(1, 10), norms, st.integers(0, 12))
def test_a_neumann_series_misses_exactly_its_tail(seed: int, units: int, norm: float, terms: int) -> None:
    torch.manual_seed(seed)
    J, g = contracting(units, norm), torch.randn(units, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(units, dtype=torch.float64) - J.T, g)
    got = crbp.Neumann(terms=terms).solve(lambda v: J.T @ v, g)
    tail = torch.linalg.matrix_power(J.T, terms + 1) @ exact
    torch.testing.assert_close(got.solution, exact - tail, rtol=1e-10, atol=1e-12)
    assert float((exact - got.solution).norm()) <= norm ** (terms + 1) * float(exact.norm()) * (1 + 1e-9) + 1e-12


@few
@given(
    seeds,
    st.integers(1, 6),
    norms,
    st.floats(0.0, 0.99),
    st.sampled_from(["norm", "mean_square", "sum_square"]),
    st.integers(1, 4),
)
def test_the_penalty_is_its_formula_on_the_dense_jacobian(
    seed: int, units: int, norm: float, bound: float, reduction: Any, steps: int
) -> None:
    found = Map(seed, units, norm)
    found.weight = (found.weight.detach() * 4).requires_grad_()  # beyond the bound
    run = crbp.Evolve(steps=steps)(found.flat, torch.zeros(units, dtype=torch.float64))
    (before,), _ = run.last_step()
    J = torch.autograd.functional.jacobian(found.flat, before.detach())
    excess = (J.sum(0) - bound).relu()
    wanted = {"norm": excess.norm(), "sum_square": excess.square().sum(), "mean_square": excess.square().mean()}
    got = crbp.lipschitz_penalty(run, bound=bound, reduction=reduction)
    torch.testing.assert_close(got, wanted[reduction], rtol=1e-10, atol=1e-12)


@few
@given(seeds, st.integers(1, 4), st.integers(2, 5), st.sampled_from(["bptt", "checkpointed", "truncated", "phantom"]))
def test_images_of_a_batch_do_not_know_of_each_other(seed: int, channels: int, batch: int, name: str) -> None:
    torch.manual_seed(seed)
    cell = crbp.cells.HGRU(channels=channels, kernel_size=3, horizon=4).double().eval()
    drive = torch.randn(batch, channels, 5, 5, dtype=torch.float64)
    evolve = crbp.Evolve(steps=4, gradient=methods(4)[name])

    def gradient(some: Tensor) -> tuple[Tensor, Tensor]:
        some = some.clone().requires_grad_()
        state = evolve(lambda h: cell(h, some), torch.zeros_like(some)).state
        return state.detach(), torch.autograd.grad(state.sin().sum(), some)[0]

    together = gradient(drive)
    for k in range(batch):
        alone = gradient(drive[k : k + 1])
        torch.testing.assert_close([each[k : k + 1] for each in together], list(alone), rtol=1e-9, atol=1e-11)


@few
@given(seeds, shapes, st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), st.integers(1, 5))
def test_a_run_keeps_dtype_shape_and_the_values_of_a_plain_loop(seed: int, sizes: Any, dtype: Any, steps: int) -> None:
    found = Map(seed, units_of(sizes), 0.5, dtype)
    plain = nested(start(sizes, dtype), 0)
    for _ in range(steps):
        plain = found.on(plain)
    for name, method in methods(steps).items():
        run = crbp.Evolve(steps=steps, gradient=method)(found.on, nested(start(sizes, dtype), 0))
        leaves, wanted = tree_leaves(run.state), tree_leaves(plain)
        assert [(leaf.shape, leaf.dtype) for leaf in leaves] == [(leaf.shape, leaf.dtype) for leaf in wanted]
        if name != "phantom":  # which ends on damped steps
            assert all(torch.equal(leaf, other) for leaf, other in zip(leaves, wanted, strict=True))
