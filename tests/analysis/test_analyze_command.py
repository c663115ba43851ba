from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from crbp.cli import main
from crbp.tasks import Origin, save_net
from crbp.tasks.weights import build

CELL = {"class_path": "crbp.cells.HGRU", "init_args": {"channels": 3, "kernel_size": 3}}
EVOLVE = {"steps": 3, "gradient": {"class_path": "crbp.RBP"}}
NET = {"class_path": "crbp.models.PathfinderNet", "init_args": {"cell": CELL, "evolve": EVOLVE}}
FEEDFORWARD = {"class_path": "crbp.models.FeedForwardNet", "init_args": {"channels": 3, "kernel_size": 3}}
SOURCE = {"class_path": "crbp.tasks.Generated", "init_args": {"preset": "mini"}}
RUN = {"data": {"class_path": "crbp.tasks.ContourData", "init_args": {"source": SOURCE, "seed": 3}}}


def weights(path: Path, net: dict[str, object] = NET, run: dict[str, object] = RUN) -> Path:
    torch.manual_seed(0)
    made = build(torch.nn.Module, net, "the test's net")
    save_net(made.state_dict(), path, Origin(net=net, run=run, name="tiny"))
    return path


def test_a_page_of_numbers_and_figures_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = weights(tmp_path / "tiny.safetensors"), tmp_path / "out"
    assert main(["analyze", str(file), "--out", str(out), "--images", "8"]) == 0
    numbers = json.loads((out / "analysis.json").read_text())
    assert (numbers["trained_steps"], numbers["steps"], len(numbers["f1"]), numbers["task"]) == (3, 12, 12, "mini")
    assert len(numbers["spectral_radius"]) == len(numbers["moved"]) == 8
    page = (out / "report.html").read_text()
    figures = ("tracing", "filmstrip", "f1", "residual", "penalty", "state_space", "spectral_radius", "memory")
    for name in figures:
        assert (out / f"{name}.png").stat().st_size > 1000
        assert f'id="{name}"' in page
    assert 'id="training"' not in page  # it lies in no run's folder
    assert base64.b64encode((out / "tracing.gif").read_bytes()).decode() in page
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|url\(""", page)  # nothing is fetched
    memory = numbers["memory"]
    assert (memory["steps"], memory["gradient"]) == ([1, 3, 6, 12], "RBP")
    assert len(set(memory["own_bytes"])) == 1
    assert memory["bptt_bytes"] == sorted(set(memory["bptt_bytes"]))
    assert len(numbers["penalty"]) == 12
    assert len(numbers["state_space"]) == 12
    assert numbers["parameters"] == sum(p.numel() for p in build(torch.nn.Module, NET, "net").parameters())
    assert f"{numbers['f1_at_n']:.3f}" in page
    assert "report.html" in capsys.readouterr().out.replace("\n", "")
    # The images are those that the file says, until others are asked for.
    assert main(["analyze", str(file), "--out", str(out), "--images", "8", "--preset", "mini", "--seed", "3"]) == 0
    assert json.loads((out / "analysis.json").read_text())["residual"] == numbers["residual"]
    assert main(["analyze", str(file), "--out", str(out), "--images", "8", "--preset", "mini", "--steps", "5"]) == 0
    fewer = json.loads((out / "analysis.json").read_text())
    assert fewer["steps"] == 5
    assert fewer["residual"] != numbers["residual"][:5]  # other images


@pytest.mark.slow
def test_a_checkpoint_of_a_run_is_taken_as_well(tmp_path: Path) -> None:
    arguments = ["--trainer.max_steps", "2", "--trainer.logger.init_args.save_dir", str(tmp_path)]
    arguments += ["--trainer.limit_val_batches", "1", "--data.init_args.train_size", "32"]
    arguments += ["--data.init_args.lead_in_size", "16", "--trainer.val_check_interval", "1"]
    arguments += ["--trainer.log_every_n_steps", "1"]
    config = Path(__file__).parents[2] / "configs" / "pathfinder" / "mini_hgru_crbp.yaml"
    assert main(["fit", "--config", str(config), *arguments]) == 0
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    for file in (checkpoint, checkpoint.parent.parent / "weights" / "last.safetensors"):
        assert main(["analyze", str(file), "--out", str(tmp_path / file.suffix), "--images", "4"]) == 0
    both = [json.loads((tmp_path / suffix / "analysis.json").read_text()) for suffix in (".ckpt", ".safetensors")]
    assert both[0]["f1"] == both[1]["f1"]
    for name in ("train/penalty", "val/penalty", "val/residual"):
        assert len(both[0]["penalty_in_training"][name]) >= 1
    assert both[0]["penalty_in_training"] == both[1]["penalty_in_training"]
    assert both[0]["memory"]["penalty"] == "LipschitzPenalty"
    assert 'id="training"' in (tmp_path / ".ckpt" / "report.html").read_text()
    # The folder of the run names its weights, and a comparison takes it and an analysis.
    out = ["--out", str(tmp_path / "both"), "--images", "4"]
    names = [f"run={checkpoint.parent.parent}", f"analysed={tmp_path / '.ckpt'}"]
    assert main(["compare", *names, *out]) == 0
    models = json.loads((tmp_path / "both" / "comparison.json").read_text())["models"]
    assert list(models) == ["run", "analysed"]
    assert models["analysed"]["checkpoint"] == str(checkpoint)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--images", "1"], "--images must be at least 2, not 1"),
        (["--steps", "3"], "above the 3 trained for, not 3"),
        (["--seed", "-1"], "-1"),
        (["--preset", "nope"], "nope"),
        (["--out", "/dev/null/x"], "/dev/null"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = weights(tmp_path / "tiny.safetensors")
    assert main(["analyze", str(file), "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error


def test_what_cannot_be_analysed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = tmp_path / "lost" / "checkpoints" / "last.ckpt"
    lost.parent.mkdir(parents=True)
    shutil.copy(weights(tmp_path / "any.safetensors"), lost)
    cases = {
        tmp_path / "absent.safetensors": "does not exist",
        weights(tmp_path / "flat.safetensors", FEEDFORWARD): "is of a FeedForwardNet; give a recurrent model",
        weights(tmp_path / "alone.safetensors", run={}): "choose a task with --preset",
        lost: "config.yaml",
    }
    for file, message in cases.items():
        assert main(["analyze", str(file), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
