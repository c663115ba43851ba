"""`crbp bench` at its quick size: what it writes, and the identities that hold at any size."""

import json
import platform
from dataclasses import asdict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crbp.bench import command, devices, measure, tables
from crbp.bench.measure import Pair, Size, in_process, in_turns, spread
from crbp.bench.speed import convolution_count, exponent
from crbp.cli import main
from crbp.errors import CrbpError
from crbp.ops import convolution


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """The quick numbers of three parts, through the command."""
    out = tmp_path_factory.mktemp("bench")
    file = out / "elsewhere" / "numbers.json"
    quick = ["bench", "--quick", "--threads", "1", "--out", str(out), "--json", str(file)]
    assert main([*quick, "--only", "step", "solvers", "memory"]) == 0
    for name in ("solvers", "memory"):
        assert (out / f"{name}.png").stat().st_size > 1000
    found = json.loads(file.read_text())
    assert found == json.loads((out / "bench.json").read_text())
    return found


def test_the_machine_is_named(numbers):
    assert numbers["quick"] is True
    assert list(numbers["parts"]) == ["step", "solvers", "memory"]
    assert numbers["environment"]["torch"] == torch.__version__
    assert numbers["environment"]["threads"] == 1
    assert numbers["environment"].keys() >= {"commit", "cores", "processor", "python", "crbp", "date"}


def test_both_codes_take_the_same_step(numbers):
    step = numbers["parts"]["step"]
    assert step["not_fused"]["loss_difference"] == step["loss_difference"]  # at the quick size neither is fused
    assert step["eager"]["loss_difference"] < 1e-5
    assert step["loss_difference"] < 1e-5
    assert step["gradient_difference"] < 1e-3
    # Float32 against float64 is what both are away from the truth by; crbp is no further than a few times that.
    errors = {name: found["gradient_error"] for name, found in step["float64"].items()}
    assert 0 < errors["crbp"] < 10 * errors["textbook"]
    for name in ("crbp", "textbook", "speedup"):
        assert 0 < step[name]["min"] <= step[name]["median"] <= step[name]["max"]
        assert step[name]["repeats"] == 3


def test_memory_is_flat_for_c_rbp_and_linear_for_bptt(numbers):
    memory = numbers["parts"]["memory"]
    saved = {name: [row["saved_bytes"] for row in curve["rows"]] for name, curve in memory["methods"].items()}
    assert len(set(saved["C-RBP"])) == 1
    assert saved["C-RBP"][0] < saved["BPTT"][0]
    a, b, c = memory["steps"]
    low, middle, high = saved["BPTT"]
    assert (middle - low) * (c - b) == (high - middle) * (b - a)
    for curve in memory["methods"].values():
        assert curve["stopped_before"] is None
        assert all(row["peak_bytes"] >= 0 for row in curve["rows"])
    paper = memory["paper"]
    for row in paper["rows"]:
        assert row["crbp_bytes"] > row["bptt_one_step_bytes"] > 0
        assert row["saved_ratio"] == pytest.approx(row["crbp_bytes"] / row["bptt_one_step_bytes"])
        assert row["crbp_peak_bytes"] >= 0
    assert [(row["fused"], row["batch"]) for row in paper["rows"]] == [(False, 1), ("eager", 2)]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps what tensors give back")
def test_a_step_of_c_rbp_grows_the_process_alike_at_any_number_of_steps():
    def grown(method: str, steps: int) -> int:
        size = Size(channels=8, kernel_size=5, image=64, batch=2, terms=3, fused=False, steps=steps)
        return in_process("crbp.bench.probe", {"size": asdict(size), "method": method}, what=method)["peak_bytes"]

    few = grown("C-RBP", 4)
    assert grown("C-RBP", 40) == pytest.approx(few, rel=0.05)
    assert grown("BPTT", 40) > 2 * few


def test_solvers_close_in_on_the_gradient(numbers):
    (solved,) = numbers["parts"]["solvers"]["networks"].values()
    assert solved["reference"]["residual"] < 1e-8
    assert 0.5 < solved["spectral_radius"] < 1  # trained, and trained to contract
    for errors in solved["relative_error"].values():
        assert errors[-1] < errors[0]
        assert errors[-1] < solved["one_step_error"]
    # No solver that spends as many products has a smaller residual than GMRES; its error is smallest in the end too.
    last = {name: errors[-1] for name, errors in solved["relative_error"].items()}
    assert last["GMRES"] < last["Neumann"]


