"""The penalties against the explicit Jacobian and its derivatives."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import crbp
from _core_cells import PROBLEMS, Problem, assert_same, contracting, conv_tanh, convgru, flat, hgru, linear
from crbp import (
    BPTT,
    RBP,
    CheckpointedBPTT,
    Neumann,
    OneStep,
    Phantom,
    TruncatedBPTT,
    jacobian_frobenius_penalty,
    lipschitz_penalty,
    residual_penalty,
    spectral_penalty,
)
from crbp._tree import differentiates_in_inference_mode

METHODS = {
    "bptt": BPTT(),
    "truncated": TruncatedBPTT(window=3),
    "checkpointed": CheckpointedBPTT(chunk=2),
    "rbp": RBP(Neumann(terms=5)),
    "onestep": OneStep(),
    "phantom": Phantom(window=3, damping=0.7),
}
REDUCTIONS = {
    "norm": lambda excess: excess.square().sum().sqrt(),
    "mean_square": lambda excess: excess.square().mean(),
    "sum_square": lambda excess: excess.square().sum(),
}

each_problem = pytest.mark.parametrize("build", PROBLEMS.values(), ids=PROBLEMS)
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def _explicit_columns(problem: Problem, state, *, attached: bool = False) -> Tensor:
    """Column sums of the Jacobian at a state; differentiable."""
    return _explicit_jacobian(problem, state, attached=attached).sum(0)


def _explicit_jacobian(problem: Problem, state, *, attached: bool = False) -> Tensor:
    """The Jacobian at a state, row by row of the definition; differentiable."""
    # A view of its own for each leaf: the hidden half of an LSTM's state is made of the other.
    state = tree_map(lambda leaf: leaf.view_as(leaf) if attached else leaf.detach(), state)
    leaves = [leaf if leaf.requires_grad else leaf.requires_grad_() for leaf in tree_leaves(state)]
    outputs = flat(problem.step(state))
    rows = [
        torch.autograd.grad(out, leaves, create_graph=True, materialize_grads=True, retain_graph=True)
        for out in outputs
    ]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def _bound(columns: Tensor) -> float:
    """A bound that some columns exceed and others do not: the middle of the widest gap, far from any kink."""
    values = torch.cat([columns.detach().sort().values.clamp(0, 0.9), torch.zeros(1)]).sort().values
    widest = values.diff().argmax()
    bound = values[widest : widest + 2].mean().item()
    assert (columns > bound).any()
    return bound


@each_reduction
@each_problem
def test_value_is_made_of_the_columns_of_the_explicit_jacobian(build, reduction):
    problem = build()
    columns = problem.jacobian(problem.state_after(4)).sum(0)
    bound = _bound(columns)
    got = lipschitz_penalty(problem.run(RBP(), steps=5), bound=bound, reduction=reduction)
    wanted = REDUCTIONS[reduction]((columns - bound).clamp(min=0))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@each_reduction
@each_problem
def test_gradient_is_that_of_the_explicit_jacobian(build, reduction):
    """Through the last step alone, the state it started from being held."""
    problem = build()
    columns = _explicit_columns(problem, problem.state_after(4))
    bound = _bound(columns)
    wanted = problem.grads(REDUCTIONS[reduction]((columns - bound).clamp(min=0)))
    got = problem.grads(lipschitz_penalty(problem.run(RBP(), steps=5), bound=bound, reduction=reduction))
    # The Jacobian of a linear step does not depend on where it is taken.
    assert (wanted["drive"] != 0).any() == (build is not linear)
    assert_same(got, wanted, 1e-10)


@each_problem
def test_under_bptt_the_gradient_is_the_full_derivative_of_the_unrolled_run(build):
    problem = build()
    state = problem.start
    for _ in range(4):
        state = problem.step(state)
    columns = _explicit_columns(problem, state, attached=True)
    bound = _bound(columns)
    wanted = problem.grads((columns - bound).clamp(min=0).square().sum())
    for method in (BPTT(), CheckpointedBPTT(chunk=2), TruncatedBPTT(window=5)):
        got = problem.grads(lipschitz_penalty(problem.run(method, steps=5), bound=bound, reduction="sum_square"))
        assert_same(got, wanted, 1e-10)


def test_under_bptt_a_leaf_that_carries_no_graph_does_not_cut_the_others():
    """A clock in the state depends on no parameter; the gradient still flows through all the steps."""
    inner = conv_tanh()

    def step(state):
        return {"h": inner.step(state["h"] * (1 + state["clock"])), "clock": state["clock"] / 2}

    start = {"h": inner.start, "clock": torch.tensor([0.5], dtype=torch.float64)}
    problem = Problem(step, start, inner.wanted)
    state = start
    for _ in range(4):
        state = step(state)
    columns = _explicit_columns(problem, state, attached=True)
    bound = _bound(columns)
    wanted = problem.grads((columns - bound).clamp(min=0).square().sum())
    got = problem.grads(lipschitz_penalty(problem.run(BPTT(), steps=5), bound=bound, reduction="sum_square"))
    assert_same(got, wanted, 1e-10)


WEIGHTS = {conv_tanh: ["weight"], hgru: ["inhibition.weight", "mu"], convgru: ["candidate.weight"]}


def _penalty_of_one_step(problem: Problem, penalty: str):
    """One step from a state that is held, so that finite differences see what the gradient claims."""
    start = problem.state_after(3)
    bound = _bound(problem.jacobian(start).sum(0))

    def value(*_: Tensor) -> Tensor:
        run = crbp.Evolve(steps=1, gradient=RBP())(problem.step, start)
        if penalty == "frobenius":
            return jacobian_frobenius_penalty(run, samples=2, generator=torch.Generator().manual_seed(1))
        return lipschitz_penalty(run, bound=bound, reduction=penalty)

    return value


@pytest.mark.parametrize("penalty", [*REDUCTIONS, "frobenius"])
@pytest.mark.parametrize("build", [conv_tanh, hgru])
def test_finite_differences_agree(build, penalty):
    problem = build()
    tensors = [problem.wanted[name] for name in WEIGHTS[build]]
    assert torch.autograd.gradcheck(_penalty_of_one_step(problem, penalty), tensors)


@pytest.mark.parametrize("penalty", [*REDUCTIONS, "frobenius"])
@pytest.mark.parametrize("build", [conv_tanh, convgru])
def test_finite_differences_of_the_gradient_agree(build, penalty):
    """Not for a cell with a normalisation: PyTorch's has no third derivative."""
    problem = build()
    tensors = [problem.wanted[name] for name in WEIGHTS[build]]
    assert torch.autograd.gradgradcheck(_penalty_of_one_step(problem, penalty), tensors, fast_mode=True)


