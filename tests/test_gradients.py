"""Every gradient method against explicit linear algebra, plain loops, and each other."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import crbp
from _core_cells import PROBLEMS, SOLVERS, Problem, assert_same, contracting, conv_tanh, flat, hgru, linear
from crbp import (
    BPTT,
    GMRES,
    RBP,
    Anderson,
    CheckpointedBPTT,
    DivergenceError,
    DivergenceWarning,
    Neumann,
    OneStep,
    Phantom,
    StopReason,
    TruncatedBPTT,
)
from crbp.gradients import advance

METHODS = {
    "bptt": BPTT(),
    "truncated": TruncatedBPTT(window=3),
    "checkpointed": CheckpointedBPTT(chunk=2),
    "rbp": RBP(Neumann(terms=15)),
    "onestep": OneStep(),
    "phantom": Phantom(window=3, damping=0.7),
}

each_problem = pytest.mark.parametrize("build", PROBLEMS.values(), ids=PROBLEMS)
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def _gradient(problem: Problem, method: crbp.GradientMethod, *, steps: int) -> dict[str, Tensor]:
    return problem.grads(problem.loss(problem.run(method, steps=steps).state))


# Recurrent back-propagation


@each_solver
@each_problem
def test_rbp_is_the_implicit_gradient_of_the_last_step(build, solver):
    """Exact at any N, settled or not: ``gᵀ (I − J)⁻¹ ∂f/∂θ`` with J where the last step started."""
    problem = build()
    before = problem.state_after(5)
    J = problem.jacobian(before)
    u = torch.linalg.solve(torch.eye(len(J)).double() - J.T, problem.outer_gradient(problem.step(before)))
    run = problem.run(RBP(solver), steps=6)
    got = problem.grads(problem.loss(run.state))
    assert_same(got, problem.pulled_back(before, u), 1e-10)
    assert run.report.backward.stop is StopReason.CONVERGED


@each_solver
@each_problem
def test_rbp_at_the_steady_state_is_long_bptt(build, solver):
    problem = build()
    assert_same(_gradient(problem, RBP(solver), steps=300), _gradient(problem, BPTT(), steps=300), 1e-8)


@pytest.mark.parametrize("terms", [0, 1, 5])
@each_problem
def test_rbp_with_a_truncated_series_is_the_explicit_series(build, terms):
    problem = build()
    before = problem.state_after(5)
    J, g = problem.jacobian(before), problem.outer_gradient(problem.step(before))
    u = sum(torch.linalg.matrix_power(J.T, k) @ g for k in range(terms + 1))
    run = problem.run(RBP(Neumann(terms=terms)), steps=6)
    assert_same(problem.grads(problem.loss(run.state)), problem.pulled_back(before, u), 1e-12)
    assert (run.report.backward.terms, run.report.backward.stop) == (terms, StopReason.BUDGET)


def test_rbp_reports_a_tolerance_reached():
    problem = linear(0.5)
    run = problem.run(RBP(Neumann(terms=200, tolerance=1e-9)), steps=5)
    assert run.report.backward is None
    problem.loss(run.state).backward()
    report = run.report.backward
    assert report.stop is StopReason.CONVERGED
    assert report.terms < 200
    assert report.residual <= 1e-9
    assert not report.fell_back


@pytest.mark.parametrize("scale", [1e6, 1e-6, 2.0**20, 2.0**-20])
@each_solver
def test_scaling_the_loss_scales_the_gradient_and_nothing_else(solver, scale):
    problem = hgru()
    one, other = (problem.run(RBP(solver), steps=5) for _ in range(2))
    plain = problem.grads(problem.loss(one.state))
    scaled = problem.grads(scale * problem.loss(other.state))
    a, b = one.report.backward, other.report.backward
    assert (a.terms, a.stop) == (b.terms, b.stop)
    assert_same({name: grad / scale for name, grad in scaled.items()}, plain, 1e-12)
    if math.log2(scale).is_integer():  # then nothing rounds
        assert all(torch.equal(scaled[name], scale * plain[name]) for name in plain)


def test_a_leaf_that_the_loss_does_not_read_is_no_obstacle():
    """The hidden half of the state of a ConvLSTM feeds a readout, its memory does not."""
    problem = PROBLEMS["convlstm"]()
    got, wanted = (
        problem.grads(problem.run(method, steps=400).state[0].square().sum())
        for method in (RBP(GMRES(terms=80)), BPTT())
    )
    assert_same(got, wanted, 1e-6)


def test_two_backward_passes_through_one_run_add_up():
    problem = linear()
    run = problem.run(RBP(), steps=5)
    loss = problem.loss(run.state)
    loss.backward(retain_graph=True)
    once = {name: tensor.grad.clone() for name, tensor in problem.wanted.items()}
    loss.backward(retain_graph=True)
    assert_same({name: tensor.grad for name, tensor in problem.wanted.items()}, {n: 2 * g for n, g in once.items()}, 0)


def test_gradients_of_two_runs_accumulate():
    problem = linear()
    alone = _gradient(problem, RBP(), steps=5)
    for _ in range(2):
        problem.loss(problem.run(RBP(), steps=5).state).backward()
    assert_same({name: tensor.grad for name, tensor in problem.wanted.items()}, {n: 2 * g for n, g in alone.items()}, 0)


@pytest.mark.parametrize("build", [linear, hgru])
def test_a_second_derivative_through_rbp_raises(build):
    """At once, before an incomplete one can be taken."""
    problem = build()
    loss = problem.loss(problem.run(RBP(), steps=5).state)
    with pytest.raises(NotImplementedError, match=r"cannot be differentiated again.*BPTT"):
        problem.grads(loss, create_graph=True)


# What happens where the map does not contract


def _diverging() -> Problem:
    """A linear map that expands twofold along one direction, and shrinks along the others."""
    weight = torch.diag(torch.tensor([2.0, 0.5, 0.5, 0.5], dtype=torch.float64)).requires_grad_()
    drive = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    return Problem(lambda h: h @ weight.T + drive, torch.zeros(3, 4).double(), {"weight": weight, "drive": drive})


def test_policy_raise_tells_the_numbers():
    problem = _diverging()
    run = problem.run(RBP(Neumann(terms=9), on_divergence="raise"), steps=3)
    loss = problem.loss(run.state)
    with pytest.raises(DivergenceError, match=r"diverged after 9 terms.*accepted: 1\b.*lipschitz_penalty") as caught:
        loss.backward()
    J, g = problem.jacobian(problem.start), problem.outer_gradient(run.state)
    last = torch.linalg.matrix_power(J.T, 9) @ g
    assert f"{float(last.norm() / g.norm()):.3g} times the gradient" in str(caught.value)


def test_policy_warn_uses_the_solution_as_it_is():
    problem = _diverging()
    before = problem.state_after(2)
    run = problem.run(RBP(Neumann(terms=9), on_divergence="warn"), steps=3)
    with pytest.warns(DivergenceWarning, match="do not contract"):
        got = problem.grads(problem.loss(run.state))
    J, g = problem.jacobian(before), problem.outer_gradient(run.state)
    u = sum(torch.linalg.matrix_power(J.T, k) @ g for k in range(10))
    assert_same(got, problem.pulled_back(before, u), 1e-12)
    report = run.report.backward
    assert (report.stop, report.fell_back, report.terms) == (StopReason.DIVERGED, False, 9)
    assert report.residual > 1


@pytest.mark.parametrize("solver", [Neumann(terms=9), Anderson(terms=3, memory=1)])
def test_policy_fallback_uses_the_best_iterate(solver):
    problem = _diverging()
    before = problem.state_after(2)
    run = problem.run(RBP(solver, on_divergence="fallback", max_residual=1e-3), steps=3)
    got = problem.grads(problem.loss(run.state))
    J, g = problem.jacobian(before), problem.outer_gradient(run.state)
    best = solver.solve(lambda v: J.T @ v, g).best
    assert_same(got, problem.pulled_back(before, best), 1e-12)
    report = run.report.backward
    assert (report.stop, report.fell_back) == (StopReason.DIVERGED, True)


def test_fallback_from_a_series_that_only_grows_is_the_one_step_gradient():
    weight = (3 * torch.eye(4)).double().requires_grad_()
    problem = Problem(lambda h: h @ weight.T + 1, torch.zeros(2, 4).double(), {"weight": weight})
    got = _gradient(problem, RBP(Neumann(terms=9), on_divergence="fallback"), steps=3)
    assert_same(got, _gradient(problem, OneStep(), steps=3), 1e-12)


def test_fallback_leaves_a_sound_solution_alone():
    problem = linear(0.5)
    run = problem.run(RBP(on_divergence="fallback"), steps=5)
    assert_same(problem.grads(problem.loss(run.state)), _gradient(problem, RBP(), steps=5), 0)
    assert not run.report.backward.fell_back


def test_max_residual_decides():
    problem = linear(0.8)
    run = problem.run(RBP(Neumann(terms=3)), steps=5)
    problem.grads(problem.loss(run.state))
    residual = run.report.backward.residual
    for bound, stop in ((residual * 1.01, StopReason.BUDGET), (residual * 0.99, StopReason.DIVERGED)):
        run = problem.run(RBP(Neumann(terms=3), on_divergence="fallback", max_residual=bound), steps=5)
        problem.grads(problem.loss(run.state))
        assert run.report.backward.stop is stop


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("policy", ["raise", "warn", "fallback"])
@each_solver
def test_an_incoming_gradient_that_is_not_finite_is_handed_on(solver, policy, bad):
    """A gradient scaler finds it in the parameters' gradients."""
    problem = linear()
    run = problem.run(RBP(solver, on_divergence=policy), steps=5)
    loss = (run.state * bad).sum()
    if policy == "raise":
        with pytest.raises(DivergenceError, match="not finite"):
            loss.backward()
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss.backward()
    assert [w.category for w in caught] == ([DivergenceWarning] if policy == "warn" else [])
    assert not torch.isfinite(problem.wanted["weight"].grad).any()
    assert run.report.backward.stop is StopReason.NOT_FINITE