@pytest.mark.slow
def test_the_other_parts(tmp_path):
    out = tmp_path / "bench"
    others = ["compiling", "kernels", "time_to_f1", "precision", "scaling", "roofline", "images", "rollout"]
    assert main(["bench", "--quick", "--threads", "1", "--out", str(out), "--only", *others]) == 0
    parts = json.loads((out / "bench.json").read_text())["parts"]
    assert [row["kernel_size"] for row in parts["kernels"]["rows"]] == [3, 5, 9]
    assert all(1e-4 < row["gradient_error_overall"] < 0.2 for row in parts["precision"]["rows"])
    assert all(row["gradient_difference"] < 1e-2 for row in parts["kernels"]["rows"])
    assert parts["compiling"]["empty"]["median"] > parts["compiling"]["filled"]["median"] > 0
    assert 0 < parts["images"]["mini"]["median"] < 100
    race = parts["time_to_f1"]["codes"]
    assert race["crbp"]["speedup_per_image"] > 0
    assert [point["images"] for point in race["crbp"]["curve"]] == [80, 160]
    # The same weights, batches and optimiser: float32 sets the two apart only slowly.
    first = [race[name]["curve"][0]["f1"] for name in ("crbp", "textbook")]
    assert first[0] == pytest.approx(first[1], abs=0.02)
    for axis in ("batch", "image", "channels"):
        assert len(parts["scaling"][axis]["rows"]) == 2
    least = parts["roofline"]["least_seconds"]
    assert least["direct"] > 0
    assert least["fft"] > 0
    assert least["elementwise"] > 0
    assert all(seconds > 0 for seconds in parts["roofline"]["measured_seconds"].values())
    ways = parts["rollout"]["rows"][0]["seconds"]
    assert all(0 < ways[name]["median"] < ways[name]["first_seconds"] for name in ("fused", "compiled"))
    assert all(found["difference"] < 1e-5 for found in ways.values())


def test_ways_to_convolve_come_to_the_same(tmp_path):
    out = tmp_path / "bench"
    assert main(["bench", "--quick", "--device", "cpu", "--out", str(out), "--only", "convolutions"]) == 0
    (row,) = json.loads((out / "bench.json").read_text())["parts"]["convolutions"]["rows"]
    for name, found in row["seconds"].items():
        assert found["min"] > 0
        assert 0 < found["error"] < (1e-2 if "bfloat16" in name else 1e-6)
    assert row["seconds"]["direct, bfloat16"]["error"] > 1e-4


def test_the_spectrum_of_a_kernel_is_there_when_a_convolution_is_timed(monkeypatch):
    transformed = []
    transform = convolution.spectrum
    monkeypatch.setattr(convolution, "spectrum", lambda *given: transformed.append(given) or transform(*given))
    devices.convolutions(quick=True, device="cpu")
    assert len(transformed) == 1


def test_each_part_has_a_table_and_those_of_any_device_take_it():
    assert set(tables.TABLES) == {*command.ANYWHERE, *command.ON_CPU}
    with pytest.raises(CrbpError, match="memory is for the CPU"):
        command.main(["--device", "cuda", "--only", "step", "memory"])


def test_all_of_a_size_is_on_its_device():
    size = Size(channels=4, kernel_size=5, image=8, fused=False, device="meta")
    assert all(each.is_meta for each in (*size.net().parameters(), *size.data()))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--device", "gpu"], "not gpu"),
        (["--device", "meta"], "not meta"),
        (["--device", "cuda:4711"], "cuda:4711 cannot be used here"),
        (["--threads", "0"], "0"),
        (["--threads", "x"], "x"),
        (["--only", "nothing"], "nothing"),
        (["--onl", "step"], "--onl"),
        (["--json", "/dev/null/x.json"], "/dev/null"),
    ],
)
def test_a_mistake_is_one_line(arguments, named, tmp_path, capsys):
    assert main(["bench", "--quick", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error


def test_it_needs_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "CHECKOUT", tmp_path)
    measure.textbook.cache_clear()
    assert main(["bench", "--out", str(tmp_path / "out")]) == 2
    assert "only a checkout of crbp has" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    measure.textbook.cache_clear()


def test_the_convolutions_of_a_step_are_counted_right():
    size = Size(channels=3, kernel_size=5, image=8, batch=1, steps=4, terms=2, fused=False)
    kernel, found = (3, 3, 5, 5), 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal found
            packet = function.overloadpacket
            if packet is torch.ops.aten.convolution:
                found += tuple(args[1].shape) == kernel
            elif packet is torch.ops.aten.convolution_backward and tuple(args[2].shape) == kernel:
                found += args[10][0] + args[10][1]
            return function(*args, **(kwargs or {}))

    job = Pair.of(size).theirs
    with Count():
        job()
    # Two more are gradients of kernels in the second derivative, which PyTorch words as convolutions with an image.
    assert found + 2 == convolution_count(size)


def test_exponents_are_those_of_a_power_law():
    assert exponent([1, 2, 5], [3.0, 12.0, 75.0]) == pytest.approx(2)


def test_jobs_take_turns():
    order = []
    seconds = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert "".join(order) == "ababab"
    assert [len(each) for each in seconds.values()] == [3, 3]
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "repeats": 3}


def test_without_a_compiler_the_roll_out_says_what_is_needed(monkeypatch):
    def broken(*_):
        raise torch._inductor.exc.TritonMissing(None)

    make_cell = devices.make_cell
    monkeypatch.setattr(devices, "make_cell", lambda *sizes, fused: make_cell(*sizes, fused=False))
    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    with pytest.raises(CrbpError, match=r"Cannot find a working triton.*--only"):
        devices.rollout(quick=True, device="cpu")
