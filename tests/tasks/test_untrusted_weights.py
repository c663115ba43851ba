"""Weights and checkpoints from elsewhere run no code, import no stranger and take no memory that they do not fill."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny_contours import LEAF_SPEC, tiny_data, tiny_net, tiny_task, trainer

from crbp.cli import main
from crbp.models.panoptic._unpickle import CheckpointError, read_checkpoint
from crbp.tasks import Origin, PanopticSource, WeightsError, load_net, save_net
from crbp.tasks.weights import build, load_trained, read_state, trusted_packages

pytestmark = pytest.mark.filterwarnings(LEAF_SPEC)
CONFIGS = Path(__file__).parents[2] / "configs" / "pathfinder"


class Runs:
    """Makes a folder where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.canary,)


def described(cell: Any) -> Origin:
    net = {"class_path": "crbp.models.PathfinderNet", "init_args": {"cell": cell, "evolve": {"steps": 4}}}
    return Origin(net=net)


@pytest.mark.parametrize("suffix", ["ckpt", "pth", "pkl"])
def test_no_checkpoint_can_run_code(tmp_path: Path, suffix: str) -> None:
    path, canary = tmp_path / f"a.{suffix}", tmp_path / "canary"
    content = {"state_dict": {"net.a": torch.zeros(1)}, "optimizer_states": [Runs(canary)]}
    if suffix == "pkl":
        path.write_bytes(pickle.dumps({"model": {}, "x": Runs(canary)}))
    else:
        torch.save(content, path)
    read, error = (read_state, WeightsError) if suffix == "ckpt" else (read_checkpoint, CheckpointError)
    with pytest.raises(error, match="cannot be read"):
        read(path)
    assert not canary.exists()


@pytest.mark.parametrize("command", ["fit", "validate"])
@pytest.mark.parametrize("named", [True, False])
def test_no_command_runs_what_is_in_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, named: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    path = tmp_path / "runs" / "hpc_ckpt_1.ckpt"  # a place where Lightning looks by itself
    path.parent.mkdir()
    torch.save({"state_dict": {}, "callbacks": Runs(canary)}, path)
    given = ["--config", str(CONFIGS / "mini_hgru_crbp.yaml"), "--trainer.accelerator", "cpu", "--data.val_size", "4"]
    given += ["--model.net.cell.channels", "2", "--ckpt_path", str(path) if named else "hpc"]
    try:
        assert main([command, *given]) == 2
    finally:
        torch.use_deterministic_algorithms(False)
    assert "cannot be read" in capsys.readouterr().err
    assert not canary.exists()


FUNCTIONS = {"crbp.tasks.load_net": "path", "crbp.hub.from_pretrained": "name"}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_function_is_called_that_could_be_told_to_trust_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], function: str
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    net = {"class_path": function, "init_args": {FUNCTIONS[function]: "inner", "trust": ["crbp", "stranger"]}}
    save_net(tiny_net().state_dict(), tmp_path / "outer.safetensors", Origin(net=net))
    with pytest.raises(WeightsError, match=f"{function} is no class"):
        load_net(tmp_path / "outer.safetensors")
    content = yaml.safe_load((CONFIGS / "mini_hgru_crbp.yaml").read_text(encoding="utf-8"))
    content["model"]["init_args"]["net"] = net
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
    assert main(["fit", "--config", "a.yaml"]) == 2
    assert f"{function} is no class" in capsys.readouterr().err


@pytest.mark.parametrize("run", ["null", "[1]", '"x"'])
def test_weights_whose_run_is_no_mapping_are_refused(tmp_path: Path, run: str) -> None:
    metadata = {"crbp.net": "{}", "crbp.run": run}
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata)
    with pytest.raises(WeightsError, match="is no mapping"):
        load_net(tmp_path / "a.safetensors")


def test_what_is_handed_on_does_not_say_where_it_was_logged(tmp_path: Path) -> None:
    task = tiny_task()
    run = trainer(tmp_path / "alice", max_steps=1)
    run.fit(task, tiny_data())
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    run.save_checkpoint(checkpoint)
    net = described({"class_path": "crbp.cells.HGRU", "init_args": {"channels": 4, "kernel_size": 3, "horizon": 4}}).net
    net["init_args"] |= {"norm": "instance"}  # type: ignore[index]
    net["init_args"]["cell"]["init_args"] |= {"norm": "instance", "norm_scale": 1.0}  # type: ignore[index]
    config = {"trainer": {"default_root_dir": "/home/alice", "max_epochs": 1}, "ckpt_path": "/home/alice/a.ckpt"}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({**config, "model": {"init_args": {"net": net}}}))
    origin = load_trained(checkpoint)[1]
    assert "alice" not in str(origin.run)
    assert origin.run["trainer"] == {"max_epochs": 1}


