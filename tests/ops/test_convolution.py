from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import crbp
from crbp import ops
from crbp.ops import convolution, spectral

SHAPES = [(2, 3, 2, (9, 12), (5, 5)), (1, 2, 4, (8, 8), (7, 7)), (3, 2, 2, (5, 6), (3, 9)), (2, 1, 1, (4, 31), (1, 1))]


def pair(shape: tuple[Any, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    batch, inputs, outputs, size, kernel = shape
    torch.manual_seed(0)
    image = torch.randn(batch, inputs, *size, dtype=dtype, requires_grad=True)
    weight = torch.randn(outputs, inputs, *kernel, dtype=dtype, requires_grad=True)
    return image, weight


def by_fft(image: Tensor, weight: Tensor) -> Tensor:
    return ops.conv2d(image, weight, method="fft")


@pytest.mark.parametrize("shape", SHAPES)
def test_fft_equals_direct_with_its_gradients(shape: tuple[Any, ...]) -> None:
    image, weight = pair(shape)
    ours, theirs = by_fft(image, weight), F.conv2d(image, weight, padding="same")
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    gradient = torch.randn_like(theirs)
    for got, wanted in zip(
        torch.autograd.grad(ours, (image, weight), gradient),
        torch.autograd.grad(theirs, (image, weight), gradient),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(1, 2, 2, (4, 5), (5, 5)), (2, 1, 2, (5, 3), (3, 7))])
def test_fft_passes_gradcheck_twice(shape: tuple[Any, ...]) -> None:
    arguments = pair(shape)
    assert torch.autograd.gradcheck(by_fft, arguments)
    assert torch.autograd.gradgradcheck(by_fft, arguments, fast_mode=True)


def test_fft_in_single_precision_is_as_exact_as_the_direct_sum() -> None:
    image, weight = pair((2, 8, 8, (64, 64), (15, 15)))
    wanted = F.conv2d(image, weight, padding="same").detach()
    error = (by_fft(image.float(), weight.float()) - wanted).norm() / wanted.norm()
    assert error < 1e-6


def test_functional_transforms_differentiate_it_too() -> None:
    image, weight = pair(SHAPES[0])
    value, pull = torch.func.vjp(lambda x: by_fft(x, weight), image)
    (got,) = pull(torch.ones_like(value))
    (wanted,) = torch.autograd.grad(F.conv2d(image, weight, padding="same").sum(), image)
    torch.testing.assert_close(got, wanted)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = []
    original = convolution.spectrum

    def spectrum(weight: Tensor, frame: spectral.Frame) -> Tensor:
        seen.append(tuple(weight.shape))
        return original(weight, frame)

    monkeypatch.setattr(convolution, "spectrum", spectrum)
    return seen


@pytest.mark.parametrize("gradient", [crbp.RBP(crbp.Neumann(terms=4)), crbp.BPTT()], ids=["RBP", "BPTT"])
def test_a_run_transforms_each_kernel_once(monkeypatch: pytest.MonkeyPatch, gradient: crbp.GradientMethod) -> None:
    weight = torch.randn(3, 3, 5, 5, requires_grad=True)
    seen = counted(monkeypatch)
    run = crbp.Evolve(steps=7, gradient=gradient)(
        lambda h: torch.tanh(0.1 * by_fft(h, weight) + 1), torch.zeros(2, 3, 9, 9)
    )
    (run.state.sum() + crbp.lipschitz_penalty(run, bound=0.0)).backward()
    assert seen == [(3, 3, 5, 5)]
    assert weight.grad is not None
    assert bool((weight.grad != 0).any())


@pytest.mark.parametrize(
    "gradient",
    [crbp.BPTT(), crbp.TruncatedBPTT(window=2), crbp.CheckpointedBPTT(chunk=2), crbp.RBP(crbp.Neumann(terms=30))],
    ids=lambda method: type(method).__name__,
)
@pytest.mark.parametrize("channels", [2, 16])  # by PyTorch and natively
def test_gradients_of_runs_equal_those_by_the_direct_method(gradient: crbp.GradientMethod, channels: int) -> None:
    torch.manual_seed(0)
    drive = torch.randn(2, channels, 8, 8, dtype=torch.float64)
    found = []
    for method in ("fft", "direct"):
        torch.manual_seed(1)
        cell = crbp.cells.HGRU(channels, 5, norm_scale=1.0).double()
        cell.inhibition.method = cell.excitation.method = method  # type: ignore[assignment]
        run = crbp.Evolve(steps=6, gradient=gradient)(lambda h, cell=cell: cell(h, drive), torch.zeros_like(drive))
        (run.state.square().sum() + crbp.lipschitz_penalty(run, bound=0.0)).backward()
        found.append({name: parameter.grad for name, parameter in cell.named_parameters()})
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_a_changed_kernel_is_transformed_anew() -> None:
    image, weight = torch.randn(1, 2, 8, 8), torch.nn.Parameter(torch.randn(2, 2, 5, 5))
    with torch.no_grad(), ops.shared_spectra():
        before = by_fft(image, weight)
        weight.mul_(2)
        torch.testing.assert_close(by_fft(image, weight), 2 * before)


def test_a_computed_kernel_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.randn(2, 2, 5, 5, requires_grad=True)
    with torch.no_grad(), ops.shared_spectra() as spectra:
        for factor in (1.0, 2.0):
            by_fft(torch.randn(1, 2, 8, 8), base * factor)
        assert spectra.found == {}


def test_a_gradient_within_a_run_without_one_is_found() -> None:
    weight = torch.randn(2, 2, 5, 5, requires_grad=True)

    def step(h: Tensor) -> Tensor:
        with torch.enable_grad():
            (found,) = torch.autograd.grad(by_fft(h, weight).square().sum(), weight)
        return torch.tanh(h + found.mean())

    with torch.no_grad():
        assert bool(torch.isfinite(crbp.Evolve(steps=2)(step, torch.ones(1, 2, 8, 8)).state).all())


def test_inference_tensors_and_transforms_are_taken() -> None:
    with torch.inference_mode():
        layer = ops.Conv2d(2, 2, 5, method="fft")
        crbp.Evolve(steps=2)(lambda h: torch.tanh(layer(h)), torch.ones(1, 2, 8, 8))
    large, images = ops.Conv2d(8, 8, 15), torch.randn(3, 2, 8, 64, 64)
    assert ops.preferred_method(images[0], large.weight) == "fft"
    torch.testing.assert_close(torch.func.vmap(large)(images)[1], large(images[1]), rtol=1e-4, atol=1e-4)
    assert large(images[0, :0]).shape == (0, 8, 64, 64)


def test_a_product_for_the_state_alone_leaves_the_kernel_out(monkeypatch: pytest.MonkeyPatch) -> None:
    image, weight = pair((2, 16, 16, (9, 12), (5, 5)))
    calls: list[str] = []
    original = spectral._Cross.forward
    monkeypatch.setattr(spectral._Cross, "forward", staticmethod(lambda *a: calls.append("cross") or original(*a)))
    result = by_fft(image * 1, weight)
    torch.autograd.grad(result.sum(), image, retain_graph=True)
    assert calls == []
    result.sum().backward()
    assert calls == ["cross"]


def test_the_choice_follows_kernel_dtype_and_surroundings() -> None:
    large, small = torch.randn(25, 25, 15, 15), torch.randn(25, 25, 1, 1)
    image = torch.randn(2, 25, 150, 150)
    assert ops.preferred_method(image, large) == "fft"
    assert ops.preferred_method(image, small) == "direct"
    assert ops.preferred_method(image[:1, :, :8, :8], large[..., 6:9, 6:9]) == "direct"
    assert ops.preferred_method(image.bfloat16(), large) == "direct"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.preferred_method(image, large) == "direct"


@pytest.mark.parametrize(
    ("image", "weight", "settings", "message"),
    [
        (torch.randn(1, 2, 8, 8), torch.randn(2, 2, 4, 4), {}, "odd sides"),
        (torch.randn(1, 2, 8, 8), torch.randn(2, 2, 3, 3), {"method": "wavelet"}, "wavelet"),
        (torch.randn(1, 2, 8, 8), torch.randn(2, 2, 3, 3).double(), {"method": "fft"}, "one dtype and device"),
        (torch.randn(1, 2, 8, 8), torch.randn(2, 2, 3, 3, device="meta"), {"method": "fft"}, "one dtype and device"),
        (torch.randn(1, 2, 8, 8), torch.randn(2, 3, 3, 3), {"method": "fft"}, "images of 2 channels"),
        (torch.randn(1, 2, 8, 8), torch.randn(0, 2, 3, 3), {"method": "fft"}, "cannot take images"),
        (torch.randn(1, 2, 0, 8), torch.randn(2, 2, 3, 3), {"method": "fft"}, "no pixel"),
        (torch.randn(1, 2, 8, 8).bfloat16(), torch.randn(2, 2, 3, 3).bfloat16(), {"method": "fft"}, "bfloat16"),
    ],
)
def test_bad_arguments_are_named(image: Tensor, weight: Tensor, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.conv2d(image, weight, **settings)


@pytest.mark.parametrize("method", ["fft", "direct"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_has_the_parameters_of_an_ordinary_one(bias: bool, method: convolution.Method) -> None:
    layer = ops.Conv2d(3, 4, 5, bias=bias, method=method)
    ordinary = torch.nn.Conv2d(3, 4, 5, padding="same", bias=bias)
    layer.load_state_dict(ordinary.state_dict())
    image = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(layer(image), ordinary(image), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="odd"):
        ops.Conv2d(3, 4, 4)
