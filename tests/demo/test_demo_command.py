"""The demo's command, through its real processes at its quick size."""

import json

import pytest
import torch

from crbp.analysis import arrival_steps
from crbp.cli import main
from crbp.tasks import load_net

NUMBERS = {
    "f1_at_n",
    "f1_at_4n",
    "all_strokes_f1",
    "bptt_f1_at_n",
    "bptt_f1_at_4n",
    "residual_at_4n",
    "seconds",
}


@pytest.mark.slow
def test_the_quick_demo_writes_what_it_promises(tmp_path, capsys):
    out, file = tmp_path / "demo", tmp_path / "numbers.json"
    assert main(["demo", "--quick", "--out", str(out), "--json", str(file)]) == 0
    numbers = json.loads(file.read_text())
    assert numbers.keys() >= NUMBERS
    assert all(0 < numbers[key] <= 1 for key in NUMBERS if "f1" in key)
    page = (out / "report.html").read_text()
    for name in ("tracing", "filmstrip", "f1", "residual", "spectral_radius", "memory"):
        assert (out / f"{name}.png").stat().st_size > 1000
        assert f'id="{name}"' in page
    assert f"{numbers['f1_at_n']:.3f}" in page
    assert "report.html" in capsys.readouterr().out.replace("\n", "")
    # Memory is flat in the number of steps for C-RBP and grows for BPTT.
    assert len(set(numbers["memory_mib"].values())) == 1
    assert numbers["bptt_memory_mib"]["64"] > 5 * numbers["bptt_memory_mib"]["4"]
    for name in ("crbp", "bptt"):
        net = load_net(out / f"{name}.safetensors")
        assert net(torch.zeros(1, 1, 32, 32)).logits.shape == (1, 2, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--seed", "-1"], "-1"),
        (["--seed", "x"], "x"),
        (["--nope"], "--nope"),
        (["--json", "/dev/null/x.json"], "/dev/null"),
    ],
)
def test_a_mistake_is_one_line(arguments, named, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error


def test_a_pixel_arrives_when_it_stays():
    probability = torch.tensor([[0.9, 0.1, 0.9, 0.2], [0.1, 0.2, 0.9, 0.9], [0.9, 0.3, 0.9, 0.9]])[:, None]
    assert arrival_steps(probability).tolist() == [[3, 0, 1, 2]]