def test_a_torch_that_takes_no_derivatives_in_inference_mode_is_not_believed(monkeypatch):
    monkeypatch.setattr("crbp.evolve.differentiates_in_inference_mode", lambda: False)
    with torch.inference_mode(), pytest.raises(crbp.SettingsError, match=r"use torch.no_grad"):
        lipschitz_penalty(linear().run(RBP(), steps=2))


@each_method
@each_problem
def test_value_without_gradient_is_the_value_with_it(build, method):
    problem = build()
    with_gradient = problem.run(method, steps=5)
    bound = _bound(problem.jacobian(problem.state_after(4)).sum(0))
    seed = torch.Generator()

    def both(run: crbp.Run) -> list[Tensor]:
        return [lipschitz_penalty(run, bound=bound), jacobian_frobenius_penalty(run, generator=seed.manual_seed(3))]

    wanted = both(with_gradient)
    assert all(value.requires_grad and value > 0 for value in wanted)
    for mode in (torch.no_grad, *([torch.inference_mode] if differentiates_in_inference_mode() else [])):
        with mode():
            got = both(problem.run(method, steps=5))
        for value, expected in zip(got, wanted, strict=True):
            assert not value.requires_grad
            torch.testing.assert_close(value.clone(), expected.detach(), rtol=1e-12, atol=1e-12)
    with torch.no_grad():  # of a run that has a graph
        torch.testing.assert_close(both(with_gradient), [value.detach() for value in wanted], rtol=1e-12, atol=1e-12)


