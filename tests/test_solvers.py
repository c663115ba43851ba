"""Every solver against dense linear algebra."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from _core_cells import SOLVERS, contracting
from crbp import GMRES, Anderson, Neumann, StopReason

UNITS = 8


def _system(norm: float = 0.9) -> tuple[Tensor, Tensor, Tensor]:
    """``J``, ``g`` and the exact solution of ``(I − Jᵀ) u = g``."""
    J = contracting(UNITS, norm)
    g = torch.randn(UNITS, dtype=torch.float64)
    return J, g, torch.linalg.solve(torch.eye(UNITS).double() - J.T, g)


def _residual(J: Tensor, g: Tensor, u: Tensor) -> float:
    return float(torch.linalg.vector_norm(g - u + J.T @ u) / torch.linalg.vector_norm(g))


class Counted:
    """``v ↦ Jᵀ v`` that counts its calls."""

    def __init__(self, J: Tensor) -> None:
        self.J, self.calls = J, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.calls += 1
        return (self.J.T @ v.flatten()).view(v.shape)


@pytest.mark.parametrize("name", SOLVERS)
def test_converged_solver_equals_the_dense_solution(name):
    J, g, exact = _system()
    got = SOLVERS[name].solve(lambda v: J.T @ v, g)
    torch.testing.assert_close(got.solution, exact, rtol=1e-10, atol=1e-10)
    assert got.stop is StopReason.CONVERGED


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_computes_in_full_precision_under_autocast(name):
    J, g, exact = (tensor.float() for tensor in _system())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = SOLVERS[name].solve(lambda v: (J.T * v).sum(1), g)  # which autocast leaves alone
    torch.testing.assert_close(got.solution, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("terms", [16, 17, 60])
def test_a_basis_that_grows_is_the_same(terms):
    J, g = contracting(40, 0.9), torch.randn(40, dtype=torch.float64)
    got = GMRES(terms=terms, tolerance=1e-13).solve(lambda v: J.T @ v, g)
    spanned = torch.stack([torch.linalg.matrix_power(J.T, k) @ g for k in range(min(terms, 40))], dim=1)
    best = torch.linalg.lstsq(spanned - J.T @ spanned, g[:, None], driver="gelsd").solution[:, 0]
    assert _residual(J, g, got.solution) <= 1.01 * _residual(J, g, spanned @ best) + 1e-12


@pytest.mark.parametrize("terms", [0, 1, 5])
def test_truncated_neumann_misses_exactly_its_tail(terms):
    J, g, exact = _system()
    got = Neumann(terms=terms).solve(lambda v: J.T @ v, g)
    tail = torch.linalg.matrix_power(J.T, terms + 1) @ exact
    torch.testing.assert_close(got.solution, exact - tail, rtol=1e-12, atol=1e-12)
    assert (got.terms, got.stop) == (terms, StopReason.BUDGET)


def test_neumann_tolerance_stops_at_the_first_small_term():
    J, g, _ = _system(0.5)
    vjp = Counted(J)
    got = Neumann(terms=100, tolerance=1e-6).solve(vjp, g)
    sizes = [float((torch.linalg.matrix_power(J.T, k) @ g).norm() / g.norm()) for k in range(100)]
    first = next(k for k, size in enumerate(sizes) if size <= 1e-6)
    assert got.terms == vjp.calls == first
    assert got.stop is StopReason.CONVERGED
    assert got.residual == pytest.approx(sizes[first], rel=1e-9)


@pytest.mark.parametrize("terms", [1, 4])
def test_reported_residuals_are_true(terms):
    J, g, _ = _system()
    for solver in (Anderson(terms=terms, tolerance=0), GMRES(terms=terms, tolerance=0)):
        got = solver.solve(lambda v: J.T @ v, g)
        assert got.residual == pytest.approx(_residual(J, g, got.solution), rel=1e-9)
    got = Neumann(terms=terms).solve(lambda v: J.T @ v, g)
    without_last = Neumann(terms=terms - 1).solve(lambda v: J.T @ v, g).solution
    assert got.residual == pytest.approx(_residual(J, g, without_last), rel=1e-9)


@pytest.mark.parametrize("solver", [Neumann(terms=7), Anderson(terms=7, tolerance=0), GMRES(terms=7, tolerance=0)])
def test_budget_is_spent_and_counted(solver):
    J, g, _ = _system()
    vjp = Counted(J)
    got = solver.solve(vjp, g)
    assert got.terms == vjp.calls == 7
    assert got.stop is StopReason.BUDGET


@pytest.mark.parametrize("terms", [0, 1, 6])
def test_anderson_that_remembers_one_iterate_is_the_neumann_series(terms):
    J, g, _ = _system()
    plain = Anderson(terms=terms + 1, memory=1, tolerance=0).solve(lambda v: J.T @ v, g)
    series = Neumann(terms=terms).solve(lambda v: J.T @ v, g)
    torch.testing.assert_close(plain.solution, series.solution, rtol=1e-12, atol=1e-12)


def test_gmres_is_the_best_of_its_krylov_space():
    J, g, _ = _system()
    system = torch.eye(UNITS).double() - J.T
    for terms in (1, 3, 5):
        space = torch.stack([torch.linalg.matrix_power(system, k) @ g for k in range(terms)], dim=1)
        weights = torch.linalg.lstsq(system @ space, g[:, None], driver="gelsd").solution[:, 0]
        got = GMRES(terms=terms, tolerance=0).solve(lambda v: J.T @ v, g)
        torch.testing.assert_close(got.solution, space @ weights, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["anderson", "gmres"])
def test_full_memory_solves_a_map_that_expands(name):
    """Where the series grows without bound, the equation still has a solution, found in as many terms as units."""
    J, g, exact = _system(3.0)
    solver = Anderson(terms=4 * UNITS, memory=UNITS + 1, tolerance=1e-10) if name == "anderson" else GMRES(terms=UNITS)
    got = solver.solve(lambda v: J.T @ v, g)
    torch.testing.assert_close(got.solution, exact, rtol=1e-6, atol=1e-6)
    assert got.stop is StopReason.CONVERGED


def test_anderson_survives_iterates_that_depend_on_each_other():
    J = 0.5 * torch.eye(UNITS).double()
    g = torch.randn(UNITS, dtype=torch.float64)
    got = Anderson(terms=50, memory=10, tolerance=0).solve(lambda v: J.T @ v, g)
    torch.testing.assert_close(got.solution, 2 * g, rtol=1e-12, atol=1e-12)


def test_gmres_ends_when_the_space_is_exhausted():
    J, _, _ = _system()
    symmetric = (J + J.T) / 2
    values, vectors = torch.linalg.eigh(symmetric)
    got = GMRES(terms=UNITS, tolerance=0).solve(lambda v: symmetric @ v, vectors[:, 0])
    torch.testing.assert_close(got.solution, vectors[:, 0] / (1 - values[0]), rtol=1e-10, atol=1e-10)
    assert (got.terms, got.stop) == (1, StopReason.CONVERGED)


def _expanding() -> tuple[Tensor, Tensor]:
    """A series whose terms shrink at first, by what dies out, and then grow."""
    J = torch.diag(torch.tensor([1.5, -1.4, 0.5], dtype=torch.float64))
    return J, torch.tensor([0.01, 0.01, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("solver", [Neumann(terms=9), Anderson(terms=9, memory=1, tolerance=0)])
def test_best_iterate_is_the_one_of_smallest_true_residual(solver):
    J, g = _expanding()
    got = solver.solve(lambda v: J.T @ v, g)
    sums = [Neumann(terms=k).solve(lambda v: J.T @ v, g).solution for k in range(9)]
    residuals = [_residual(J, g, u) for u in sums]
    best = residuals.index(min(residuals))
    assert 0 < best < 8
    torch.testing.assert_close(got.best, sums[best], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e6, 1e-6, 2.0**20, 2.0**-20])
@pytest.mark.parametrize("solver", [*SOLVERS.values(), Neumann(terms=6), Neumann(terms=50, tolerance=1e-3)])
def test_scaling_the_right_side_scales_the_solution_and_nothing_else(solver, scale):
    J, g, _ = _system()
    one, other = solver.solve(lambda v: J.T @ v, g), solver.solve(lambda v: J.T @ v, scale * g)
    assert (one.terms, one.stop) == (other.terms, other.stop)
    if math.log2(scale).is_integer():
        assert torch.equal(other.solution, scale * one.solution)
        assert other.residual == one.residual
    else:
        torch.testing.assert_close(other.solution / scale, one.solution, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [2.0**80, 2.0**-80])
@pytest.mark.parametrize("solver", [Neumann(terms=6), Anderson(terms=6), GMRES(terms=6)])
def test_float32_gradients_whose_squares_leave_the_range_are_solved_alike(solver, scale):
    J, g = (tensor.float() for tensor in _system()[:2])
    one, other = solver.solve(lambda v: J.T @ v, g), solver.solve(lambda v: J.T @ v, scale * g)
    assert (one.terms, one.stop) == (other.terms, other.stop)
    torch.testing.assert_close(other.solution / scale, one.solution)


@pytest.mark.parametrize("name", SOLVERS)
def test_zero_gradient_costs_nothing(name):
    vjp = Counted(torch.eye(3))
    got = SOLVERS[name].solve(vjp, torch.zeros(3))
    assert torch.equal(got.solution, torch.zeros(3))
    assert (got.terms, vjp.calls, got.residual, got.stop) == (0, 0, 0.0, StopReason.CONVERGED)


@pytest.mark.parametrize("solver", [Neumann(terms=5), Anderson(terms=5), GMRES(terms=5)])
def test_products_whose_squares_overflow_end_as_not_finite(solver):
    got = solver.solve(lambda v: 1e25 * v * torch.arange(UNITS), torch.randn(UNITS))
    assert got.stop is StopReason.NOT_FINITE
    assert bool(got.best.isfinite().all())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", SOLVERS)
def test_gradient_that_is_not_finite_is_handed_on(name, bad):
    g = torch.tensor([1.0, bad, 3.0])
    got = SOLVERS[name].solve(lambda v: v, g)
    torch.testing.assert_close(got.solution, g, equal_nan=True)
    assert got.stop is StopReason.NOT_FINITE


@pytest.mark.parametrize("solver", [Neumann(terms=9), Anderson(terms=9), GMRES(terms=9)])
def test_iterates_that_leave_the_finite_numbers_are_reported_and_the_best_kept(solver):
    J, g, _ = _system()
    vjp = Counted(J)
    got = solver.solve(lambda v: vjp(v) if vjp.calls < 3 else v * math.nan, g)
    assert got.stop is StopReason.NOT_FINITE
    assert got.terms == 4
    assert torch.isfinite(got.best).all()
    assert _residual(J, g, got.best) < 1


@pytest.mark.parametrize("name", SOLVERS)
def test_shape_of_the_gradient_is_kept(name):
    J = contracting(12, 0.5)
    g = torch.randn(2, 3, 2, dtype=torch.float64)
    got = SOLVERS[name].solve(Counted(J), g)
    exact = torch.linalg.solve(torch.eye(12).double() - J.T, g.flatten()).view(2, 3, 2)
    torch.testing.assert_close(got.solution, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SOLVERS)
def test_bfloat16_gradients_keep_their_dtype(name):
    J = contracting(6, 0.3).bfloat16()
    got = SOLVERS[name].solve(lambda v: J.T @ v, torch.ones(6).bfloat16())
    assert got.solution.dtype == torch.bfloat16
    assert torch.isfinite(got.solution).all()


@pytest.mark.parametrize(
    ("solver", "options", "named"),
    [
        (Neumann, {"terms": -1}, "terms .* at least 0, not -1"),
        (Neumann, {"terms": True}, "terms .* not True"),
        (Neumann, {"terms": 2.0}, "terms .* not 2.0"),
        (Neumann, {"tolerance": -1e-3}, "tolerance .* not -0.001"),
        (Neumann, {"tolerance": math.nan}, "tolerance .* not nan"),
        (Anderson, {"terms": 0}, "terms .* at least 1, not 0"),
        (Anderson, {"memory": 0}, "memory .* at least 1, not 0"),
        (Anderson, {"tolerance": math.inf}, "tolerance .* not inf"),
        (GMRES, {"terms": 0}, "terms .* at least 1, not 0"),
        (GMRES, {"tolerance": -1.0}, "tolerance .* not -1.0"),
    ],
)
def test_bad_values_are_named(solver, options, named):
    with pytest.raises(ValueError, match=named):
        solver(**options)


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_are_values(name):
    solver = SOLVERS[name]
    for twin in (copy.deepcopy(solver), pickle.loads(pickle.dumps(solver))):
        assert twin == solver
        assert hash(twin) == hash(solver)
