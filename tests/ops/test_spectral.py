from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from beside_direct import assert_direct, relative
from torch import Tensor

import crbp
from crbp import ops
from crbp.ops import _native, convolution, spectral
from crbp.ops._kept import passing

needs_compiler = pytest.mark.skipif(_native.found() is None, reason="there is no C++ compiler here")
# (B, C, O), image, kernel, plane. Channels that fill no vector, one and several; an odd number of tiles; tiles that the
# image does not fill; planes for whole images and for tiles, and one of each along its sides; every radix.
CASES = [
    ((1, 1, 1), (8, 8), (3, 3), (10, 10)),
    ((3, 5, 18), (13, 9), (5, 5), (16, 16)),
    ((2, 16, 3), (32, 32), (7, 7), (36, 36)),
    ((1, 33, 40), (20, 21), (15, 3), (18, 24)),
    ((4, 9, 20), (21, 64), (3, 3), (8, 72)),
    ((1, 2, 2), (50, 27), (9, 9), (60, 16)),
    ((2, 3, 2), (5, 80), (3, 13), (8, 100)),
    ((1, 2, 3), (3, 4), (9, 7), (10, 8)),
    ((2, 120, 130), (9, 8), (3, 5), (10, 10)),
]


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, 3e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_native_correlations_are_direct_ones_with_their_gradients(
    case: tuple[tuple[int, ...], ...], dtype: torch.dtype, precision: float, threads: int
) -> None:
    (images, inputs, outputs), image_size, kernel, plane = case
    torch.manual_seed(0)
    image = torch.randn(images, inputs, *image_size, dtype=dtype, requires_grad=True)
    weight = torch.randn(outputs, inputs, *kernel, dtype=dtype, requires_grad=True)
    tile = tuple(map(spectral._tile, image_size, plane, kernel))
    frame = spectral.Frame(plane, tile, kernel, native=True)  # type: ignore[arg-type]
    assert_direct(
        lambda image, weight: spectral.correlate(image, spectral.spectrum(weight, frame), frame, outputs),
        image,
        weight,
        precision=precision,
        threads=threads,
    )