@each_method
def test_every_method_trains_with_a_penalty(method):
    """Loss and penalty in one backward pass are the sum of each on its own."""
    problem = hgru()

    def gradient(loss_weight: float, penalty_weight: float) -> dict[str, Tensor]:
        run = problem.run(method, steps=5)
        penalty = lipschitz_penalty(run, bound=0.1) + jacobian_frobenius_penalty(
            run, generator=torch.Generator().manual_seed(0)
        )
        return problem.grads(loss_weight * problem.loss(run.state) + penalty_weight * penalty)

    loss, penalty, both = gradient(1, 0), gradient(0, 10), gradient(1, 10)
    assert_same(both, {name: loss[name] + penalty[name] for name in loss}, 1e-12)
    assert all((penalty[name] != 0).any() for name in ("inhibition.weight", "drive"))


def test_nothing_in_excess_costs_nothing():
    """The norm has no slope at zero; its gradient is zero there, not NaN."""
    problem = linear(0.01)
    run = problem.run(RBP(), steps=5)
    penalty = lipschitz_penalty(run, bound=0.9)
    assert penalty == 0
    assert all((grad == 0).all() for grad in problem.grads(penalty).values())


def test_columns_can_cancel_where_the_frobenius_norm_does_not():
    """``diag(2, −1.5)`` mixed into columns of sum zero: expanding, and invisible to column sums."""
    J = torch.tensor([[2.0, -2.0], [-2.0, 2.0]], dtype=torch.float64)
    run = crbp.Evolve(steps=1)(lambda h: h @ J.T, torch.ones(1, 2).double() * torch.tensor([1.0, 0.5]).double())
    assert lipschitz_penalty(run) == 0
    assert crbp.spectral_radius(run).radius == pytest.approx(4)
    assert jacobian_frobenius_penalty(run, samples=200) > 1


