from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import crbp.cli
from crbp import NonFiniteWarning, __version__
from crbp._command import EXAMPLES
from crbp.cli import COMMANDS, main
from crbp.data.panoptic import ids_from_rgb
from crbp.tasks import GeneratedShapes, WeightsError, load_net, load_trained

MINI = str(Path(__file__).parents[1] / "configs" / "pathfinder" / "mini_hgru_crbp.yaml")
TINY = [
    *("--config", MINI, "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--model.net.cell.channels", "2", "--model.net.cell.kernel_size", "3", "--model.net.evolve.steps", "3"),
    *("--model.step_jitter", "1"),
    *("--data.batch_size", "4", "--data.train_size", "8", "--data.val_size", "4", "--data.test_size", "3"),
]

SHAPES = str(Path(__file__).parents[1] / "configs" / "panoptic" / "mini_rfpn_crbp10.yaml")
NET = "--model.net"
TINY_PANOPTIC = [
    *("--config", SHAPES, "--trainer.val_check_interval", "1.0", "--trainer.log_every_n_steps", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *(f"{NET}.backbone.width", "16", f"{NET}.backbone.channels", "32", f"{NET}.masks.channels", "32"),
    *(f"{NET}.masks.size", "6", f"{NET}.semantic.channels", "32", f"{NET}.boxes.channels", "32"),
    *(f"{NET}.boxes.score", "0", f"{NET}.boxes.detections", "5", f"{NET}.evolve.steps", "2"),
    *(f"{NET}.merge.score", "0", f"{NET}.merge.stuff_area", "0", "--model.average_precision", "false"),
    *("--data.source.size", "128", "--data.source.train", "2", "--data.source.val", "1", "--data.batch_size", "2"),
    *("--data.shortest", "[64]", "--data.shortest_test", "64", "--data.longest", "128", "--data.workers", "0"),
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake is told in."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("crbp: error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("crbp: error: ")


def test_help_names_every_command_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in COMMANDS:
        assert f"  {name} " in shown
        assert EXAMPLES[f"crbp {name}"][0] in shown
    assert main([]) == 0
    assert capsys.readouterr().out == shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"crbp {__version__}\n"


@pytest.mark.parametrize("command", ["fit", "generate"])
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--trust PACKAGE" in shown if command == "fit" else f"crbp {command}" in shown


MISTAKES = [
    (["nope"], "'nope' is no command of crbp; choose one of fit, validate"),
    (["fit"], "required: fit.data, fit.model (see crbp fit --help"),
    (["fit", "--config", "absent.yaml"], "File does not exist"),
    (["fit", *TINY, "--model.net.cell", "crbp.cells.HGRUU"], "has no attribute 'HGRUU'; it has HGRU"),
    (
        ["fit", *TINY, "--seed_everything", "9223372036854775807"],
        "seed_everything: 9223372036854775807 is not in bounds",
    ),
    (["fit", *TINY, "--model.lerning_rate", "1"], "Option 'lerning_rate' is not accepted"),
    (["fit", *TINY, "--trainer.max_epoch", "1"], "--trainer.max_epoch"),
    (["fit", *TINY_PANOPTIC, "--model.net.boxes.sample", "3"], "unrecognized arguments: --boxes.sample=3"),
    (["fit", *TINY, "--model.net.evolve.steps", "-3"], "steps must be a whole number of at least 1, not -3"),
    (["fit", *TINY, "--model.net.evolve.steps", "many"], "model.net.evolve.steps: "),
    (["fit", *TINY, "--model.penalty.weight", "-1"], "weight must be finite and above 0"),
    (["fit", *TINY, "--model.supervision", "all"], "needs a gradient method that keeps the graph"),
    (["fit", *TINY, "--data.source.preset", "pf15"], "preset='pf15' is unknown; choose one of"),
    (["fit", *TINY, "--data.source.settings", "{dashes: 3}"], "dashes"),
    (["fit", *TINY, "--data.source", "{class_path: crbp.tasks.Folders, init_args: {train: none}}"], "no folder none"),
    (["fit", *TINY, "--ckpt_path", "absent.ckpt"], "the checkpoint absent.ckpt does not exist; crbp fit writes"),
    (["validate", *TINY, "--ckpt_path", MINI], "cannot be read: it is damaged, or not a .ckpt"),
    (["fit", *TINY, "--ckpt_path", "last.safetensors"], "last.safetensors holds weights alone"),
    (["test", *TINY, "--ckpt_path", "last.safetensors"], "the checkpoint last.safetensors does not exist"),
    (["validate", *TINY], "crbp validate is for a trained network, and this one has no weights; give --ckpt_path"),
    (["test", *TINY], "crbp test is for a trained network"),
    (["predict", "--data.predict", "pictures"], "no class is given; give --config FILE"),
    (["predict", *TINY], "crbp predict is for a trained network"),
    (["test", *TINY, "--ckpt_path", "last"], "crbp test is for a trained network"),
    (["test", *TINY_PANOPTIC, "--model.weights", "imagenet"], "crbp test is for a trained network"),
    (["test", *TINY_PANOPTIC, "--model.weights", "absent.pkl"], "absent.pkl does not exist"),
    (["fit", *TINY, "--trainer.accelerator", "abacus"], "invalid accelerator name"),
    (["generate", "--out", "x", "--shard", "3"], "'3' is not of the form I/N"),
    (["generate", "--out", "x", "--image-size", "2"], "image_size=2 is outside"),
    (["generate", "--out", "x", "--size", "0"], "size=0"),
    (["generate", "--out", "x", "--colour", "red"], "unrecognized arguments: --colour red"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(case[0][-2:]) for case in MISTAKES])
def test_mistakes_are_told_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in complaint(capsys, *arguments)


def test_broken_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("model: [1\n", encoding="utf-8")
    assert "parsing" in complaint(capsys, "fit", "--config", "a.yaml")


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(crbp.cli, "find_spec", lambda name: None if name == "lightning" else object())
    assert complaint(capsys, "fit") == (
        "this command needs lightning, not installed here; run: pip install 'crbp[train]'"
    )


def test_faults_of_crbp_show_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(arguments: list[str]) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setitem(COMMANDS, "demo", COMMANDS["demo"]._replace(run=fault))
    with pytest.raises(RuntimeError, match="a fault"):
        main(["demo"])


def test_a_run_broken_off_ends_quietly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "demo", COMMANDS["demo"]._replace(run=interrupted))
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == ""


def test_interrupt_within_training(monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    from crbp.tasks import ContourTask

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ContourTask, "training_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert main(["fit", *TINY]) == 130
    finally:
        signal.signal(signal.SIGINT, before)  # the trainer turns it off for good


@pytest.mark.slow
def test_training_says_what_compiling_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *TINY]) == 0
    assert "compiling" not in capsys.readouterr().err
    assert main(["fit", *TINY, "--model.net.cell.fused", "true"]) == 0
    (seconds,) = re.findall(
        r"^crbp: compiling fused cells took (\d+) s of the training$", capsys.readouterr().err, re.M
    )
    assert int(seconds) > 0