@needs_compiler
@pytest.mark.parametrize("plane", [(10, 8), (8, 12)])
def test_native_tiles_pass_gradcheck_twice(plane: spectral.Sides) -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 2, 9, 10, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    frame = spectral.Frame(plane, (plane[0] - 4, 10 if plane[1] == 12 else plane[1] - 2), (5, 3), native=True)

    def tiled(image: Tensor, weight: Tensor) -> Tensor:
        return spectral.correlate(image, spectral.spectrum(weight, frame), frame, 3)

    assert torch.autograd.gradcheck(tiled, (image, weight))
    assert torch.autograd.gradgradcheck(tiled, (image, weight), fast_mode=True)


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("kernel", [(3, 3), (15, 15), (7, 31), (41, 1)])
@pytest.mark.parametrize("image", [(8, 8), (32, 48), (150, 150), (1, 500)])
def test_a_chosen_plane_holds_tile_and_kernel(image: spectral.Sides, kernel: spectral.Sides, native: bool) -> None:
    frame = spectral.frame_for(2, image, kernel, 25, 25, native=native)
    for side, plane, tile, reach in zip(image, frame.size, frame.tile, kernel, strict=True):
        assert plane % 2 == 0
        assert plane >= reach
        assert plane >= (side + reach // 2 if tile == side else tile + reach - 1)
        assert native or tile == side


def test_the_factors_are_those_of_the_size() -> None:
    for size in range(2, 200):
        factors = spectral.factors(size)
        if factors:
            assert torch.tensor(factors).prod() == size
        else:
            assert any(size % prime == 0 for prime in range(7, size + 1) if all(prime % k for k in range(2, prime)))


@pytest.mark.parametrize("shape", [(2, 3, 2, (9, 12), (5, 5)), (3, 2, 2, (5, 6), (3, 9))])
def test_by_pytorch_it_is_the_direct_one_too(shape: tuple[int, int, int, spectral.Sides, spectral.Sides]) -> None:
    images, inputs, outputs, size, kernel = shape
    image = torch.randn(images, inputs, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(outputs, inputs, *kernel, dtype=torch.float64, requires_grad=True)
    frame = spectral.frame_for(images, size, kernel, inputs, outputs, native=False)

    def whole(image: Tensor, weight: Tensor) -> Tensor:
        return spectral.correlate(image, spectral.spectrum(weight, frame), frame, outputs)

    torch.testing.assert_close(whole(image, weight), F.conv2d(image, weight, padding="same"))
    assert torch.autograd.gradcheck(whole, (image, weight))
    assert torch.autograd.gradgradcheck(whole, (image, weight), fast_mode=True)


@pytest.fixture
def no_library_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_native, "found", _native.found.__wrapped__)
    monkeypatch.setattr(convolution, "found", _native.found)
    return tmp_path / "crbp"


@needs_compiler
def test_the_library_is_compiled_once(no_library_yet: Path) -> None:
    assert _native.found() is not None
    (library,) = no_library_yet.iterdir()
    written = library.stat().st_mtime_ns
    _native.found()
    assert [library] == list(no_library_yet.iterdir())
    assert library.stat().st_mtime_ns == written


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false"])
def test_without_a_compiler_it_says_so_and_goes_on(
    no_library_yet: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.warns(RuntimeWarning, match=r"C\+\+ compiler.*is needed"):
        found = ops.conv2d(torch.ones(2, 16, 8, 8), torch.ones(16, 16, 3, 3), method="fft")
    torch.testing.assert_close(found[0, 0, 1, 5:] / 16, torch.tensor([9.0, 9.0, 6.0]))
    assert not list(no_library_yet.glob("*.so"))


def test_nothing_is_compiled_where_it_would_not_be_used(no_library_yet: Path) -> None:
    assert ops.preferred_method(torch.ones(1, 2, 16, 16), torch.ones(2, 2, 3, 3)) == "direct"
    assert not no_library_yet.exists()


def test_many_channels_are_left_to_a_library() -> None:
    assert spectral.native_suits(torch.device("cpu"), 128, 128)
    assert not spectral.native_suits(torch.device("cpu"), 128, 129)
    assert not spectral.native_suits(torch.device("cuda"), 8, 8)
    image, weight = torch.randn(1, 130, 8, 8), torch.randn(130, 130, 3, 3)
    assert not convolution._frames(image, weight)[0][1].native
    torch.testing.assert_close(
        ops.conv2d(image, weight, method="fft"), ops.conv2d(image, weight, method="direct"), rtol=1e-4, atol=1e-3
    )


def test_few_channels_of_large_images_are_left_to_pytorch() -> None:
    (_, first), (_, second) = convolution._frames(torch.empty(2, 1, 256, 256), torch.empty(1, 1, 7, 7))
    assert (first.native, second.native) == (False, True)


@needs_compiler
def test_under_autocast_a_forced_fft_stays_in_single_precision() -> None:
    image, weight = torch.randn(2, 16, 12, 12), torch.randn(16, 16, 5, 5, requires_grad=True)
    wanted = F.conv2d(image, weight, padding="same")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.conv2d(image, weight, method="fft")
        (gradient,) = torch.autograd.grad(found.sum(), weight)
    assert relative(found.detach(), wanted.detach()) < 1e-5
    assert relative(gradient, torch.autograd.grad(wanted.sum(), weight)[0]) < 1e-5


@pytest.mark.parametrize("channels", [2, 16])
def test_no_image_gives_a_gradient_of_zero(channels: int) -> None:
    weight = torch.randn(channels, channels, 3, 3, requires_grad=True)
    ops.conv2d(torch.empty(0, channels, 8, 8), weight, method="fft").sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
    assert ops.preferred_method(torch.empty(1, channels, 0, 8), weight) == "direct"


@needs_compiler
def test_an_adjoint_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.randn(2, 16, 12, 12, requires_grad=True)
    layer = ops.Conv2d(16, 16, 5, method="fft")
    made: list[int] = []
    original = spectral._filled
    with ops.shared_spectra():
        result = layer(layer(image))
    monkeypatch.setattr(spectral, "_filled", lambda kernels: made.append(1) or original(kernels))
    for graph in (False, True, False):
        torch.autograd.grad(result.sum(), image, retain_graph=True, create_graph=graph)
    assert made == [1]
    with crbp.activation_memory() as memory:
        torch.autograd.grad(result.sum(), image, create_graph=True)
    spectrum = spectral.spectrum(layer.weight, convolution._frames(image, layer.weight)[0][1])
    assert memory.bytes < 1.5 * spectrum.nbytes


@needs_compiler
@pytest.mark.parametrize(("method", "kernel"), [("fft", 5), ("winograd", 3)])
def test_what_is_kept_of_a_kernel_is_counted_while_a_graph_has_it(method: Any, kernel: int) -> None:
    image, layer = torch.randn(1, 16, 8, 8, requires_grad=True), ops.Conv2d(16, 16, kernel, method=method)

    def counted(*, keep: bool) -> int:
        with crbp.activation_memory(exclude=[image, layer.weight]) as memory:
            with ops.shared_spectra():
                (found,) = torch.autograd.grad(layer(image).sum(), image, create_graph=keep)
            kept = found if keep else None  # noqa: F841
        return memory.bytes

    frame = convolution._frames(image, layer.weight)[0][1]
    with torch.no_grad():
        spectrum = spectral.spectrum(layer.weight, frame).nbytes if method == "fft" else 36 * 16 * 16 * 4
    alone = counted(keep=False)
    assert counted(keep=True) >= alone + spectrum


def run_by_fft() -> crbp.Run:
    layer, drive = ops.Conv2d(4, 4, 5, method="fft"), torch.randn(1, 4, 12, 12)
    return crbp.Evolve(steps=3, gradient=crbp.RBP())(lambda h: torch.tanh(drive + layer(h)), torch.zeros_like(drive))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Every adjoint from now on."""
    found: list[weakref.ref[Any]] = []
    original = spectral._adjoint

    def spy(*given: Any) -> Any:
        adjoint = original(*given)
        found.append(weakref.ref(adjoint))
        return adjoint

    monkeypatch.setattr(spectral, "_adjoint", spy)
    return found


@needs_compiler
@pytest.mark.parametrize("penalty", [crbp.lipschitz_penalty, crbp.spectral_penalty, crbp.jacobian_frobenius_penalty])
def test_a_penalty_holds_no_adjoint_until_the_backward_pass(penalty: Any, made: list[weakref.ref[Any]]) -> None:
    run = run_by_fft()
    value = penalty(run)
    assert len(made) == 1
    assert made[0]() is None
    (value + run.state.sum()).backward()
    assert len(made) == 2


@needs_compiler
def test_several_penalties_make_their_adjoints_once(made: list[weakref.ref[Any]]) -> None:
    run = run_by_fft()
    with passing():
        crbp.lipschitz_penalty(run) + crbp.spectral_penalty(run)
        assert len(made) == 1
    crbp.lipschitz_penalty(run)
    assert len(made) == 2


@needs_compiler
def test_chunks_that_are_taken_again_have_the_spectra_of_their_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = spectral._transformed
    monkeypatch.setattr(spectral, "_transformed", lambda *given: made.append(1) or original(*given))
    layer, drive = ops.Conv2d(4, 4, 5, method="fft"), torch.randn(1, 4, 12, 12)
    evolve = crbp.Evolve(steps=9, gradient=crbp.CheckpointedBPTT(chunk=2))
    evolve(lambda h: torch.tanh(drive + layer(h) / 9), torch.zeros_like(drive)).state.sum().backward()
    assert made == [1]


@needs_compiler
def test_other_kinds_of_tensors_meet_an_operator() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 3, 5, 5))
    image = torch.randn(2, 3, 16, 16)
    wanted = ops.conv2d(image, weight, method="fft")
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: ops.conv2d(x, weight, method="fft"))(image)
    torch.testing.assert_close(graph(2 * image), 2 * wanted, rtol=1e-4, atol=1e-5)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert ops.conv2d(mode.from_tensor(image), mode.from_tensor(weight), method="fft").shape == wanted.shape
    frame = spectral.frame_for(2, (16, 16), (5, 5), 3, 3, native=True)
    spectrum, sizes = spectral.spectrum(weight.detach(), frame), (*frame.size, *frame.tile, *frame.kernel)
    torch.library.opcheck(spectral._correlate, (image, spectrum, 3, *sizes))
    torch.library.opcheck(spectral._cross, (image, wanted.detach(), *sizes))


def test_without_a_home_the_library_is_for_this_process(
    no_library_yet: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = _native._cache()
    assert folder.is_dir()
    assert tmp_path not in folder.parents
