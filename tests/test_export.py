"""What is exported does as the network does, at sizes it was not traced at, and carries nothing of crbp."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import crbp
from crbp.cli import main
from crbp.data.pathfinder import Pathfinder
from crbp.export import FORMATS, FixedSteps, exported, to_onnx, to_pt2
from crbp.hub import from_pretrained
from crbp.models import FeedForwardNet, PathfinderNet

SHIPPED = Path(__file__).parents[1] / "results" / "pathfinder" / "weights" / "small5_hgru_bptt_k3.safetensors"
needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="the extra onnx is not installed",
)


def made(cell: str, gradient: crbp.GradientMethod | None = None, *, kernel_size: int = 3) -> PathfinderNet:
    inner = getattr(crbp.cells, cell)(3, kernel_size, horizon=4)
    return PathfinderNet(inner, crbp.Evolve(steps=3, gradient=gradient or crbp.RBP())).eval()


def run_file(file: Path, image: Tensor) -> Tensor:
    """Logits of an exported file, by the program that it is for."""
    if file.suffix == ".pt2":
        found: Tensor = torch.export.load(file).module()(image)
        return found
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])


def logits(net: PathfinderNet, image: Tensor, steps: int | None = None) -> Tensor:
    with torch.no_grad():
        return net(image, steps=steps).logits


@pytest.mark.parametrize("gradient", [crbp.BPTT(), crbp.RBP(), crbp.Phantom(window=2), crbp.CheckpointedBPTT()])
@pytest.mark.parametrize("cell", ["HGRU", "ConvLSTM", "ConvGRU"])
def test_fixed_steps_are_those_of_the_network(cell: str, gradient: crbp.GradientMethod) -> None:
    net, image = made(cell, gradient), torch.rand(2, 1, 9, 12)
    torch.testing.assert_close(FixedSteps(net)(image), logits(net, image), rtol=0, atol=1e-5)
    torch.testing.assert_close(FixedSteps(net, 5)(image), logits(net, image, 5), rtol=0, atol=1e-5)


def test_the_network_itself_stays_as_it_is() -> None:
    net: Any = made("HGRU").train()
    net.cell.fused = True
    fixed: Any = FixedSteps(net)
    assert net.training
    assert net.cell.fused
    assert net.cell.inhibition.method == "auto"
    assert (fixed.training, fixed.net.cell.fused, fixed.net.cell.inhibition.method) == (False, False, "direct")


def test_a_tolerance_does_not_end_fixed_steps() -> None:
    net, image = made("HGRU"), torch.rand(1, 1, 9, 9)
    expected = logits(net, image)
    net.evolve = replace(net.evolve, tolerance=1e9)
    torch.testing.assert_close(FixedSteps(net)(image), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cell", ["HGRU", "ConvLSTM"])
def test_the_file_of_torch_export_does_as_the_network(cell: str, tmp_path: Path) -> None:
    net, image = made(cell), torch.rand(3, 1, 11, 14)
    to_pt2(net, tmp_path / "net.pt2", steps=2)
    torch.testing.assert_close(run_file(tmp_path / "net.pt2", image), logits(net, image, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("channels", "image"), [(3, (4, 1, 60, 61)), (24, (1, 1, 20, 21)), (24, (2, 1, 40, 40))])
def test_it_does_so_on_either_side_of_the_size_where_native_code_is_worth_it(
    channels: int, image: tuple[int, ...]
) -> None:
    net, given = PathfinderNet(crbp.cells.HGRU(channels, 3), crbp.Evolve(steps=3)).eval(), torch.rand(image)
    expected = FixedSteps(net)(given)
    torch.testing.assert_close(exported(net).module()(given), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(net, given), expected, rtol=0, atol=1e-4)


def test_nothing_of_crbp_is_in_what_is_exported() -> None:
    net: Any = made("HGRU", kernel_size=15)
    for conv in (net.cell.inhibition, net.cell.excitation):
        conv.method = "fft"
    targets = {str(node.target) for node in exported(net, steps=1).graph.nodes if node.op == "call_function"}
    assert targets
    assert all(target.startswith(("aten.", "<built-in")) for target in targets), targets
    assert not any("fft" in target for target in targets)


@needs_onnx
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("cell", ["HGRU", "ConvLSTM"])
def test_the_onnx_file_does_as_the_network(cell: str, tmp_path: Path) -> None:
    import onnxruntime

    net, image = made(cell), torch.rand(3, 1, 11, 14)
    to_onnx(net, tmp_path / "net.onnx", steps=2)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    assert [each.name for each in session.get_outputs()] == ["logits"]
    found = session.run(None, {"image": image.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), logits(net, image, 2), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("kind", ["pt2", pytest.param("onnx", marks=needs_onnx)])
@pytest.mark.parametrize("name", ["small9_hgru_crbp", "small5_hgru_crbp_long"])
def test_a_trained_network_traces_alike_as_a_file(name: str, kind: str, times: int, tmp_path: Path) -> None:
    """Probabilities to 1e-5, and logits to 1e-5 of the largest, which is 10 to 17.

    And at most four times as far from those of float64 as the network's own are.
    """
    net: Any = from_pretrained(name)
    preset: Any = name.split("_")[0]
    sample = Pathfinder(preset=preset, split="test", size=1, seed=0)[0]
    image, steps = sample["image"][None], times * net.evolve.steps
    FORMATS[kind](net, tmp_path / f"net.{kind}", steps=steps)
    found, expected = run_file(tmp_path / f"net.{kind}", image), logits(net, image, steps)
    assert (expected.argmax(dim=1)[0].bool() == sample["mask"]).float().mean() > 0.99  # it is a tracing of the contour
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(found.softmax(dim=1), expected.softmax(dim=1), rtol=0, atol=1e-5)
    exact = logits(net.double(), image.double(), steps)
    assert (found - exact).abs().max() < 4 * (expected - exact).abs().max()


@pytest.mark.slow
def test_in_float64_a_trained_network_traces_alike_once_exported() -> None:
    net: Any = from_pretrained("small5_hgru_crbp_long").double()
    image = Pathfinder(preset="small5", split="test", size=1, seed=0)[0]["image"][None].double()
    torch.testing.assert_close(exported(net).module()(image), logits(net, image), rtol=0, atol=1e-10)


@needs_onnx
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_command_writes_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(SHIPPED), "--format", "onnx", "--steps", "2", "--out", f"{tmp_path}/net.onnx"]) == 0
    assert "2 steps" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["small5_hgru_bptt_k3", "small5_hgru_crbp_k3"])
def test_the_command_writes_torch_export(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a network of either gradient, without a warning."""
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(SHIPPED.with_name(f"{name}.safetensors")), "--steps", "2"]) == 0
    told = name + r"\.pt2: 2 steps, images of any size; differs by \de[+-]\d\d of the network.*"
    assert re.fullmatch(told, capsys.readouterr().out.rstrip())
    assert (tmp_path / f"{name}.pt2").is_file()


def test_a_file_that_does_otherwise_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoilt(net: Any, path: Path, *, steps: int | None) -> None:
        with torch.no_grad():
            net.filters.weight.mul_(1 + 1e-3)
        to_pt2(net, path, steps=steps)

    monkeypatch.setitem(FORMATS, "pt2", spoilt)
    assert main(["export", str(SHIPPED), "--steps", "2", "--out", str(tmp_path / "net.pt2")]) == 2
    message = (
        r"net\.pt2 is not written: it would differ by \d\.\de-0\d of the network's largest logit, where at most 1e-05"
    )
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.safetensors"], "absent.safetensors does not exist"),
        ([str(SHIPPED), "--steps", "0"], "steps must be a whole number of at least 1, not 0"),
        ([str(SHIPPED), "--format", "tflite"], "invalid choice: 'tflite'"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", *arguments, "--out", "unwritten.pt2"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("unwritten.pt2").exists()


def test_other_networks_are_refused() -> None:
    with pytest.raises(TypeError, match="a FeedForwardNet cannot be exported with fixed steps"):
        FixedSteps(FeedForwardNet(2, 3, depth=1))


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crbp.export, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'crbp\[onnx\]'"):
        to_onnx(made("HGRU"), tmp_path / "net.onnx")