def test_weights_only_cannot_be_turned_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(CONFIGS / "mini_hgru_crbp.yaml"), "--weights_only", "false"]) == 2
    assert "weights_only=False would run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"), [("model", "os.system"), ("model", "this.s"), ("data", "crbp.data._files.os.system")]
)
def test_a_configuration_imports_no_stranger(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: str
) -> None:
    config = yaml.safe_load((CONFIGS / "mini_hgru_crbp.yaml").read_text())
    config[key]["class_path"] = value
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "a.yaml")]) == 2
    assert "is of no trusted package; add --trust" in capsys.readouterr().err


def test_a_class_of_a_trusted_package_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stranger.py").write_text("import pathlib\npathlib.Path(__file__).with_name('imported').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = yaml.safe_load((CONFIGS / "mini_hgru_crbp.yaml").read_text())
    config["model"]["class_path"] = "stranger.Model"
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "a.yaml")]) == 2
    assert "add --trust stranger" in capsys.readouterr().err
    assert not (tmp_path / "imported").exists()
    assert main(["fit", "--config", str(tmp_path / "a.yaml"), "--trust", "stranger"]) == 2
    assert "has no attribute 'Model'" in capsys.readouterr().err
    assert (tmp_path / "imported").exists()
    assert trusted_packages() == ("crbp", "stranger")  # for weights that the run starts from as well


@pytest.mark.parametrize("name", ["os.system", "crbp.data._files.os.system", "crbp.tasks.weights.torch.load"])
def test_weights_name_no_function_of_another_package(tmp_path: Path, name: str) -> None:
    save_net(tiny_net().state_dict(), tmp_path / "a.safetensors", described(name))
    with pytest.raises(WeightsError, match=r"has the class .*pass trust="):
        load_net(tmp_path / "a.safetensors")


@pytest.mark.parametrize("text", ['{"class_path": "stranger.Model"}', "{class_path: stranger.Model}", "file"])
def test_weights_hide_no_class_in_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "stranger.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'imported')!r}).touch()\n")
    (tmp_path / "file").write_text("class_path: stranger.Model")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    save_net(tiny_net().state_dict(), tmp_path / "a.safetensors", described(text))
    with pytest.raises(WeightsError, match="read as a configuration of its own"):
        load_net(tmp_path / "a.safetensors")
    assert not (tmp_path / "imported").exists()