# The other methods


@each_problem
def test_bptt_is_autograd_through_a_plain_loop(build):
    problem = build()
    state = problem.start
    for _ in range(7):
        state = problem.step(state)
    assert_same(_gradient(problem, BPTT(), steps=7), problem.grads(problem.loss(state)), 0)


@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 6, 7, 50])
@each_problem
def test_checkpointing_changes_nothing(build, chunk):
    problem = build()
    assert_same(_gradient(problem, CheckpointedBPTT(chunk=chunk), steps=7), _gradient(problem, BPTT(), steps=7), 0)


@pytest.mark.parametrize("window", [7, 8, 50])
@each_problem
def test_truncated_bptt_over_the_whole_run_is_bptt(build, window):
    problem = build()
    assert_same(_gradient(problem, TruncatedBPTT(window=window), steps=7), _gradient(problem, BPTT(), steps=7), 0)


@pytest.mark.parametrize("window", [1, 3])
@each_problem
def test_truncated_bptt_starts_where_the_window_does(build, window):
    problem = build()
    state = problem.state_after(7 - window)
    for _ in range(window):
        state = problem.step(state)
    got = _gradient(problem, TruncatedBPTT(window=window), steps=7)
    assert_same(got, problem.grads(problem.loss(state)), 0)


@each_problem
def test_one_step_is_rbp_without_terms(build):
    problem = build()
    assert_same(_gradient(problem, OneStep(), steps=6), _gradient(problem, RBP(Neumann(terms=0)), steps=6), 0)


