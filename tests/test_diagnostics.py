"""Residuals, spectral radii and memory against their definitions."""

import itertools
import math
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import crbp
from _core_cells import PROBLEMS, contracting, flat, hgru, linear
from crbp import BPTT, RBP, CheckpointedBPTT, Evolve, OneStep, Phantom, TruncatedBPTT, activation_memory
from crbp._tree import differentiates_in_inference_mode

each_problem = pytest.mark.parametrize("build", PROBLEMS.values(), ids=PROBLEMS)


@each_problem
def test_residual_curve_is_its_definition(build):
    problem = build()
    curve = crbp.residual_curve(problem.step, problem.start, steps=6)
    states = [flat(problem.state_after(t)) for t in range(7)]
    wanted = [float((new - old).norm() / new.norm()) for old, new in itertools.pairwise(states)]
    torch.testing.assert_close(curve, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)
    assert not curve.requires_grad


def test_residual_of_states_that_stand_still_or_vanish():
    zeros = torch.zeros(3)
    assert crbp.residual_curve(lambda h: h, zeros, steps=2).tolist() == [0.0, 0.0]
    assert crbp.residual_curve(lambda h: 0 * h, torch.ones(3), steps=2).tolist() == [1.0, 0.0]


@each_problem
def test_residual_of_a_run_is_the_last_of_the_curve(build):
    problem = build()
    curve = crbp.residual_curve(problem.step, problem.start, steps=6)
    for method in (BPTT(), RBP(), CheckpointedBPTT(chunk=2), Phantom(window=1)):
        assert problem.run(method, steps=6).report.residual == pytest.approx(float(curve[-1]), rel=1e-12)


# Spectral radius


def _with_eigenvalues(*blocks: Tensor) -> Tensor:
    """A matrix that is not normal, with the eigenvalues of the blocks."""
    D = torch.block_diag(*blocks)
    S = torch.eye(len(D), dtype=torch.float64) + contracting(len(D), 0.5)
    return S @ D @ torch.linalg.inv(S)


def _turn(radius: float, degrees: float) -> Tensor:
    angle = math.radians(degrees)
    turn = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    return radius * torch.tensor(turn, dtype=torch.float64)


def _values(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


MAPS = {
    "real": (lambda: _with_eigenvalues(_values(0.9, 0.5, -0.4, 0.1)), 0.9),
    "negative": (lambda: _with_eigenvalues(_values(-1.3, 0.8, 0.2)), 1.3),
    "negative in a plane": (lambda: _with_eigenvalues(_values(-0.9, 0.5)), 0.9),
    "complex pair": (lambda: _with_eigenvalues(_turn(0.8, 40), _values(0.3, -0.2)), 0.8),
    "quarter turn": (lambda: _with_eigenvalues(_turn(1.2, 90), _values(0.3)), 1.2),
    "both signs": (lambda: _with_eigenvalues(_values(0.7, -0.7, 0.1)), 0.7),
    "identity": (lambda: torch.eye(4).double(), 1.0),
    "single": (lambda: torch.full((1, 1), -0.25).double(), 0.25),
    "nilpotent": (lambda: torch.diag(torch.ones(4), 1).double(), 0.0),
    "zero": (lambda: torch.zeros(4, 4).double(), 0.0),
}


@pytest.mark.parametrize("name", MAPS)
def test_spectral_radius_of_a_linear_map(name):
    matrix, radius = MAPS[name][0](), MAPS[name][1]
    run = Evolve(steps=1)(lambda h: h @ matrix.T, torch.randn(1, len(matrix)).double())
    got = crbp.spectral_radius(run, iterations=1000, tolerance=1e-12)
    assert got.radius.shape == got.converged.shape == got.change.shape == ()
    assert float(got.radius) == pytest.approx(radius, abs=1e-8)
    assert got.converged


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_that_ignores_its_state_has_no_radius_no_penalty_and_a_one_step_gradient(frozen):
    drive = torch.randn(2, 3, dtype=torch.float64, requires_grad=not frozen)
    run = Evolve(steps=3, gradient=RBP())(lambda h: drive.tanh(), torch.ones(2, 3).double())
    assert crbp.spectral_radius(run).radius == 0
    assert crbp.lipschitz_penalty(run, bound=0.0) == 0
    assert crbp.jacobian_frobenius_penalty(run) == 0
    assert run.state.requires_grad != frozen
    if not frozen:
        (got,) = torch.autograd.grad(run.state.sum(), drive)
        torch.testing.assert_close(got, 1 - drive.tanh().square(), rtol=1e-12, atol=1e-12)


@each_problem
def test_spectral_radius_is_taken_at_the_final_state(build):
    problem = build()
    run = problem.run(RBP(), steps=4)
    wanted = torch.linalg.eigvals(problem.jacobian(problem.state_after(4))).abs().max()
    got = crbp.spectral_radius(run, iterations=1500, tolerance=1e-13)
    assert float(got.radius) == pytest.approx(float(wanted), rel=1e-5)


def test_spectral_radius_per_sample_is_that_of_separate_runs():
    weights = torch.stack([_with_eigenvalues(_values(1, -0.6, 0.5, 0.1, 0) * r) for r in (0.3, 0.9, 1.7)])
    start = torch.randn(3, 5).double()
    run = Evolve(steps=1)(lambda h: torch.einsum("bij,bj->bi", weights, h), start)
    got = crbp.spectral_radius(run, per_sample=True, iterations=1500, tolerance=1e-13)
    assert got.radius.shape == got.converged.shape == got.change.shape == (3,)
    for i, weight in enumerate(weights):
        alone = Evolve(steps=1)(lambda h, weight=weight: h @ weight.T, start[i : i + 1])
        wanted = crbp.spectral_radius(alone, iterations=1500, tolerance=1e-13)
        assert float(got.radius[i]) == pytest.approx(float(wanted.radius), rel=1e-6)
    whole = crbp.spectral_radius(run, iterations=1500, tolerance=1e-13)
    assert float(whole.radius) == pytest.approx(float(got.radius.max()), rel=1e-6)


def test_per_sample_handles_a_state_of_several_tensors():
    problem = PROBLEMS["convlstm"]()
    run = problem.run(BPTT(), steps=4)
    got = crbp.spectral_radius(run, per_sample=True, iterations=1500, tolerance=1e-13)
    wanted = torch.linalg.eigvals(problem.jacobian(problem.state_after(4))).abs().max()
    assert got.radius.shape == (2,)
    assert float(got.radius.max()) == pytest.approx(float(wanted), rel=1e-5)


def test_a_budget_too_small_is_reported():
    matrix = _with_eigenvalues(_values(0.9, 0.89, -0.88, 0.87, 0.86))
    run = Evolve(steps=1)(lambda h: h @ matrix.T, torch.randn(1, 5).double())
    hasty = crbp.spectral_radius(run, iterations=4, tolerance=1e-9)
    assert not hasty.converged
    assert hasty.change > 1e-9
    assert hasty.iterations == 4
    patient = crbp.spectral_radius(run, iterations=5000, tolerance=1e-9)
    assert patient.converged
    assert patient.iterations < 5000


def test_spectral_radius_does_not_depend_on_how_the_run_was_recorded():
    problem = hgru()

    def radius(run: crbp.Run) -> float:
        return float(crbp.spectral_radius(run, generator=torch.Generator().manual_seed(1)).radius)

    run = problem.run(RBP(), steps=5)
    wanted = radius(run)
    problem.loss(run.state).backward()
    assert radius(run) == wanted
    assert radius(problem.run(BPTT(), steps=5)) == wanted
    for mode in (torch.no_grad, *([torch.inference_mode] if differentiates_in_inference_mode() else [])):
        with mode():
            assert radius(problem.run(RBP(), steps=5)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"iterations": 1}, "iterations .* at least 2, not 1"),
        ({"iterations": 5.0}, "iterations .* not 5.0"),
        ({"tolerance": -1.0}, "tolerance .* not -1.0"),
    ],
)
def test_bad_values_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        crbp.spectral_radius(linear().run(BPTT(), steps=1), **options)
    with pytest.raises(ValueError, match=r"steps .* not 0"):
        crbp.residual_curve(linear().step, linear().start, steps=0)