@each_problem
def test_frobenius_estimate_is_the_mean_over_its_own_vectors(build):
    problem = build()
    J = problem.jacobian(problem.state_after(4))
    got = jacobian_frobenius_penalty(problem.run(RBP(), steps=5), samples=3, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    shapes = [leaf.shape for leaf in tree_leaves(problem.start)]
    vectors = [
        torch.cat([torch.randn(shape, dtype=torch.float64, generator=generator).flatten() for shape in shapes])
        for _ in range(3)
    ]
    wanted = sum((J.T @ v).square().sum() for v in vectors) / (3 * len(J))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_frobenius_estimate_is_unbiased():
    """Within five standard errors; ``Var ‖Jᵀv‖² = 2 ‖J Jᵀ‖²_F`` for normal ``v``."""
    problem, samples = linear(), 2000
    J = problem.jacobian(problem.start)
    got = jacobian_frobenius_penalty(
        problem.run(RBP(), steps=2), samples=samples, generator=torch.Generator().manual_seed(0)
    )
    error = math.sqrt(2 * (J @ J.T).square().sum().item() / samples) / len(J)
    assert abs(got.item() - J.square().sum().item() / len(J)) < 5 * error


def test_frobenius_gradient_is_that_of_the_explicit_jacobian_for_its_vectors():
    problem = conv_tanh()
    start = problem.state_after(4)
    v = torch.randn(start.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).flatten()
    J = torch.autograd.functional.jacobian(
        lambda h: problem.step(h.view_as(start)).flatten(), start.flatten(), create_graph=True
    )
    wanted = problem.grads((J.T @ v).square().sum() / len(v))
    penalty = jacobian_frobenius_penalty(problem.run(RBP(), steps=5), generator=torch.Generator().manual_seed(2))
    assert_same(problem.grads(penalty), wanted, 1e-10)


@each_method
def test_one_step_leaves_no_special_case(method):
    problem = hgru()
    columns = _explicit_columns(problem, problem.start)
    wanted = problem.grads((columns - 0.1).clamp(min=0).square().sum())
    got = problem.grads(lipschitz_penalty(problem.run(method, steps=1), bound=0.1, reduction="sum_square"))
    assert_same(got, wanted, 1e-10)


def test_a_frozen_step_has_a_penalty_without_gradient():
    weight = contracting(4, 0.8)
    run = crbp.Evolve(steps=3, gradient=RBP())(lambda h: h @ weight, torch.ones(2, 4).double())
    wanted = 2 * (weight.sum(1) - 0.1).clamp(min=0).square().sum()
    torch.testing.assert_close(lipschitz_penalty(run, bound=0.1, reduction="sum_square").detach(), wanted)


@pytest.mark.parametrize(
    ("penalty", "options", "named"),
    [
        (lipschitz_penalty, {"bound": 1.0}, r"bound must lie in \[0, 1\), not 1.0"),
        (lipschitz_penalty, {"bound": -0.1}, "bound .* not -0.1"),
        (lipschitz_penalty, {"bound": math.nan}, "bound .* not nan"),
        (lipschitz_penalty, {"reduction": "mean"}, "'norm', 'mean_square', 'sum_square', not 'mean'"),
        (jacobian_frobenius_penalty, {"samples": 0}, "samples .* not 0"),
    ],
)
def test_bad_values_are_named(penalty, options, named):
    run = linear().run(BPTT(), steps=2)
    with pytest.raises(ValueError, match=named):
        penalty(run, **options)


def test_a_penalty_after_the_graph_is_freed_raises():
    problem = linear()
    run = problem.run(RBP(), steps=3)
    problem.loss(run.state).backward()
    with pytest.raises(RuntimeError, match="second time"):
        lipschitz_penalty(run)


def _explicit_residual(problem: Problem, before) -> Tensor:
    after = flat(problem.step(before))
    return (after - flat(before)).square().sum() / after.detach().square().sum()


@each_problem
@each_method
def test_residual_penalty_is_the_square_of_the_residual(build, method):
    run = build().run(method, steps=5)
    assert residual_penalty(run).item() == pytest.approx(run.report.residual**2, rel=1e-12)


@each_problem
def test_gradient_of_the_residual_penalty_is_that_of_the_last_step(build):
    problem = build()
    wanted = problem.grads(_explicit_residual(problem, problem.state_after(4)))
    for method in (RBP(), OneStep()):
        assert_same(problem.grads(residual_penalty(problem.run(method, steps=5))), wanted, 1e-10)


@each_problem
def test_under_bptt_the_gradient_of_the_residual_penalty_flows_through_all_steps(build):
    problem = build()
    state = problem.start
    for _ in range(4):
        state = problem.step(state)
    wanted = problem.grads(_explicit_residual(problem, state))
    for method in (BPTT(), CheckpointedBPTT(chunk=2), TruncatedBPTT(window=5)):
        assert_same(problem.grads(residual_penalty(problem.run(method, steps=5))), wanted, 1e-10)


def test_residual_penalty_vanishes_where_nothing_moves() -> None:
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    for start in (torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)):
        run = crbp.Evolve(steps=2, gradient=RBP())(lambda h: weight * h, start)
        penalty = residual_penalty(run)
        assert penalty.item() == 0
        assert torch.autograd.grad(penalty, weight)[0].item() == 0


def test_residual_penalty_settles_an_oscillation_that_column_sums_do_not_see() -> None:
    """Two units that feed on each other's opposite: 1ᵀJ = 0, spectral radius 1.5."""
    swap = torch.tensor([[-0.75, 0.75], [0.75, -0.75]], dtype=torch.float64)
    gain = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([0.6, 0.4], dtype=torch.float64)
    optimiser = torch.optim.SGD([gain], lr=0.01)
    evolve = crbp.Evolve(steps=50, gradient=RBP(), on_divergence="warn")
    first = evolve(lambda h: 0.5 + torch.tanh(swap @ h), start).report.residual
    for _ in range(100):
        run = evolve(lambda h: 0.5 + torch.tanh(gain * (swap @ h)), start)
        assert lipschitz_penalty(run).item() == 0
        penalty = residual_penalty(run)
        optimiser.zero_grad()
        penalty.backward()
        optimiser.step()
    assert 0 < 1.5 * gain.item() < 1
    assert run.report.residual < first / 10


