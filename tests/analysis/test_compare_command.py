from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from crbp._checkpoint import checkpoint_file
from crbp.analysis import follow, late_radius, memory_curve
from crbp.analysis.inputs import images_of
from crbp.cli import main
from crbp.errors import CrbpError
from crbp.hub import save_pretrained, shipped
from crbp.tasks import Generated, Origin, load_net, save_net
from crbp.tasks.weights import build

CELL = {"class_path": "crbp.cells.HGRU", "init_args": {"channels": 3, "kernel_size": 3}}


def net(steps: int, gradient: str) -> dict[str, Any]:
    evolve = {"steps": steps, "gradient": {"class_path": gradient}}
    return {"class_path": "crbp.models.PathfinderNet", "init_args": {"cell": CELL, "evolve": evolve}}


def data(preset: str, **settings: Any) -> dict[str, Any]:
    source = {"class_path": "crbp.tasks.Generated", "init_args": {"preset": preset, "settings": settings}}
    return {"data": {"class_path": "crbp.tasks.ContourData", "init_args": {"source": source, "seed": 3}}}


def weights(path: Path, *, steps: int = 2, gradient: str = "crbp.BPTT", run: Any = None) -> Path:
    torch.manual_seed(steps)
    config = net(steps, gradient)
    made = build(torch.nn.Module, config, "the test's net")
    save_net(made.state_dict(), path, Origin(net=config, run=data("mini") if run is None else run, name="tiny"))
    return path


def compared(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "comparison.json").read_text())
    return found


def test_every_number_is_that_of_the_model_on_the_same_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = weights(tmp_path / "short.safetensors", steps=2)
    long = weights(tmp_path / "long.safetensors", steps=3, gradient="crbp.RBP")
    out = tmp_path / "out"
    assert main(["compare", str(short), f"C-RBP <3>={long}", "--images", "4", "--out", str(out)]) == 0
    found = compared(out)
    assert (found["task"], found["seed"], found["images"], found["steps"]) == ("mini", 3, 4, 12)
    assert list(found["models"]) == ["tiny", "C-RBP <3>"]
    seen = images_of(Generated(preset="mini"), 4, seed=3)
    for file, n, numbers in zip((short, long), (2, 3), found["models"].values(), strict=True):
        made: Any = load_net(file)
        wanted = follow(made, seen.image, seen.mask, steps=12)
        assert numbers["trained_steps"] == n
        assert numbers["f1"] == pytest.approx(wanted.f1.tolist())
        assert numbers["f1_at_n"] == pytest.approx(float(wanted.f1[n - 1]))
        assert numbers["f1_at_4n"] == pytest.approx(float(wanted.f1[4 * n - 1]))
        assert numbers["residual_at_4n"] == pytest.approx(float(wanted.residual[4 * n - 1]), rel=1e-3)
        radius, _ = late_radius(made, seen.image, steps=4 * n)
        assert numbers["median_radius"] == pytest.approx(float(radius.median()), rel=1e-3)
        for module in made.modules():
            module.fused = False
        kept = memory_curve(made, seen.image[:1], gradient=made.evolve.gradient, steps=(n, 4 * n))
        assert [numbers["memory_bytes_at_n"], numbers["memory_bytes_at_4n"]] == kept
    page = (out / "report.html").read_text()
    assert "C-RBP &lt;3&gt;" in page
    assert "<3>" not in page
    assert page.count('type="range"') == 1
    told = capsys.readouterr().out
    assert "the same 4 images of mini (validation split, seed 3) for all" in told
    assert f"{found['models']['tiny']['f1_at_4n']:.3f}" in told


def test_what_a_model_was_trained_on_need_not_be_there_where_a_task_is_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = {"class_path": "crbp.tasks.Folders", "init_args": {"val": str(tmp_path / "moved away")}}
    other = {"data": {"class_path": "crbp.tasks.ContourData", "init_args": {"source": folder}}}
    files = [
        str(weights(tmp_path / name, run=run)) for name, run in (("a.safetensors", None), ("b.safetensors", other))
    ]
    arguments = ["--images", "4", "--out", str(tmp_path / "out")]
    assert main(["compare", *files, *arguments, "--preset", "mini"]) == 0
    assert [model["task"] for model in compared(tmp_path / "out")["models"].values()] == ["mini", "Folders"]
    capsys.readouterr()
    assert main(["compare", *files, *arguments]) == 2  # their size is not known
    assert "moved away" in capsys.readouterr().err


