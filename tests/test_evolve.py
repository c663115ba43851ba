"""Running a step function: states, stopping, modes, precision, and what a run reports and leaves behind."""

import copy
import gc
import math
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_structure

import crbp
from _core_cells import PROBLEMS, assert_same, flat, hgru, linear
from crbp import (
    BPTT,
    RBP,
    CheckpointedBPTT,
    DivergenceError,
    DivergenceWarning,
    Evolve,
    Neumann,
    OneStep,
    Phantom,
    StateError,
    StopReason,
    TruncatedBPTT,
)

METHODS = {
    "bptt": BPTT(),
    "truncated": TruncatedBPTT(window=3),
    "checkpointed": CheckpointedBPTT(chunk=2),
    "rbp": RBP(Neumann(terms=15)),
    "onestep": OneStep(),
    "phantom": Phantom(window=3, damping=1.0),
}

each_problem = pytest.mark.parametrize("build", PROBLEMS.values(), ids=PROBLEMS)
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@each_method
@each_problem
def test_the_final_state_is_that_of_a_plain_loop(build, method):
    problem = build()
    run = problem.run(method, steps=6)
    assert tree_structure(run.state) == tree_structure(problem.start)
    torch.testing.assert_close(flat(run.state), flat(problem.state_after(6)), rtol=1e-14, atol=0)
    assert (run.report.steps, run.report.stop, run.report.backward) == (6, StopReason.BUDGET, None)
    assert flat(run.state).requires_grad


def test_the_default_is_bptt():
    assert Evolve(steps=3).gradient == BPTT()


# Stopping early

# Steps taken beyond the first at which the tolerance is met: those that a method takes with a graph whatever comes.
BEYOND = {"bptt": 0, "truncated": 3, "rbp": 1, "onestep": 1, "phantom": 3}


@pytest.mark.parametrize("name", BEYOND)
@each_problem
def test_a_tolerance_stops_at_the_first_step_that_meets_it(build, name):
    problem = build()
    curve = crbp.residual_curve(problem.step, problem.start, steps=300)
    first = int((curve <= 1e-3).nonzero()[0]) + 1
    run = problem.run(METHODS[name], steps=300, tolerance=1e-3)
    assert run.report.steps == first + BEYOND[name]
    assert run.report.stop is StopReason.CONVERGED
    assert run.report.residual <= 1e-3
    again = problem.run(METHODS[name], steps=run.report.steps)
    assert torch.equal(flat(again.state), flat(run.state))
    assert_same(problem.grads(problem.loss(run.state)), problem.grads(problem.loss(again.state)), 0)


def test_checkpoints_test_the_tolerance_at_the_end_of_each_chunk():
    problem = linear()
    curve = crbp.residual_curve(problem.step, problem.start, steps=300)
    first = int((curve <= 1e-3).nonzero()[0]) + 1
    run = problem.run(CheckpointedBPTT(chunk=5), steps=300, tolerance=1e-3)
    assert run.report.steps == math.ceil(first / 5) * 5 + 1
    assert run.report.stop is StopReason.CONVERGED
    again = problem.run(BPTT(), steps=run.report.steps)
    assert_same(problem.grads(problem.loss(run.state)), problem.grads(problem.loss(again.state)), 0)


@each_method
def test_a_tolerance_out_of_reach_takes_all_steps(method):
    run = linear().run(method, steps=6, tolerance=1e-300)
    assert (run.report.steps, run.report.stop) == (6, StopReason.BUDGET)


# Modes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@each_method
@each_problem
def test_without_gradient_the_state_is_the_same(build, method, mode):
    problem = build()
    with mode():
        run = problem.run(method, steps=6)
        residual = run.report.residual
    assert torch.equal(flat(run.state), flat(problem.state_after(6)))
    assert not flat(run.state).requires_grad
    assert residual == pytest.approx(problem.run(method, steps=6).report.residual, rel=1e-12)


@each_method
def test_eval_changes_nothing_for_a_cell_without_modes(method):
    cell = crbp.cells.HGRU(2, 3).double()
    drive = torch.randn(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)

    def gradient() -> Tensor:
        run = Evolve(steps=5, gradient=method)(lambda h: cell(h, drive), cell.initial_state(drive))
        return torch.autograd.grad(run.state.square().sum(), drive)[0]

    training = gradient()
    cell.eval()
    assert torch.equal(gradient(), training)


