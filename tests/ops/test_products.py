from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from crbp import ops
from crbp.ops import products as module

NATIVE = module._found()
needs_compiler = pytest.mark.skipif(NATIVE is None, reason="there is no C++ compiler here")
# Frequencies that fill no vector, one image and several, channels that fill no tile, every radix of the transform.
SIZES = [(1, 1, 1, 3, 4, 5), (2, 5, 3, 7, 10, 17), (3, 4, 9, 9, 12, 16), (5, 7, 6, 20, 30, 33), (2, 2, 2, 60, 64, 40)]


def case(size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    images, inputs, outputs, height, rows, columns = size
    torch.manual_seed(0)
    return (
        torch.randn(images, inputs, height, columns, dtype=dtype),
        torch.randn(images, outputs, height, columns, dtype=dtype),
        torch.randn(outputs, inputs, rows, columns, dtype=dtype),
    )


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("dtype", "precision"), [(torch.complex64, 2e-6), (torch.complex128, 1e-14)])
@pytest.mark.parametrize("size", SIZES)
def test_native_products_are_those_of_matrices(
    size: tuple[int, ...], dtype: torch.dtype, precision: float, threads: int
) -> None:
    image, result, spectrum = case(size, dtype)
    rows, columns = size[4:]
    found = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for products in (module.products(native=True), module.products(native=False)):
            packed = products.pack(spectrum)
            found.append(
                (
                    products.unpack(packed, rows, columns),
                    products.correlate(image, packed, rows),
                    products.convolve(result, packed, rows),
                    products.unpack(products.cross(image, result, rows), rows, columns),
                )
            )
    finally:
        torch.set_num_threads(before)
    for got, wanted in zip(*found, strict=True):
        assert got.shape == wanted.shape
        assert (got - wanted).norm() <= precision * wanted.norm()


def test_matrix_products_are_the_sums_they_stand_for() -> None:
    image, result, spectrum = case((2, 3, 4, 6, 8, 5), torch.complex128)
    products = module.products(native=False)
    packed = products.pack(spectrum)
    ours, theirs = (torch.fft.fft(each, n=8, dim=-2) for each in (image, result))
    wanted = torch.fft.ifft(torch.einsum("bcrq,ocrq->borq", ours, spectrum.conj()), dim=-2)[..., :6, :]
    torch.testing.assert_close(products.correlate(image, packed, 8), wanted)
    wanted = torch.fft.ifft(torch.einsum("borq,ocrq->bcrq", theirs, spectrum), dim=-2)[..., :6, :]
    torch.testing.assert_close(products.convolve(result, packed, 8), wanted)
    crossed = products.unpack(products.cross(image, result, 8), 8, 5)
    torch.testing.assert_close(crossed, torch.einsum("bcrq,borq->ocrq", ours, theirs.conj()))


@pytest.fixture
def no_library_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_found", module._found.__wrapped__)
    return tmp_path / "crbp"


@needs_compiler
def test_the_library_is_compiled_once(no_library_yet: Path) -> None:
    assert module._found() is not None
    (library,) = no_library_yet.iterdir()
    written = library.stat().st_mtime_ns
    module._found()
    assert [library] == list(no_library_yet.iterdir())
    assert library.stat().st_mtime_ns == written


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false"])
def test_without_a_compiler_it_says_so_and_goes_on(
    no_library_yet: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.warns(RuntimeWarning, match=r"C\+\+ compiler.*is needed"):
        found = ops.conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3), method="fft")
    torch.testing.assert_close(found[0, 0, 1], torch.tensor([6.0, 9.0, 9.0, 6.0]))
    assert not list(no_library_yet.glob("*.so"))


def test_many_channels_are_left_to_a_library() -> None:
    assert not module.native_suits(torch.device("cpu"), 128, 128)
    assert not module.native_suits(torch.device("cuda"), 8, 8)
    image, weight = torch.randn(1, 80, 8, 8), torch.randn(80, 80, 3, 3)
    torch.testing.assert_close(
        ops.conv2d(image, weight, method="fft"), ops.conv2d(image, weight, method="direct"), rtol=1e-4, atol=1e-3
    )


@needs_compiler
def test_other_kinds_of_tensors_meet_an_operator() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 3, 5, 5))
    image = torch.randn(2, 3, 16, 16)
    wanted = ops.conv2d(image, weight, method="fft")
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: ops.conv2d(x, weight, method="fft"))(image)
    torch.testing.assert_close(graph(2 * image), 2 * wanted, rtol=1e-4, atol=1e-5)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert ops.conv2d(mode.from_tensor(image), mode.from_tensor(weight), method="fft").shape == wanted.shape
    packed = module.products(native=True).pack(torch.randn(2, 2, 6, 9, dtype=torch.complex64))
    torch.library.opcheck(module._unpack, (packed, 6, 9))
    torch.library.opcheck(module._apply, (torch.randn(3, 2, 5, 9, dtype=torch.complex64), packed, 6, True))


@needs_compiler
def test_a_spectrum_that_lies_askew_is_moved() -> None:
    image, _, spectrum = case((2, 3, 3, 5, 8, 9), torch.complex64)
    products = module.products(native=True)
    packed = products.pack(spectrum)
    memory = torch.empty(packed.numel() + 16)
    askew = memory[4 - memory.data_ptr() % 64 // 4 :][: packed.numel()].view(packed.shape).copy_(packed)
    assert askew.data_ptr() % 64 == 16
    torch.testing.assert_close(products.correlate(image, askew, 8), products.correlate(image, packed, 8))


def test_without_a_home_the_library_is_for_this_process(
    no_library_yet: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = module._cache()
    assert folder.is_dir()
    assert tmp_path not in folder.parents