@pytest.mark.parametrize(("window", "damping"), [(1, 0.5), (4, 0.3), (4, 1.0), (50, 0.5)])
@each_problem
def test_phantom_is_damped_steps_after_a_detached_start(build, window, damping):
    problem = build()
    state = problem.state_after(max(7 - window, 0))
    for _ in range(min(window, 7)):
        state = tree_map(lambda h, f: (1 - damping) * h + damping * f, state, problem.step(state))
    run = problem.run(Phantom(window=window, damping=damping), steps=7)
    assert run.report.steps == 7
    torch.testing.assert_close(flat(run.state), flat(state), rtol=1e-12, atol=1e-12)
    assert_same(problem.grads(problem.loss(run.state)), problem.grads(problem.loss(state)), 1e-12)


@pytest.mark.parametrize("steps", [1, 2])
@each_method
def test_runs_shorter_than_a_window_or_chunk(method, steps):
    """With one step, every method is plain autograd through that step, up to RBP's solve and Phantom's damping."""
    problem = linear()
    run = problem.run(method, steps=steps)
    got = problem.grads(problem.loss(run.state))
    assert run.report.steps == steps
    assert all(torch.isfinite(grad).all() for grad in got.values())
    if steps == 1 and not isinstance(method, RBP | Phantom):
        assert_same(got, problem.grads(problem.loss(problem.step(problem.start))), 0)


