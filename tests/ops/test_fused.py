from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import crbp
from crbp import ops
from crbp.cells import hgru
from crbp.ops import _anew
from crbp.ops import fused as module

pytestmark = [
    # Raised inside PyTorch while it compiles.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]


def curve(x: Tensor, y: Tensor) -> Tensor:
    return torch.sigmoid(x) * y.square() + x


@pytest.fixture(scope="module")
def smooth() -> ops.Fused:
    return ops.Fused(curve)


def test_fused_passes_gradcheck_twice(smooth: ops.Fused) -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(smooth(x, y), curve(x, y))
    assert torch.autograd.gradcheck(smooth, (x, y))
    assert torch.autograd.gradgradcheck(smooth, (x, y), fast_mode=True)
    assert smooth.compile_seconds > 0
    assert ops.compile_seconds() >= smooth.compile_seconds


def test_only_the_gradient_asked_for_is_computed(smooth: ops.Fused) -> None:
    asked: list[Any] = []
    original = smooth.pullback
    x, y = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    smooth.pullback = lambda places, *rest: asked.append(places) or original(places, *rest)  # type: ignore[method-assign,func-returns-value]
    try:
        torch.autograd.grad(smooth(x * 1, y).sum(), x)
    finally:
        del smooth.pullback  # type: ignore[method-assign]
    assert asked == [(0,)]


def test_a_third_derivative_is_refused(smooth: ops.Fused) -> None:
    x, y = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    (first,) = torch.autograd.grad(smooth(x, y).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="two derivatives"):
        torch.autograd.grad(first.sum(), x, create_graph=True)


def test_products_taken_again_keep_what_is_linear(smooth: ops.Fused) -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    calls: list[str] = []
    for name in ("pullback", "linearised"):
        original = getattr(smooth, name)
        setattr(smooth, name, lambda *a, name=name, original=original: calls.append(name) or original(*a))
    try:
        result = smooth(x * 1, y * 1)
        with ops.repeated_products():
            for _ in range(4):
                gradient = torch.randn_like(x)
                found = torch.autograd.grad(result, (x, y), gradient, retain_graph=True)
                wanted = torch.autograd.grad(curve(x, y), (x, y), gradient)
                torch.testing.assert_close(found, wanted)
        assert module._repeated.maps is None
        torch.autograd.grad(result, (x, y), gradient)
    finally:
        del smooth.pullback, smooth.linearised  # type: ignore[method-assign]
    assert calls == ["linearised", "pullback"]


def written(x: Tensor, y: Tensor) -> Tensor:
    z = x + y
    z.view(-1).mul_(2)
    return torch.exp(z)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x, y: x * y.sum(), (4,)),
        (lambda x, y: x * y.sum(), (1,)),
        (lambda x, y: x * y.sum(), (8,)),
        (lambda x, y: torch.sin(x) * torch.tensor([2.0, 3.0, 4.0, 5.0]) * y, (4,)),
        (lambda x, y: torch.sin(x) * y.detach() + y, (4,)),
        (lambda x, y: torch.sin(x) * y.detach(), (4,)),
        (written, (4,)),
    ],
)
def test_every_kind_of_function_keeps_its_gradient(
    monkeypatch: pytest.MonkeyPatch, function: Any, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(module, "_compiled", lambda graph, tensors: graph)
    fused = _shared.setdefault(function.__code__.co_code, ops.Fused(function))
    torch.manual_seed(0)
    x, y = torch.randn(4, requires_grad=True), torch.randn(shape, requires_grad=True)
    result = fused(x * 1, y * 1)
    with ops.repeated_products():
        for asked in ((x, y), (y,), (x, y), (y,)):
            gradient = torch.randn(4)
            found = torch.autograd.grad(result, asked, gradient, retain_graph=True)
            value = function(x * 1, y * 1)
            wanted = torch.autograd.grad(value, asked, gradient, allow_unused=True, materialize_grads=True)
            torch.testing.assert_close(found, wanted)


_shared: dict[bytes, ops.Fused] = {}  # one function meets several shapes


def test_autocast_at_the_first_call_does_not_last() -> None:
    fused = ops.Fused(lambda x, y: torch.tanh(x @ y))
    x, y = torch.randn(3, 3), torch.randn(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused(x, y).dtype == torch.float32
    torch.testing.assert_close(fused(x, y), torch.tanh(x @ y))


def test_a_first_call_under_hooks_on_saved_tensors_compiles_all_the_same() -> None:
    fused, x = ops.Fused(curve), torch.randn(5, 3, requires_grad=True)
    with crbp.activation_memory() as memory:
        value = fused(x, x.detach())
        (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    assert memory.bytes > 0
    assert len(fused._ready) == 3
    (wanted,) = torch.autograd.grad(curve(x, x.detach()).sum(), x, create_graph=True)
    torch.testing.assert_close(first, wanted)
    torch.testing.assert_close(second, torch.autograd.grad(wanted.sum(), x)[0])


def test_more_sizes_than_are_compiled_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SIZES", 1)
    fused = ops.Fused(curve)
    for size in (2, 3, 4):
        x, y = torch.randn(size), torch.randn(size)
        if size == 3:
            with pytest.warns(RuntimeWarning, match="1 sizes of image and batch"):
                torch.testing.assert_close(fused(x, y), curve(x, y))
        else:
            torch.testing.assert_close(fused(x, y), curve(x, y))


def test_products_of_more_sizes_than_are_compiled_are_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SIZES", 1)
    fused, traced = ops.Fused(curve), []
    original = module._traced
    monkeypatch.setattr(module, "_traced", lambda *given: traced.append(1) or original(*given))
    for size in (2, 3, 4, 5):
        x, y, vector = torch.randn(size, requires_grad=True), torch.randn(size), torch.randn(size)
        before = len(traced)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            with ops.repeated_products():
                (product,) = torch.autograd.grad(fused(x, y), x, vector)
        torch.testing.assert_close(product, torch.autograd.grad(curve(x, y), x, vector)[0])
        assert (len(traced) > before) == (size <= 3)  # the second takes the whole product, compiled for one size too


Step = Callable[[Tensor], Tensor]


@pytest.fixture
def toy(smooth: ops.Fused) -> tuple[Step, Tensor, Tensor]:
    """A step with a fused stage behind a product, its weights, and a state to start from."""
    torch.manual_seed(0)
    weight, start = (0.2 * torch.randn(20, 20)).requires_grad_(), torch.randn(3, 4, 20)
    return lambda state: smooth(state, state @ weight), weight, start


def penalty_of(step: Step, start: Tensor) -> Tensor:
    run = crbp.Evolve(steps=3, gradient=crbp.RBP())(step, start)
    return crbp.lipschitz_penalty(run, bound=0.1) + crbp.spectral_penalty(run, bound=0.1)


def test_gradients_of_stages_are_computed_anew_in_place_of_being_saved(
    toy: tuple[Step, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, weight, start = toy
    found = []
    for context in (_anew.computed_anew, nullcontext):
        monkeypatch.setattr(crbp.evolve, "computed_anew", context)
        with crbp.activation_memory(exclude=[weight]) as memory:
            penalty = penalty_of(step, start)
        found.append((memory.bytes, torch.autograd.grad(penalty, weight)[0]))
    (anew, gradient), (saved, wanted) = found
    assert saved - anew == 2 * start.nbytes  # what goes to the product, of each penalty
    assert wanted.abs().max() > 0
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("around", ["checkpoint", "save_on_cpu", "retain_graph"])
def test_gradients_computed_anew_go_with_other_hooks(toy: tuple[Step, Tensor, Tensor], around: str) -> None:
    step, weight, start = toy
    (wanted,) = torch.autograd.grad(penalty_of(step, start), weight)
    if around == "checkpoint":
        penalty = torch.utils.checkpoint.checkpoint(penalty_of, step, start, use_reentrant=False)
    elif around == "save_on_cpu":
        with torch.autograd.graph.save_on_cpu():
            penalty = penalty_of(step, start)
    else:
        penalty = penalty_of(step, start)
        torch.autograd.grad(penalty, weight, retain_graph=True)
    assert isinstance(penalty, Tensor)
    torch.testing.assert_close(torch.autograd.grad(penalty, weight)[0], wanted, rtol=0, atol=0)
    assert not any(type(each) is _anew._Found for each in gc.get_objects())  # once the pass is over


@pytest.mark.parametrize("kind", ["another dtype", "changed by a hook"])
def test_what_is_no_longer_the_output_is_saved(kind: str, smooth: ops.Fused) -> None:
    torch.manual_seed(0)
    weight, start = (0.5 * torch.randn(4, 6)).requires_grad_(), torch.randn(3, 4, 12)

    def step(state: Tensor, stage: Step) -> Tensor:
        if kind == "another dtype":
            pairs = torch.view_as_complex(state.view(3, 4, 6, 2)) * weight
            return stage(torch.view_as_real(pairs).reshape(3, 4, 12), state)
        product = state * weight.repeat(1, 2)
        if product.requires_grad:
            product.register_hook(halve)
        return stage(product, state)

    def halve(gradient: Tensor) -> None:
        with torch.no_grad():
            gradient.mul_(0.5)

    found = [
        torch.autograd.grad(penalty_of(lambda state, stage=stage: step(state, stage), start), weight)[0]
        for stage in (smooth, curve)
    ]
    assert found[1].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_penalties_go_on_where_stages_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """For more sizes than are compiled, and where the compiler fails at the first gradient."""

    def found(stage: Step) -> list[Tensor]:
        return [penalty_of(lambda state: stage(state, 0.5 * state), torch.ones(size, 4)) for size in (2, 3, 4)]

    monkeypatch.setattr(module, "SIZES", 1)
    with pytest.warns(RuntimeWarning, match="1 sizes of image and batch"):
        torch.testing.assert_close(found(ops.Fused(curve)), found(curve))
    compile_ = torch._inductor.compile

    def fails_later(graph: Any, given: Any) -> Any:
        if len(given) > 2:
            raise torch._inductor.exc.TritonMissing(None)
        return compile_(graph, given)

    monkeypatch.setattr(torch._inductor, "compile", fails_later)
    monkeypatch.setattr(module._Compiler, "works", True)
    with pytest.warns(RuntimeWarning, match="cannot be compiled"):
        torch.testing.assert_close(found(ops.Fused(curve)), found(curve))


def test_a_step_that_is_not_fused_takes_derivatives_by_torch_func() -> None:
    class Squared(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return 0.3 * x.square()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            (x,) = ctx.saved_tensors
            return torch.func.vjp(lambda y: 0.3 * y.square(), x)[1](gradient)[0]

    penalty = penalty_of(Squared.apply, torch.full((2, 3), 0.8))
    torch.testing.assert_close(penalty, penalty_of(lambda x: 0.3 * x.square(), torch.full((2, 3), 0.8)))


def test_a_weight_changed_before_the_gradient_of_a_penalty_is_told(toy: tuple[Step, Tensor, Tensor]) -> None:
    step, weight, start = toy
    penalty = penalty_of(step, start)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        penalty.backward()


def test_a_norm_put_in_place_is_called() -> None:
    cell = crbp.cells.HGRU(2, 3, norm="batch", fused=True)
    cell.inhibition_norm = torch.nn.SyncBatchNorm.convert_sync_batchnorm(cell.inhibition_norm)
    called = []
    cell.inhibition_norm.register_forward_hook(lambda *_: called.append(True))
    cell.inhibition_norm.eval()
    cell(torch.rand(2, 2, 8, 8), torch.rand(2, 2, 8, 8))
    assert called


NORMS = ("instance", "batch", "group", "none")


@pytest.mark.parametrize(
    ("fused", "norm"),
    [*(("eager", norm) for norm in NORMS), *(pytest.param(True, norm, marks=pytest.mark.slow) for norm in NORMS)],
)
def test_a_fused_cell_trains_like_an_ordinary_one(fused: Any, norm: Any) -> None:
    torch.manual_seed(0)
    drive = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    found = []
    for kind in (fused, False):
        torch.manual_seed(1)
        cell = crbp.cells.HGRU(3, 5, norm=norm, norm_scale=0.5, fused=kind).double()
        run = crbp.Evolve(steps=5, gradient=crbp.RBP(crbp.Neumann(terms=6)))(
            lambda h, cell=cell: cell(h, drive), torch.zeros_like(drive)
        )
        (run.state.square().sum() + 3 * crbp.lipschitz_penalty(run, bound=0.1)).backward()
        found.append((run.state.detach(), {name: parameter.grad for name, parameter in cell.named_parameters()}))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-10)


def test_without_a_compiler_memory_is_saved_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any number of sizes."""
    monkeypatch.setattr(module._Compiler, "works", False)
    monkeypatch.setattr(module, "_compiled", lambda *_: pytest.fail("compiled"))
    eager = ops.Fused(curve, compiled=False)
    for size in range(1, module.SIZES + 3):
        x, y = (torch.randn(size, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
        with crbp.activation_memory(exclude=[x, y]) as memory:
            value = eager(x, y)
        assert memory.bytes == 0
        torch.testing.assert_close(value, curve(x, y))
        wanted = torch.autograd.grad(curve(x, y).square().sum(), (x, y))
        torch.testing.assert_close(torch.autograd.grad(value.square().sum(), (x, y)), wanted)
    assert torch.autograd.gradgradcheck(eager, (x, y), fast_mode=True)
    assert eager.compile_seconds == 0


def test_another_way_to_fuse_is_refused() -> None:
    with pytest.raises(ValueError, match="fused must be one of False, True, 'eager', not 'jit'"):
        crbp.cells.HGRU(2, 3, fused="jit")  # type: ignore[arg-type]


def test_no_stage_of_a_cell_is_computed_again_for_every_product() -> None:
    """Their derivatives write into tensors, which would keep them from being split."""
    hgru.eager_stages.cache_clear()  # of other tests
    torch.manual_seed(0)
    cell, drive = crbp.cells.HGRU(4, 3, fused="eager"), torch.randn(2, 4, 9, 9)
    run = crbp.Evolve(steps=3, gradient=crbp.RBP())(partial(cell, drive=drive), torch.zeros_like(drive))
    run.state.square().mean().backward()
    for stage in hgru.eager_stages(4):
        assert stage._linear
        assert not stage._impure


@pytest.mark.parametrize(("fused", "more"), [("eager", 5), pytest.param(True, 3, marks=pytest.mark.slow)])
def test_a_fused_step_of_c_rbp_saves_few_tensors_more_than_one_of_bptt(fused: Any, more: int) -> None:
    """Of the size of a state each, at any number of steps: 18 beside 13, compiled 14 beside 11."""
    cell = crbp.cells.HGRU(4, 3, norm="instance", fused=fused)
    found = []
    for images in (1, 3):
        drive = torch.randn(images, 4, 32, 32)
        for steps, gradient in ((3, crbp.RBP()), (7, crbp.RBP()), (1, crbp.BPTT())):
            with crbp.activation_memory(exclude=[*cell.parameters(), drive]) as memory:
                step = partial(cell, drive=drive)
                run = crbp.Evolve(steps=steps, gradient=gradient)(step, torch.zeros_like(drive))
                losses = [run.state.square().mean()]
                if isinstance(gradient, crbp.RBP):
                    losses.append(crbp.lipschitz_penalty(run))
            del run, losses
            found.append(memory.bytes)
    per_image = [(many - one) / (2 * 4 * 32 * 32 * 4) for one, many in zip(found[:3], found[3:], strict=True)]
    assert per_image[0] == per_image[1] == pytest.approx(per_image[2] + more, abs=0.05)  # statistics of norms


@pytest.mark.parametrize(("fused", "kept"), [(False, 16), ("eager", 9), pytest.param(True, 7, marks=pytest.mark.slow)])
def test_a_step_of_bptt_saves_so_many_tensors_of_the_size_of_a_state(fused: Any, kept: int) -> None:
    cell, drive, found = crbp.cells.HGRU(4, 3, fused=fused), torch.randn(2, 4, 32, 32), []
    for steps in (2, 5):
        with crbp.activation_memory(exclude=[*cell.parameters(), drive]) as memory:
            run = crbp.Evolve(steps=steps, gradient=crbp.BPTT())(partial(cell, drive=drive), torch.zeros_like(drive))
        del run
        found.append(memory.bytes)
    assert (found[1] - found[0]) / (3 * 2 * 4 * 32 * 32 * 4) == pytest.approx(kept, abs=0.05)


@pytest.mark.slow
def test_what_is_compiled_in_the_first_step_serves_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the weights, the images and the number of steps; in evaluation as well."""
    hgru.compiled_stages.cache_clear()  # of other tests
    compiled, compile_ = [], module._compiled
    monkeypatch.setattr(module, "_compiled", lambda *args: compiled.append(args) or compile_(*args))
    torch.manual_seed(0)
    cell = crbp.cells.HGRU(3, 5, norm="instance", fused=True)
    evolve = crbp.Evolve(steps=4, gradient=crbp.RBP(crbp.Neumann(terms=3)))
    optimiser = torch.optim.Adam(cell.parameters())

    def step(steps: int) -> None:
        drive = torch.randn(2, 3, 8, 8)
        run = replace(evolve, steps=steps)(lambda h: cell(h, drive), torch.zeros_like(drive))
        penalties = crbp.lipschitz_penalty(run), crbp.residual_penalty(run), crbp.spectral_penalty(run)
        (run.state.square().mean() + sum(penalties)).backward()
        optimiser.step()
        optimiser.zero_grad()

    def evaluate() -> None:
        drive = torch.randn(2, 3, 8, 8)
        with torch.no_grad():
            crbp.spectral_radius(evolve(lambda h: cell(h, drive), torch.zeros_like(drive)))

    step(4)
    evaluate()
    first = len(compiled)
    assert first > 0
    for steps in (4, 7, 12):
        step(steps)
        evaluate()
    assert len(compiled) == first


@pytest.mark.parametrize(
    "error",
    [
        torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError("no C++ compiler"), None),
        torch._inductor.exc.TritonMissing(None),
    ],
    ids=["C++", "Triton"],
)
def test_without_a_compiler_it_says_so_once_and_goes_on(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(torch._inductor, "compile", broken)
    monkeypatch.setattr(module._Compiler, "works", True)
    x, y = torch.randn(3), torch.randn(3)
    with pytest.warns(RuntimeWarning, match=r"cannot be compiled here"):
        torch.testing.assert_close(ops.Fused(curve)(x, y), curve(x, y))
    torch.testing.assert_close(ops.Fused(curve)(x, y), curve(x, y))