@each_method
def test_a_run_can_be_nested_in_no_grad_and_back(method):
    """What is recorded depends on the mode of the run, not on that of an earlier one."""
    problem = linear()
    with torch.no_grad():
        problem.run(method, steps=3)
        with torch.enable_grad():
            run = problem.run(method, steps=3)
    assert_same(
        problem.grads(problem.loss(run.state)), problem.grads(problem.loss(problem.run(method, steps=3).state)), 0
    )


@pytest.mark.parametrize("cell", [crbp.cells.HGRU, crbp.cells.ConvLSTM, crbp.cells.ConvGRU])
@each_method
def test_autocast_leaves_the_state_in_its_dtype(method, cell):
    cell = cell(4, 3)
    drive = torch.randn(2, 4, 6, 6)

    def gradient(*, autocast: bool) -> dict[str, Tensor]:
        seen = set()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):

            def step(state):
                seen.update(leaf.dtype for leaf in tree_leaves(state))
                return cell(state, drive)

            run = Evolve(steps=5, gradient=method)(step, cell.initial_state(drive))
            penalty = crbp.lipschitz_penalty(run, bound=0.1)
        assert flat(run.state).dtype == torch.float32
        assert seen == {torch.float32}
        found = torch.autograd.grad((flat(run.state) - 1).square().sum() + penalty, list(cell.parameters()))
        return dict(zip(dict(cell.named_parameters()), found, strict=True))

    rounded, exact = gradient(autocast=True), gradient(autocast=False)
    assert all(grad.dtype == torch.float32 and torch.isfinite(grad).all() for grad in rounded.values())
    assert_same(rounded, exact, 8 * torch.finfo(torch.bfloat16).eps)


def test_autocast_of_a_step_that_returns_low_precision_is_put_right_and_plain_steps_are_refused():
    layer = nn.Linear(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.zeros(2, 4)).dtype == torch.bfloat16
        assert Evolve(steps=3)(layer, torch.zeros(2, 4)).state.dtype == torch.float32
    with pytest.raises(StateError, match=r"leaf 0 .* from torch.float32 into torch.bfloat16"):
        Evolve(steps=3)(lambda h: layer(h).bfloat16(), torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@each_method
def test_every_floating_dtype_runs_and_is_kept(method, dtype):
    cell = crbp.cells.ConvGRU(2, 3).to(dtype)
    drive = torch.randn(1, 2, 4, 4, dtype=dtype)
    run = Evolve(steps=4, gradient=method)(lambda h: cell(h, drive), cell.initial_state(drive))
    run.state.sum().backward()
    assert run.state.dtype == dtype
    assert all(p.grad.dtype == dtype and torch.isfinite(p.grad).all() for p in cell.parameters())


# States that cannot be evolved


@pytest.mark.parametrize(
    ("step", "start", "named"),
    [
        (lambda h: h, (), "holds no tensor"),
        (lambda h: h, {}, "holds no tensor"),
        (lambda h: h, 3.0, "leaf 0 of the state is a float"),
        (lambda h: h, (torch.zeros(2), None), "leaf 1 of the state is a NoneType"),
        (lambda h: h, torch.zeros(2, dtype=torch.int64), "leaf 0 of the state has dtype torch.int64"),
        (lambda h: h, [torch.zeros(2), torch.zeros(2, dtype=torch.bool)], "leaf 1 of the state has dtype torch.bool"),
        (lambda h: h[:1], torch.zeros(2), r"leaf 0 of the state from shape \(2,\) into \(1,\)"),
        (lambda h: (h[0], h[1][None]), (torch.zeros(2), torch.zeros(3)), r"leaf 1 .* from shape \(3,\) into \(1, 3\)"),
        (lambda h: (h, h), torch.zeros(2), "returned the structure"),
        (lambda h: {"b": h["a"]}, {"a": torch.zeros(2)}, "returned the structure"),
        (lambda h: None, torch.zeros(2), "returned a NoneType for leaf 0"),
        (lambda h: h.double(), torch.zeros(2), "from torch.float32 into torch.float64"),
    ],
)
def test_states_that_cannot_be_evolved_are_named(step, start, named):
    for method in METHODS.values():
        with pytest.raises(StateError, match=named):
            Evolve(steps=3, gradient=method)(step, start)
    assert issubclass(StateError, ValueError)


# Divergence


def _bursting(h: Tensor) -> Tensor:
    """Finite for two steps from ones, infinite from the third on."""
    return torch.where(h < 1e15, h * 1e10, math.inf)


@each_method
def test_a_state_that_is_not_finite_names_the_step(method):
    start = torch.ones(2).double()
    with pytest.raises(DivergenceError, match="not finite from step 3 of 6 on: the dynamics do not contract"):
        Evolve(steps=6, gradient=method)(_bursting, start)
    with pytest.raises(DivergenceError, match="not finite from step 1 of 6"):
        Evolve(steps=6, gradient=method)(lambda h: h * math.nan, start)
    with pytest.raises(DivergenceError, match="not finite from step 0 of 6 on: the start holds"):
        Evolve(steps=6, gradient=method)(_bursting, start * math.inf)


@each_method
def test_divergence_is_warned_of_and_reported_where_the_policy_says_so(method):
    with pytest.warns(DivergenceWarning, match="not finite from step 3 of 6"):
        run = Evolve(steps=6, gradient=method, on_divergence="warn")(_bursting, torch.ones(2).double())
    assert run.report.stop is StopReason.NOT_FINITE
    assert not math.isfinite(run.report.residual)
    assert run.report.steps == 6


def test_one_bad_leaf_among_many_is_found():
    start = {"a": torch.ones(2), "b": torch.ones(3)}
    with pytest.raises(DivergenceError, match="step 1 of 4"):
        Evolve(steps=4)(lambda s: {"a": s["a"] / 2, "b": s["b"] * math.inf}, start)


def test_errors_have_a_common_base():
    assert issubclass(DivergenceError, crbp.CrbpError)
    assert issubclass(StateError, crbp.CrbpError)


# Values


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"steps": 0}, ValueError, "steps must be a whole number of at least 1, not 0"),
        ({"steps": -2}, ValueError, "steps .* not -2"),
        ({"steps": True}, ValueError, "steps .* not True"),
        ({"steps": 3.0}, ValueError, "steps .* not 3.0"),
        ({"steps": 3, "tolerance": -1e-3}, ValueError, "tolerance .* not -0.001"),
        ({"steps": 3, "tolerance": math.inf}, ValueError, "tolerance .* not inf"),
        ({"steps": 3, "gradient": "rbp"}, TypeError, "gradient must be a gradient method .* not 'rbp'"),
        ({"steps": 3, "gradient": RBP}, TypeError, "gradient must be a gradient method"),
        ({"steps": 3, "on_divergence": "fallback"}, ValueError, "one of 'raise', 'warn', not 'fallback'"),
        ({"steps": 3, "iterations": 3}, TypeError, "unexpected keyword argument 'iterations'"),
    ],
)
def test_bad_values_are_named(options, error, named):
    with pytest.raises(error, match=named):
        Evolve(**options)