@each_method
def test_which_methods_reach_the_start(method):
    problem = linear()
    start = torch.randn_like(problem.start).requires_grad_()
    reaching = isinstance(method, BPTT | CheckpointedBPTT)
    run = crbp.Evolve(steps=6, gradient=method)(problem.step, start)
    (got,) = torch.autograd.grad(problem.loss(run.state), start, allow_unused=True)
    if not reaching:
        assert got is None
        return
    J = problem.jacobian(problem.start)
    wanted = torch.linalg.matrix_power(J.T, 6) @ problem.outer_gradient(run.state)
    torch.testing.assert_close(got.flatten(), wanted, rtol=1e-12, atol=1e-12)


def test_rbp_of_a_single_step_does_not_reach_the_start():
    start = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    run = crbp.Evolve(steps=1, gradient=RBP())(linear().step, start)
    assert torch.autograd.grad(run.state.sum(), start, allow_unused=True) == (None,)


@each_method
def test_a_frozen_step_gives_a_state_without_gradient(method):
    weight, drive = contracting(4, 0.5), torch.randn(4).double()
    run = crbp.Evolve(steps=6, gradient=method)(lambda h: h @ weight + drive, torch.zeros(2, 4).double())
    loss = (run.state * torch.ones(2, 4, dtype=torch.float64, requires_grad=True)).sum()
    loss.backward()
    assert torch.isfinite(run.state).all()


# A user's own cells


def _graph_network() -> Problem:
    """A closure over a graph: nodes average what their neighbours send."""
    adjacency = (torch.rand(7, 7) < 0.4).double() + torch.eye(7).double()
    adjacency = adjacency / adjacency.sum(1, keepdim=True)
    weight = contracting(3, 0.6).requires_grad_()
    features = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    start = torch.zeros(7, 3).double()
    return Problem(
        lambda h: torch.tanh(adjacency @ h @ weight + features), start, {"weight": weight, "features": features}
    )


def _transformer() -> Problem:
    """A deep equilibrium transformer: one block, applied until nothing moves."""
    block = torch.nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True).double()
    tokens = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    wanted = {**dict(block.named_parameters()), "tokens": tokens}
    return Problem(lambda h: 0.4 * block(h) + tokens, torch.zeros(2, 5, 8).double(), wanted)


@pytest.mark.parametrize("build", [_graph_network, _transformer])
def test_a_cell_of_ones_own_trains_with_any_method_by_changing_one_value(build):
    problem = build()
    exact = _gradient(problem, BPTT(), steps=150)
    for method in (
        TruncatedBPTT(window=100),
        CheckpointedBPTT(),
        RBP(Neumann(terms=100)),
        RBP(Anderson(terms=60, tolerance=1e-12)),
        RBP(GMRES(terms=60, tolerance=1e-12)),
        Phantom(window=140, damping=0.8),
    ):
        assert_same(_gradient(problem, method, steps=150), exact, 1e-8)
    state = problem.state_after(150)
    assert_same(_gradient(problem, OneStep(), steps=150), problem.grads(problem.loss(problem.step(state))), 1e-8)