def test_from_training_to_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *TINY]) == 0
    run = tmp_path / "runs" / "mini_hgru_crbp" / "version_0"
    checkpoint = run / "checkpoints" / "best.ckpt"
    assert checkpoint.exists()
    assert (run / "checkpoints" / "last.ckpt").exists()
    assert list(run.glob("events.out.tfevents.*"))
    net: Any = load_net(run / "weights" / "best.safetensors")
    assert net.evolve.steps == 3
    code = json.loads((run / "code.json").read_text())
    assert code["crbp"] == __version__
    assert load_trained(run / "weights" / "best.safetensors")[1].code == code
    assert load_trained(checkpoint)[1].code == code
    (run / "code.json").unlink()  # as of a run of before
    assert load_trained(checkpoint)[1].code == {}
    (run / "code.json").write_text("[1]")
    with pytest.raises(WeightsError, match="no mapping of texts"):
        load_trained(checkpoint)

    # A run that was killed between its last checkpoint and its last weights has these when it is resumed.
    last = str(run / "checkpoints" / "last.ckpt")
    weights = load_net(run / "weights" / "last.safetensors").state_dict()
    (run / "weights" / "last.safetensors").unlink()
    assert main(["fit", *TINY, "--ckpt_path", last]) == 0
    torch.testing.assert_close(load_net(run / "weights" / "last.safetensors").state_dict(), weights, rtol=0, atol=0)

    # A resumed run goes on in its own folder, with what the command line adds.
    assert main(["fit", *TINY, "--trainer.max_epochs", "2", "--ckpt_path", last]) == 0
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    assert torch.load(last, weights_only=True)["global_step"] == 4

    again = ["--config", str(run / "config.yaml"), "--trainer.logger", "false", "--ckpt_path", str(checkpoint)]
    capsys.readouterr()
    assert main(["validate", *again]) == 0
    assert "val/f1" in capsys.readouterr().out
    assert main(["test", *again]) == 0
    measured = capsys.readouterr().out
    assert "test/f1" in measured
    assert main(["test", *again[:-1], str(run / "weights" / "best.safetensors")]) == 0  # the same weights
    assert capsys.readouterr().out == measured
    assert main(["predict", *again, "--out", "seen"]) == 0
    assert sorted(path.name for path in (tmp_path / "seen").iterdir()) == [f"{i:07d}.png" for i in range(3)]

    other = ["--model.net.cell.channels", "3", "--ckpt_path", last]
    assert "does not fit the model of this configuration" in complaint(capsys, "validate", *TINY, *other)
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(checkpoint.read_bytes()[:1000])
    assert "cannot be read" in complaint(capsys, "validate", *TINY, "--ckpt_path", str(broken))