# Activation memory


def test_activation_memory_counts_each_storage_once_and_leaves_out_what_it_is_told():
    x = torch.randn(1000, requires_grad=True)
    with activation_memory() as memory:
        y = x.square() + x.pow(3)  # saves x twice
        y.exp()  # saves its result
    assert memory.bytes == 4000 + 4000
    with activation_memory(exclude=[x]) as memory:
        x.square()
    assert memory.bytes == 0
    with torch.no_grad(), activation_memory() as memory:
        x.square()
    assert memory.bytes == 0


def test_a_graph_that_was_measured_is_freed_without_a_backward_pass():
    class Exp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = x.exp()
            ctx.save_for_backward(y)
            graphs.add(ctx)
            return y

        @staticmethod
        def backward(ctx, gradient):
            return gradient * ctx.saved_tensors[0]

    graphs = weakref.WeakSet()
    with activation_memory():
        Exp.apply(torch.randn(10, requires_grad=True))
    assert not graphs


def _bytes(method: crbp.GradientMethod, steps: int, *, penalty: bool = False) -> int:
    problem = hgru()
    with activation_memory(exclude=[*problem.wanted.values(), *tree_leaves(problem.start)]) as memory:
        run = problem.run(method, steps=steps)
        if penalty:
            crbp.lipschitz_penalty(run, bound=0.1)
    return memory.bytes


@pytest.mark.parametrize("penalty", [False, True], ids=["plain", "penalty"])
@pytest.mark.parametrize(
    "method", [RBP(), OneStep(), TruncatedBPTT(window=3), Phantom(window=3)], ids=lambda method: type(method).__name__
)
def test_memory_is_flat_in_the_number_of_steps(method, penalty):
    assert _bytes(method, 400, penalty=penalty) == _bytes(method, 10, penalty=penalty) > 0


def test_memory_of_rbp_is_that_of_one_step_and_the_state():
    """What RBP saves beyond the one step is that step's outcome: one state, already there."""
    state = hgru().start
    assert _bytes(RBP(), 10) - _bytes(OneStep(), 10) <= state.untyped_storage().nbytes()


@pytest.mark.parametrize("penalty", [False, True], ids=["plain", "penalty"])
def test_memory_of_bptt_grows_by_the_same_amount_with_each_step(penalty):
    ten, twenty, thirty = (_bytes(BPTT(), steps, penalty=penalty) for steps in (10, 20, 30))
    assert thirty - twenty == twenty - ten > 0


def test_memory_of_checkpoints_lies_between_and_grows_with_their_number():
    assert _bytes(OneStep(), 37) < _bytes(CheckpointedBPTT(), 37) < _bytes(BPTT(), 37) / 3
    four, eight, twelve = (_bytes(CheckpointedBPTT(chunk=6), 6 * chunks + 1) for chunks in (4, 8, 12))
    assert twelve - eight == eight - four == 4 * hgru().start.untyped_storage().nbytes()
