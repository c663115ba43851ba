from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from beside_direct import assert_direct
from torch import Tensor

import crbp
from crbp import ops
from crbp.ops import _native, convolution, winograd

pytestmark = pytest.mark.skipif(_native.found() is None, reason="there is no C++ compiler here")
# (B, C, O), image. One tile and many; images that tiles do not fill, of one row, one column and one pixel; stretches of
# tiles that end within a vector and at its end, and rows of them that fill one, two and four vectors; outputs for every
# size of block; panels of 4, 2 and 1 vectors.
CASES = [
    ((1, 1, 1), (4, 4)),
    ((1, 2, 3), (1, 7)),
    ((2, 3, 2), (9, 1)),
    ((3, 1, 1), (1, 1)),
    ((2, 5, 13), (30, 37)),
    ((16, 3, 7), (16, 16)),
    ((1, 25, 25), (9, 259)),
    ((9, 40, 70), (14, 14)),
    ((2, 120, 100), (13, 10)),
    ((3, 5, 6), (14, 13)),
    ((1, 256, 256), (8, 9)),
    ((5, 3, 2), (7, 13)),
    ((3, 4, 5), (31, 30)),
    ((2, 3, 4), (5, 64)),
    ((9, 100, 90), (6, 15)),
]


def by_winograd(image: Tensor, weight: Tensor) -> Tensor:
    return ops.conv2d(image, weight, method="winograd")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, 5e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_direct_sum_with_its_gradients(
    case: tuple[tuple[int, ...], ...], dtype: torch.dtype, precision: float, threads: int
) -> None:
    (images, inputs, outputs), size = case
    torch.manual_seed(0)
    image = torch.randn(images, inputs, *size, dtype=dtype, requires_grad=True)
    weight = torch.randn(outputs, inputs, 3, 3, dtype=dtype, requires_grad=True)
    assert_direct(by_winograd, image, weight, precision=precision, threads=threads)