def test_from_training_to_panoptic_maps_of_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *TINY_PANOPTIC]) == 0
    run = tmp_path / "runs" / "mini_rfpn_crbp10" / "version_0"
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    sizes = {"wide": (90, 70), "high": (50, 80)}
    for place, (name, size) in enumerate(sizes.items()):
        Image.effect_noise(size, 50 + place).convert("RGB").save(pictures / f"{name}.png")
    asked = ["--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    asked += ["--trainer.logger", "false", "--data.predict", "pictures", "--out", "seen"]
    assert main(["predict", *asked]) == 0
    assert {path.name for path in (tmp_path / "seen").iterdir()} == {
        f"{name}{end}" for name in sizes for end in (".png", "_panoptic.png", ".json")
    }
    weights = ["--config", str(run / "config.yaml"), "--trainer.logger", "false", "--data.predict", "pictures"]
    weights += ["--model.weights", str(run / "weights" / "last.safetensors"), "--out", "seen by weights"]
    assert main(["predict", *weights]) == 0
    for file in (tmp_path / "seen").iterdir():
        assert (tmp_path / "seen by weights" / file.name).read_bytes() == file.read_bytes()
    assert "crbp predict is for a trained" in complaint(capsys, "predict", *weights, "--model.without", "[rpn.]")
    names = {each.id: each.name for each in GeneratedShapes(size=128).categories.entries}
    for name, (width, height) in sizes.items():
        told = json.loads((tmp_path / "seen" / f"{name}.json").read_text(encoding="utf-8"))
        assert (told["height"], told["width"]) == (height, width)
        with Image.open(tmp_path / "seen" / f"{name}_panoptic.png") as picture:
            ids = ids_from_rgb(np.asarray(picture))
        assert ids.shape == (height, width)
        segments = told["segments_info"]
        assert segments
        assert {each["id"]: each["area"] for each in segments} == {
            number: int((ids == number).sum()) for number in set(ids.flatten().tolist()) - {0}
        }
        for each in segments:
            assert each["name"] == names[each["category_id"]]
            assert ("score" in each) == (each["category_id"] <= 10)


def test_a_resumed_run_keeps_its_table_of_metrics(tmp_path: Path) -> None:
    logger = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "runs"]
    named = ["--trainer.logger.name", "unnamed"]  # as the default has it: the configuration's
    assert main(["fit", *TINY, *logger, *named]) == 0
    run = tmp_path / "runs" / "mini_hgru_crbp" / "version_0"
    before = (run / "metrics.csv").read_text()
    last = str(run / "checkpoints" / "last.ckpt")
    assert main(["fit", *TINY, *logger, *named, "--trainer.max_epochs", "2", "--ckpt_path", last]) == 0
    assert (run / "metrics_0.csv").read_text() == before
    assert (run / "metrics.csv").read_text() != before


@pytest.mark.filterwarnings("ignore::crbp.DivergenceWarning")
def test_a_run_whose_numbers_are_not_finite_ends_with_their_source(capsys: pytest.CaptureFixture[str]) -> None:
    wrecked = ["fit", *TINY, "--model.learning_rate", "1e30", "--model.net.evolve.on_divergence", "warn"]
    wrecked += ["--trainer.max_epochs", "40", "--trainer.limit_val_batches", "0"]
    wrecked += ["--trainer.enable_checkpointing", "false", "--trainer.enable_model_summary", "false"]
    assert "the loss is nan of finite images and weights; lower learning_rate" in complaint(capsys, *wrecked)
    skip = ["--trainer.callbacks+=crbp.tasks.NonFinite", "--trainer.callbacks.policy=skip"]
    with pytest.warns(NonFiniteWarning, match="the step is skipped"):
        said = complaint(capsys, *wrecked, *skip)
    assert "more than 10 steps in a row" in said


def test_generated_folders_can_be_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = ["generate", "--preset", "mini", "--size", "8", "--workers", "1"]
    for split in ("train", "val"):
        assert main([*made, "--split", split, "--out", split]) == 0
    assert capsys.readouterr().out.startswith("8 images made, 0 kept from before: train")
    assert main([*made, "--split", "val", "--out", "val", "--seed", "1"]) == 2
    source = {"class_path": "crbp.tasks.Folders", "init_args": {"train": "train", "val": "val"}}
    arguments = [*TINY, "--data.source", json.dumps(source)]
    assert main(["fit", *arguments]) == 0
    assert "it holds 8 images of 9; set train_size=8" in complaint(capsys, "fit", *arguments, "--data.train_size", "9")
    arguments += ["--ckpt_path", "runs/mini_hgru_crbp/version_0/weights/last.safetensors"]
    assert "no folder is given for the split 'test'" in complaint(capsys, "test", *arguments)


def test_as_a_process() -> None:
    done = subprocess.run([sys.executable, "-m", "crbp.cli", "fitt"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "crbp: error: 'fitt' is no command of crbp; choose one of fit, validate, test, predict, generate, data, "
        "demo, analyze, compare, app, model-summary, bench, export, doctor, completion (see crbp --help)"
    ]
