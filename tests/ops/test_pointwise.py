from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import crbp
from crbp import ops
from crbp.ops import _native, pointwise

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # raised inside PyTorch
COUNT = pointwise.LEAST + 5  # not a multiple of the lanes of a vector
SPECIAL = torch.tensor([0.0, -0.0, 87.0, -87.0, -88.0, 3e38, -3e38, torch.inf, -torch.inf, torch.nan])
needs_compiler = pytest.mark.skipif(_native.found() is None, reason="there is no C++ compiler here")


@pytest.fixture(params=["native", "for a compiler"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and _native.found() is None:
        pytest.skip("there is no C++ compiler here")
    return str(request.param)


def within(kind: str) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        with pointwise.for_compiler() if kind != "native" else nullcontext():
            return ops.softplus(x)

    return function


def test_softplus_is_exact_to_single_precision_with_its_derivatives(kind: str) -> None:
    x = torch.linspace(-30, 30, COUNT)
    found: list[list[Tensor]] = []
    for function, point in ((within(kind), x.clone()), (F.softplus, x.double())):
        derivatives = [function(point.requires_grad_())]
        for _ in range(3):
            derivatives += torch.autograd.grad(derivatives[-1].sum(), point, create_graph=True)
        found.append(derivatives)
    for (ours, theirs), rtol, atol in zip(
        zip(*found, strict=True), (3e-7, 2e-6, 1e-5, 1e-4), (1e-12, 1e-12, 1e-7, 1e-6), strict=True
    ):
        torch.testing.assert_close(ours.detach().double(), theirs.detach(), rtol=rtol, atol=atol)
    assert found[0][0].dtype == torch.float32


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_far_out_or_no_number_is_as_pytorch_has_it(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = SPECIAL.repeat(2 * COUNT // len(SPECIAL))
        point = x.clone().requires_grad_()
        value = ops.softplus(point)
        (slope,) = torch.autograd.grad(value, point, torch.ones_like(value))
        assert value.grad_fn is not None
        assert "Softplus" not in value.grad_fn.name()
        torch.testing.assert_close(value, F.softplus(x), rtol=3e-7, atol=2e-38, equal_nan=True)
        torch.testing.assert_close(slope, torch.sigmoid(x), rtol=3e-7, atol=2e-38, equal_nan=True)
        torch.testing.assert_close(ops.softplus(x), value.detach(), rtol=0, atol=0, equal_nan=True)
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_the_slope_alone_is_kept_and_only_for_a_graph() -> None:
    x = torch.randn(COUNT)
    for point, kept in ((x, 0), (x.clone().requires_grad_(), 4 * COUNT)):
        with crbp.activation_memory(exclude=[point]) as memory:
            value = ops.softplus(point)
        assert memory.bytes == kept
        del value
    with torch.no_grad():
        assert not ops.softplus(x.requires_grad_()).requires_grad


@needs_compiler
def test_its_operators_are_well_formed() -> None:
    for operator in (pointwise._softplus, pointwise._softplus_and_slope):
        torch.library.opcheck(operator, (torch.randn(3, 700),))
        with pytest.raises(TypeError, match=r"a dense tensor of float32 is needed, not one of torch\.float64"):
            operator(torch.randn(3, dtype=torch.float64))
        with pytest.raises(TypeError, match=r"with strides \(1, 3\)"):
            operator(torch.randn(4, 3).t())
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(pointwise._softplus_and_slope, (torch.randn(3, 70, requires_grad=True),), test_utils=checks)


@needs_compiler
def test_other_layouts_without_gaps_are_kept() -> None:
    x = torch.randn(2, 8, 48, 48).to(memory_format=torch.channels_last).requires_grad_()
    value = ops.softplus(x)
    assert value.grad_fn is not None
    assert "Softplus" not in value.grad_fn.name()
    assert value.stride() == x.stride()
    torch.testing.assert_close(value, F.softplus(x))


@needs_compiler
def test_what_is_traced_is_that_of_pytorch() -> None:
    def step(x: Tensor) -> Tensor:
        return ops.softplus(x)

    x = torch.randn(COUNT)
    assert "crbp::" not in str(torch.jit.trace(step, (x,)).graph)  # type: ignore[no-untyped-call]
    graph = torch.fx.experimental.proxy_tensor.make_fx(step)(x)
    torch.testing.assert_close(graph(-x), F.softplus(-x))
    assert torch.equal(torch.compile(step, backend="eager")(x), F.softplus(x))
    with pointwise.as_pytorch():
        assert torch.equal(step(x), F.softplus(x))


def small(x: Tensor) -> Tensor:
    return ops.softplus(x[: pointwise.LEAST - 1])


def strided(x: Tensor) -> Tensor:
    return ops.softplus(x.repeat(2).view(2, -1).t())


def subclass(x: Tensor) -> Tensor:
    return ops.softplus(x.as_subclass(type("Other", (Tensor,), {}))).as_subclass(Tensor)


def doubles(x: Tensor) -> Tensor:
    return ops.softplus(x.double())


def lower(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return ops.softplus(x)


def forward_mode(x: Tensor) -> Tensor:
    tangent: Tensor = torch.func.jvp(ops.softplus, (x,), (torch.ones_like(x),))[1]
    return tangent


def batched(x: Tensor) -> Tensor:
    return torch.func.vmap(ops.softplus)(x.repeat(2).view(2, -1))


@pytest.mark.parametrize("call", [small, strided, subclass, doubles, lower, forward_mode, batched])
def test_elsewhere_it_is_that_of_pytorch(call: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(-9, 9, COUNT)
    found = call(x)
    monkeypatch.setattr(ops, "softplus", F.softplus)
    assert torch.equal(found, call(x))


def test_a_compiled_stage_has_its_polynomial_and_an_eager_one_does_not() -> None:
    x = torch.randn(COUNT)
    graphs = []
    for fused in (ops.Fused(lambda x: ops.softplus(x) * x), ops.Fused(lambda x: ops.softplus(x) * x, compiled=False)):
        graph = fused._traced(fused.function, (x,))
        graphs.append({str(node.target) for node in graph.graph.nodes})
    assert "aten.abs.default" in graphs[0]
    assert not any("softplus" in name for name in graphs[0])
    assert "aten.abs.default" not in graphs[1]