def _explicit_growth(problem: Problem, before, *, bound: float, iterations: int) -> Tensor:
    """The spectral penalty from the dense Jacobian of every sample; differentiable."""
    dense = _explicit_jacobian(problem, before)
    samples = tree_leaves(before)[0].shape[0]
    owner = torch.cat([torch.arange(samples).repeat_interleave(leaf[0].numel()) for leaf in tree_leaves(before)])
    vector = (flat(problem.step(before)) - flat(before)).detach()

    def unit(vector: Tensor) -> Tensor:
        lengths = torch.stack([vector[owner == sample].norm() for sample in range(samples)])
        return vector / lengths[owner]

    vector = unit(vector)
    for _ in range(iterations):
        vector = unit((vector @ dense).detach())
    grown = vector @ dense
    lengths = torch.stack([grown[owner == sample].square().sum().sqrt() for sample in range(samples)])
    return (lengths - bound).relu().square().mean()


@pytest.mark.parametrize("build", [conv_tanh, hgru, convgru, PROBLEMS["convlstm"]])
@pytest.mark.parametrize("iterations", [0, 2])
def test_spectral_penalty_and_its_gradient_are_those_of_the_dense_jacobian(build, iterations):
    problem = build()
    wanted = _explicit_growth(problem, problem.state_after(4), bound=0.0, iterations=iterations)
    gradients = problem.grads(wanted)
    for method in (RBP(), OneStep()):
        got = spectral_penalty(problem.run(method, steps=5), bound=0.0, iterations=iterations)
        assert got.item() == pytest.approx(wanted.item(), rel=1e-10)
        assert_same(problem.grads(got), gradients, 1e-9)


def test_spectral_penalty_is_of_each_sample_alone() -> None:
    weight = torch.tensor([0.5, 1.2, 0.8, 2.0], dtype=torch.float64)[:, None].expand(4, 3)
    start = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    run = crbp.Evolve(steps=3, gradient=OneStep())(lambda h: weight * h, start)
    excess = (weight[:, 0] - 0.95).relu()
    torch.testing.assert_close(spectral_penalty(run), excess.square().mean())
    torch.testing.assert_close(spectral_penalty(run, bound=0.0), weight[:, 0].square().mean())


def test_spectral_penalty_finds_a_mode_of_few_units_that_column_sums_cancel() -> None:
    """One pair of a thousand units feeds on each other's opposite; a random vector hardly has it."""
    dense = 0.5 * torch.eye(1000, dtype=torch.float64)
    dense[:2, :2] = torch.tensor([[-0.75, 0.75], [0.75, -0.75]])
    start = torch.randn(1, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    run = crbp.Evolve(steps=10, gradient=RBP(), on_divergence="warn")(lambda h: h @ dense, start)
    assert lipschitz_penalty(run).item() == 0
    assert spectral_penalty(run).item() == pytest.approx((1.5 - 0.95) ** 2, rel=1e-3)


def test_spectral_penalty_vanishes_where_nothing_moves() -> None:
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    run = crbp.Evolve(steps=2, gradient=RBP())(lambda h: weight * h, torch.ones(3, 2, dtype=torch.float64))
    penalty = spectral_penalty(run)
    assert penalty.item() == 0
    assert torch.autograd.grad(penalty, weight)[0].item() == 0


def test_a_state_without_samples_is_refused() -> None:
    state = (torch.ones(2, 3), torch.ones(3, 2))
    run = crbp.Evolve(steps=2, gradient=RBP())(lambda h: (h[0] / 2, h[1] / 2), state)
    with pytest.raises(crbp.StateError, match=r"\(2, 3\), \(3, 2\)"):
        spectral_penalty(run)