def test_every_number_of_vectors_of_a_panel_is_among_the_cases() -> None:
    tiles = {images * -(-height // 4) * -(-width // 4) for (images, _, _), (height, width) in CASES}
    for lanes in (8, 16):
        assert min(tiles) < 2 * lanes
        assert any(2 * lanes <= count < 4 * lanes for count in tiles)
        assert max(tiles) >= 3 * 4 * lanes  # with three threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(3, 5), (6, 13), (7, 16), (9, 32), (2, 63)], ids=str)
def test_an_image_sees_nothing_of_its_neighbours(size: tuple[int, int], dtype: torch.dtype) -> None:
    image = torch.full((3, 2, *size), torch.inf, dtype=dtype)
    image[1] = torch.randn(2, *size, dtype=dtype)
    weight = torch.randn(4, 2, 3, 3, dtype=dtype)
    found, wanted = by_winograd(image, weight)[1:2], F.conv2d(image[1:2], weight, padding=1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_no_image_gives_no_result_and_a_gradient_of_zero() -> None:
    image, weight = torch.zeros(0, 3, 8, 8), torch.randn(2, 3, 3, 3, requires_grad=True)
    result = by_winograd(image, weight)
    assert result.shape == (0, 2, 8, 8)
    result.sum().backward()
    torch.testing.assert_close(weight.grad, torch.zeros_like(weight))


def test_views_are_taken_as_what_they_show() -> None:
    image, weight = torch.randn(9, 12, 3, 2).permute(3, 2, 0, 1), torch.randn(3, 3, 3, 4).permute(3, 0, 2, 1)
    torch.testing.assert_close(
        by_winograd(image, weight), F.conv2d(image, weight, padding="same"), rtol=1e-4, atol=1e-4
    )


def test_it_passes_gradcheck_twice() -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(by_winograd, (image, weight))
    assert torch.autograd.gradgradcheck(by_winograd, (image, weight))


def test_functional_transforms_differentiate_it_too() -> None:
    image, weight = torch.randn(2, 3, 9, 12), torch.randn(4, 3, 3, 3)
    value, pull = torch.func.vjp(lambda x: by_winograd(x, weight), image)
    (got,) = pull(torch.ones_like(value))
    image.requires_grad_()
    (wanted,) = torch.autograd.grad(F.conv2d(image, weight, padding="same").sum(), image)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "gradient",
    [crbp.BPTT(), crbp.CheckpointedBPTT(chunk=2), crbp.RBP(crbp.Neumann(terms=30))],
    ids=lambda method: type(method).__name__,
)
def test_gradients_of_runs_equal_those_by_the_direct_method(gradient: crbp.GradientMethod) -> None:
    torch.manual_seed(0)
    drive = torch.randn(2, 5, 8, 9, dtype=torch.float64)
    found = []
    for method in ("winograd", "direct"):
        torch.manual_seed(1)
        cell = crbp.cells.HGRU(5, 3, norm_scale=1.0).double()
        cell.inhibition.method = cell.excitation.method = method  # type: ignore[assignment]
        run = crbp.Evolve(steps=6, gradient=gradient)(lambda h, cell=cell: cell(h, drive), torch.zeros_like(drive))
        (run.state.square().sum() + crbp.lipschitz_penalty(run, bound=0.0)).backward()
        found.append({name: parameter.grad for name, parameter in cell.named_parameters()})
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_a_product_for_the_state_alone_leaves_the_kernel_out(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    original = winograd.conv2d_weight
    monkeypatch.setattr(
        winograd, "conv2d_weight", lambda *a, **settings: calls.append("weight") or original(*a, **settings)
    )
    image, weight = torch.randn(1, 3, 9, 9, requires_grad=True), torch.randn(3, 3, 3, 3, requires_grad=True)
    result = by_winograd(image * 1, weight)
    torch.autograd.grad(result.sum(), image, retain_graph=True)
    assert calls == []
    result.sum().backward()
    assert calls == ["weight"]


def test_other_kinds_of_tensors_meet_an_operator_and_leave_nothing_behind() -> None:
    image, weight = torch.randn(2, 3, 6, 5), torch.randn(4, 3, 3, 3)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert by_winograd(mode.from_tensor(image), mode.from_tensor(weight)).shape == (2, 4, 6, 5)
    graph = torch.fx.experimental.proxy_tensor.make_fx(by_winograd, tracing_mode="fake")(image, weight)
    wanted = F.conv2d(image, weight, padding="same")
    for found in (by_winograd(image, weight), graph(image, weight)):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.library.opcheck(winograd._correlate, (image, torch.randn(36, 4, 3)))


@pytest.mark.parametrize(
    ("kernels", "error"),
    [(torch.randn(36, 4, 2), "are"), (torch.randn(9, 4, 3), "are"), (torch.randn(36, 4, 3).double(), "both")],
)
def test_the_operator_refuses_kernels_that_do_not_fit(kernels: Tensor, error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        torch.ops.crbp.winograd(torch.randn(2, 3, 6, 5), kernels)


def test_outside_a_run_nothing_is_kept_of_a_kernel() -> None:
    result = by_winograd(torch.randn(1, 2, 8, 8), torch.randn(2, 2, 3, 3, requires_grad=True))
    assert result.grad_fn is not None
    assert result.grad_fn.kept is None


def test_it_is_chosen_for_small_kernels_of_few_channels() -> None:
    image = torch.randn(2, 25, 150, 150)
    assert ops.preferred_method(image, torch.randn(25, 25, 3, 3)) == "winograd"
    assert ops.preferred_method(image, torch.randn(25, 25, 3, 5)) != "winograd"
    many = torch.randn(1, 512, 32, 32)
    assert ops.preferred_method(many, torch.randn(512, 512, 3, 3)) != "winograd"


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.randn(2, 2, 5, 5), "3×3 kernels"),
        (torch.randn(2, 2, 3, 5), "3×3 kernels"),
        (torch.randn(2, 3, 3, 3), "images of 2 channels"),
        (torch.randn(2, 2, 3, 3).double(), "one dtype"),
    ],
)
def test_what_it_is_not_for_is_named(weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_winograd(torch.randn(1, 2, 8, 8), weight)


def test_without_a_compiler_it_says_so_and_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "found", lambda: None)
    image, weight = torch.randn(2, 25, 150, 150), torch.randn(25, 25, 3, 3)
    assert ops.preferred_method(image, weight) != "winograd"
    with pytest.raises(ValueError, match=r"C\+\+ compiler"):
        by_winograd(image, weight)


@pytest.mark.parametrize("gradient", [crbp.RBP(crbp.Neumann(terms=4)), crbp.BPTT()], ids=["RBP", "BPTT"])
def test_a_run_transforms_each_kernel_once_and_its_backward_pass_once_turned_round(
    monkeypatch: pytest.MonkeyPatch, gradient: crbp.GradientMethod
) -> None:
    weight, seen = torch.randn(3, 3, 3, 3, requires_grad=True), []
    original = winograd._transformed
    monkeypatch.setattr(winograd, "_transformed", lambda kernels: seen.append(kernels) or original(kernels))
    run = crbp.Evolve(steps=7, gradient=gradient)(
        lambda h: torch.tanh(0.1 * by_winograd(h, weight) + 1), torch.zeros(2, 3, 9, 9)
    )
    (run.state.sum() + crbp.lipschitz_penalty(run, bound=0.0)).backward()
    forward, turned, again = seen  # for the penalty, which does not hold it, and for the backward pass
    torch.testing.assert_close(forward, weight.detach())
    torch.testing.assert_close(turned, weight.detach().flip(2, 3).transpose(0, 1))
    torch.testing.assert_close(again, turned)
    assert weight.grad is not None
    assert bool((weight.grad != 0).any())


def test_a_changed_kernel_is_transformed_anew() -> None:
    image, weight = torch.randn(1, 2, 8, 8), torch.nn.Parameter(torch.randn(2, 2, 3, 3))
    with torch.no_grad(), ops.shared_spectra():
        before = by_winograd(image, weight)
        weight.mul_(2)
        torch.testing.assert_close(by_winograd(image, weight), 2 * before)