def test_models_of_one_name_are_told_apart_and_images_can_be_chosen(tmp_path: Path) -> None:
    file = weights(tmp_path / "a.safetensors")
    out = tmp_path / "out"
    chosen = ["--preset", "mini", "--seed", "5", "--images", "2", "--out", str(out)]
    assert main(["compare", str(file), str(file), rf"_[/x]$\foo$<img>={file}", *chosen]) == 0
    found = compared(out)
    assert list(found["models"]) == ["tiny", "tiny (2)", r"_[/x]$\foo$<img>"]
    assert "<img>" not in (out / "report.html").read_text(encoding="utf-8")
    assert (found["task"], found["seed"]) == ("mini", 5)
    assert found["models"]["tiny"]["f1"] == found["models"]["tiny (2)"]["f1"]


def test_images_of_different_sizes_are_refused_until_a_task_is_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = weights(tmp_path / "one.safetensors")
    other = weights(tmp_path / "other.safetensors", run=data("mini", image_size=40))
    size = Generated(preset="mini").config.image_size
    arguments = ["compare", str(one), str(other), "--images", "2", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"tiny was trained on images of {size}×{size} (mini) and tiny (2) of 40×40 (mini)" in error
    assert "--preset" in error
    assert error.count("\n") == 1
    assert main([*arguments, "--preset", "mini"]) == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["{a}"], "at least 2 networks are compared, not 1"),
        (["{a}", "nope"], "nope does not exist"),
        (["{a}", "{folder}"], "name a file of weights"),
        (["{a}", "{folder}/x.json"], "does not say which weights"),
        (["{a}", "{a}", "--images", "1"], "--images must be at least 2, not 1"),
        (["{alone}", "{a}"], "choose a task with --preset"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    places = {
        "a": weights(tmp_path / "a.safetensors"),
        "alone": weights(tmp_path / "alone.safetensors", run={}),
        "folder": tmp_path / "folder",
    }
    given = [each.format(**places) for each in arguments]
    assert main(["compare", *given, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error


def test_what_a_checkpoint_may_be_named_by(tmp_path: Path) -> None:
    file = weights(tmp_path / "run" / "weights" / "best.safetensors")
    assert checkpoint_file(file) == file
    assert checkpoint_file(tmp_path / "run") == file
    (tmp_path / "run" / "analysis").mkdir()
    (tmp_path / "run" / "analysis" / "analysis.json").write_text(json.dumps({"checkpoint": str(file)}))
    assert checkpoint_file(tmp_path / "run" / "analysis") == file
    assert checkpoint_file(tmp_path / "run" / "analysis" / "analysis.json") == file
    assert checkpoint_file(save_pretrained(file, tmp_path / "net")) == tmp_path / "net" / "model.safetensors"
    assert checkpoint_file(Path("small9_hgru_crbp")) == shipped()["small9_hgru_crbp"]
    assert checkpoint_file(Path("absent.safetensors")) == Path("absent.safetensors")
    (tmp_path / "run" / "analysis" / "analysis.json").write_text(json.dumps({"checkpoint": "moved/best.ckpt"}))
    with pytest.raises(CrbpError, match=r"analysis\.json is of moved/best\.ckpt, which is not there"):
        checkpoint_file(tmp_path / "run" / "analysis")
    with pytest.raises(CrbpError, match="it has 5000 letters"):
        checkpoint_file(Path("a" * 5000))
    (tmp_path / "run" / "analysis" / "analysis.json").write_text("[1]")
    with pytest.raises(CrbpError, match="does not say which weights"):
        checkpoint_file(tmp_path / "run" / "analysis")


def test_states_that_do_not_stay_finite_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, wild = weights(tmp_path / "a.safetensors"), tmp_path / "wild.safetensors"
    config = net(2, "crbp.BPTT")
    made = build(torch.nn.Module, config, "the test's net")
    state = {name: 1e30 * value for name, value in made.state_dict().items()}
    save_net(state, wild, Origin(net=config, run=data("mini"), name="wild"))
    out = tmp_path / "out"
    assert main(["compare", str(file), str(wild), "--images", "2", "--out", str(out)]) == 0
    assert compared(out)["models"]["wild"]["median_radius"] is None
    assert "not finite" in capsys.readouterr().out
    assert (out / "report.html").stat().st_size > 10_000