def test_evolve_is_a_value():
    evolve = Evolve(steps=5, gradient=RBP(Neumann(terms=3)), tolerance=1e-3)
    for twin in (copy.deepcopy(evolve), pickle.loads(pickle.dumps(evolve))):
        assert twin == evolve
        assert hash(twin) == hash(evolve)
    with pytest.raises(AttributeError):
        evolve.steps = 3


# What stays behind


@pytest.mark.parametrize("backward", [True, False], ids=["backward", "forward"])
@each_method
def test_no_tensor_of_a_run_outlives_it(method, backward):
    """Without the garbage collector: there are no reference cycles to wait for."""
    problem = hgru()
    seen = []
    plain = problem.step

    def step(h: Tensor) -> Tensor:
        new = plain(h)
        seen.append(weakref.ref(new))
        return new

    problem.step = step
    gc.collect()
    gc.disable()
    try:
        run = problem.run(method, steps=6)
        loss = problem.loss(run.state) + crbp.lipschitz_penalty(run, bound=0.1)
        if backward:
            loss.backward()
        del run, loss
        assert len(seen) >= 6
        assert not any(ref() is not None for ref in seen)
    finally:
        gc.enable()


def test_importing_the_library_imports_torch_alone():
    heavy = ["lightning", "numba", "PIL", "matplotlib", "torchvision", "torchmetrics", "pyarrow", "rich"]
    code = f"import sys, crbp; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_every_public_name_is_there():
    assert all(hasattr(crbp, name) for name in crbp.__all__)
    assert sorted(crbp.__all__, key=str.lower) == sorted(set(crbp.__all__), key=str.lower)


def test_what_needs_extras_is_imported_on_first_use():
    code = "import sys, crbp; print('crbp.data' in sys.modules, crbp.data.__name__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "crbp.data"]
    with pytest.raises(AttributeError, match="no attribute 'modles'"):
        _ = crbp.modles  # type: ignore[attr-defined]