STRANGER = "import pathlib\npathlib.Path(__file__).with_name('imported').touch()\n\n\nclass Model:\n    pass\n"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Coco", {"root": "stranger.Model", "val": "stranger.Model"}),
        ("CocoSource", {"val": {"images": "stranger.Model", "panoptic": "file.yaml", "categories": "stranger.Model"}}),
    ],
)
def test_a_text_that_crbp_takes_as_it_is_names_no_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, settings: Any
) -> None:
    (tmp_path / "stranger.py").write_text(STRANGER)
    (tmp_path / "file.yaml").write_text("class_path: stranger.Model")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    described = {"class_path": f"crbp.tasks.{name}", "init_args": settings}
    made: Any = build(PanopticSource, described, "the test's source")  # type: ignore[type-abstract]
    assert "stranger.Model" in (made.val, getattr(made.val, "images", ""))
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("text", ["stranger.Model", '{"class_path": "stranger.Model"}', "file.yaml"])
@pytest.mark.parametrize("name", ["categories", "images", "labels"])
def test_a_text_of_a_class_of_another_trusted_package_may_name_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    (tmp_path / "stranger.py").write_text(STRANGER)
    (tmp_path / "file.yaml").write_text("class_path: stranger.Model")
    (tmp_path / "mine_source.py").write_text(
        "from typing import Any\n\nfrom crbp.tasks import PanopticSource\n\n\nclass Helper:\n    pass\n\n\n"
        "class Mine(PanopticSource):\n"
        "    def __init__(self, categories: Helper | None = None, images: Any = None, labels: str = ''): ...\n"
        "    def split(self, name, transform): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    described = {"class_path": "mine_source.Mine", "init_args": {name: text}}
    with pytest.raises(WeightsError, match=r"read as a configuration of its own|has the class stranger"):
        build(PanopticSource, described, "the test's source", trust=("crbp", "mine_source"))  # type: ignore[type-abstract]
    assert not (tmp_path / "imported").exists()


def test_a_description_larger_than_its_weights_takes_no_memory(tmp_path: Path) -> None:
    cell = {"class_path": "crbp.cells.HGRU", "init_args": {"channels": 1_000_000, "kernel_size": 3, "horizon": 4}}
    save_net(tiny_net().state_dict(), tmp_path / "a.safetensors", described(cell))
    with pytest.raises(WeightsError, match="size mismatch"):  # 36 terabytes could not be had
        load_net(tmp_path / "a.safetensors")


def test_a_checkpoint_that_would_blow_up_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1_000_000)}}, tmp_path / "a.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "a.ckpt") as old,
        zipfile.ZipFile(tmp_path / "b.ckpt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert (tmp_path / "b.ckpt").stat().st_size < 10_000
    with pytest.raises(WeightsError, match="cannot be read"):
        read_state(tmp_path / "b.ckpt")


@pytest.mark.parametrize(
    "content", [[], {"state_dict": []}, {"state_dict": {"a": 1}}, {"state_dict": {1: torch.zeros(1)}}]
)
def test_a_checkpoint_of_other_things_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(WeightsError, match="cannot be read"):
        read_state(tmp_path / "a.ckpt")


@pytest.mark.parametrize("text", ["- 1", "\ud800", "model: [", "[" * 1500 + "]" * 1500, "model: 3"], ids=range(5))
def test_a_run_whose_configuration_is_broken_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": {}}, tmp_path / "checkpoints" / "a.ckpt")
    (tmp_path / "config.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(WeightsError, match=r"config.yaml, which cannot be read"):
        load_trained(tmp_path / "checkpoints" / "a.ckpt")


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x05\x96" + (2**50).to_bytes(8, "little"),
        b"\x80\x02}r\xff\xff\xff\x7f.",
        b"\x80\x02)a.",
        b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x03\0\0\0hex\x86R.",
    ],
    ids=["bytes", "memory", "append to a tuple", "another encoding"],
)
def test_a_pickle_that_is_no_table_of_arrays_is_told(tmp_path: Path, program: bytes) -> None:
    (tmp_path / "a.pkl").write_bytes(program)
    if program.endswith(b"\x7f."):
        assert read_checkpoint(tmp_path / "a.pkl") == {}  # though it names a place 16 GiB away
        return
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(tmp_path / "a.pkl")


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_taken_up_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--config", str(CONFIGS / "mini_hgru_crbp.yaml"), "--trainer.accelerator", "cpu"]
    given += ["--trainer.enable_progress_bar", "false", "--model.net.cell.channels", "2"]
    given += ["--model.net.cell.kernel_size", "3", "--model.net.evolve.steps", "2", "--data.batch_size", "2"]
    given += ["--data.train_size", "2", "--data.val_size", "2", "--data.test_size", "2", "--model.step_jitter", "1"]
    given += ["--trainer.log_every_n_steps", "1", "--data.lead_in_size", "2", "--trainer.max_epochs", "1"]
    spoilt: list[dict[str, Any]] = [
        {"loops": 3},
        {"optimizer_states": [{"state": 3}]},
        {"lr_schedulers": "x"},
        {"rng": {"cpu": torch.zeros(3)}},
        {"pytorch-lightning_version": None},
    ]
    try:
        assert main(["fit", *given]) == 0
        path = tmp_path / "runs" / "mini_hgru_crbp" / "version_0" / "checkpoints" / "last.ckpt"
        saved = torch.load(path, weights_only=True)
        for change in spoilt:
            torch.save({**saved, **change}, path)
            assert main(["fit", *given, "--trainer.max_epochs", "2", "--ckpt_path", str(path)]) == 2
            assert f"the checkpoint {path} cannot be read or taken up" in capsys.readouterr().err
    finally:
        torch.use_deterministic_algorithms(False)


def test_checkpoints_of_crbp_are_read(tmp_path: Path) -> None:
    task, run = tiny_task(), trainer(tmp_path, max_steps=1)
    run.fit(task, tiny_data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert read_state(tmp_path / "a.ckpt").keys() == task.state_dict().keys()