# Compiled steps


@pytest.fixture
def compiled():
    """`torch.compile` through AOTAutograd, without code generation."""
    torch._dynamo.reset()
    yield lambda function: torch.compile(function, backend="aot_eager", dynamic=False)
    torch._dynamo.reset()


# PyTorch's own warning, on meeting a state that carries a graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("name", "build"), [("bptt", conv_tanh), ("rbp", hgru), ("phantom", conv_tanh)])
def test_a_compiled_step_has_the_same_gradient(compiled, name, build):
    problem = build()
    eager = _gradient(problem, METHODS[name], steps=5)
    problem.step = compiled(problem.step)
    assert_same(_gradient(problem, METHODS[name], steps=5), eager, 1e-12)


def test_a_penalty_on_a_compiled_step_raises(compiled):
    """A penalty differentiates twice, which PyTorch's compiled graphs do not support."""
    problem = conv_tanh()
    problem.step = compiled(problem.step)
    run = problem.run(RBP(), steps=5)
    with pytest.raises(RuntimeError, match="double backward"):
        crbp.lipschitz_penalty(run).backward()


def test_a_penalty_beside_a_compiled_step_takes_one_eager_step(compiled):
    """The way out: evolve with the compiled step, penalise one step of the plain one from the state reached."""
    problem = conv_tanh()

    def objective(step):
        run = crbp.Evolve(steps=5, gradient=RBP())(step, problem.start)
        further = crbp.Evolve(steps=1, gradient=OneStep())(eager, run.state.detach())
        return problem.loss(run.state) + 10 * crbp.lipschitz_penalty(further, bound=0.1)

    eager = problem.step
    wanted = problem.grads(objective(eager))
    assert_same(problem.grads(objective(compiled(eager))), wanted, 1e-12)
    assert not torch.equal(wanted["drive"], _gradient(problem, RBP(), steps=5)["drive"])


# Values


@pytest.mark.parametrize(
    ("method", "options", "error", "named"),
    [
        (TruncatedBPTT, {"window": 0}, ValueError, "window .* not 0"),
        (TruncatedBPTT, {"window": True}, ValueError, "window .* not True"),
        (TruncatedBPTT, {"window": 3.0}, ValueError, "window .* not 3.0"),
        (CheckpointedBPTT, {"chunk": 0}, ValueError, "chunk .* not 0"),
        (Phantom, {"window": -1}, ValueError, "window .* not -1"),
        (Phantom, {"damping": 0.0}, ValueError, "damping .* not 0.0"),
        (Phantom, {"damping": 1.5}, ValueError, "damping .* not 1.5"),
        (RBP, {"solver": "neumann"}, TypeError, "solver must be a crbp solver .* not 'neumann'"),
        (RBP, {"on_divergence": "ignore"}, ValueError, "one of 'raise', 'warn', 'fallback', not 'ignore'"),
        (RBP, {"max_residual": 0.0}, ValueError, "max_residual .* not 0.0"),
        (RBP, {"max_residual": math.nan}, ValueError, "max_residual .* not nan"),
        (RBP, {"terms": 15}, TypeError, "unexpected keyword argument 'terms'"),
    ],
)
def test_bad_values_are_named(method, options, error, named):
    with pytest.raises(error, match=named):
        method(**options)


@each_method
def test_methods_are_values(method):
    for twin in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert twin == method
        assert hash(twin) == hash(method)
    assert method != RBP(GMRES(terms=3))
    with pytest.raises(AttributeError):
        method.window = 3


class TwoSteps(crbp.GradientMethod):
    """A method written outside the library, from its public parts."""

    def __call__(self, recurrence):
        head, left = recurrence.split(2)
        return head.followed_by(advance(recurrence.step, head.state, left))


def test_a_method_of_ones_own():
    problem = linear()
    assert_same(_gradient(problem, TwoSteps(), steps=6), _gradient(problem, TruncatedBPTT(window=2), steps=6), 0)
