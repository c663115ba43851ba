"""The command lines of the documentation, really run, page by page and in their order, on a few small images.

`small` appends what makes a line one of seconds on one CPU: sizes, and what asks for several devices or bfloat16, are
therefore not the reader's. A run that a page takes for granted is trained first. `crbp demo` and the launch files have
tests of their own; lines of other programs are looked at in `test_docs_code.py`.
"""

from __future__ import annotations

import json
import re
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from crbp.cli import main
from crbp.data.panoptic import write_shapes
from test_docs_code import BLOCKS, ROOT, commands, files, filled

pytestmark = pytest.mark.slow

TRAINER = {
    "max_steps": 2, "limit_train_batches": 2, "limit_val_batches": 1, "limit_test_batches": 1,
    "val_check_interval": 1.0, "check_val_every_n_epoch": 1, "accelerator": "cpu", "devices": 1, "strategy": "auto",
    "precision": "32-true", "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
}  # fmt: skip
CONTOURS = {
    **{f"trainer.{name}": value for name, value in TRAINER.items()},
    **{f"data.{name}": 4 for name in ("train_size", "val_size", "test_size")},
    "data.batch_size": 2,
    "data.workers": 0,
    "model.spectral_radius": False,
}
PANOPTIC = {
    **{f"trainer.{name}": value for name, value in TRAINER.items()},
    "trainer.accumulate_grad_batches": 1,
    "data.batch_size": 1,
    "data.workers": 0,
    "data.shortest": "[128]",
    "data.shortest_test": 128,
    "data.longest": 160,
    "model.average_precision": False,
}
# ResNets of COCO's rows, narrow, and without weights that would be fetched.
NARROW = {
    "model.weights": "null",
    "model.net.backbone.norm": "group",
    "model.net.backbone.width": 8,
    "model.net.backbone.channels": 32,
    "model.net.masks.channels": 32,
    "model.net.semantic.channels": 32,
    "model.net.boxes.channels": 32,
}


def small(words: list[str]) -> list[str]:
    """The arguments that make a command line of crbp one of seconds."""
    if words[0] in ("fit", "test", "predict"):
        config = words[words.index("--config") + 1]
        content = Path(config).read_text(encoding="utf-8")
        panoptic = "PanopticTask" in content
        settings = PANOPTIC | (NARROW if "_r50_" in config else {}) if panoptic else dict(CONTOURS)
        if words[0] == "fit" and "--ckpt_path" in words:
            settings |= {"trainer.max_steps": 3, "trainer.max_epochs": 2}
        if words[0] != "fit":
            for name in ("max_steps", "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps"):
                del settings[f"trainer.{name}"]
        if "GeneratedShapes" in content:
            settings |= {"data.source.init_args.train": 2, "data.source.init_args.val": 1}
        if "fused: true" in content:
            settings |= {"model.net.cell.init_args.fused": False}  # compiling takes longer than all else
        return [f"--{name}={value}" for name, value in settings.items()]
    if words[:2] == ["generate", "shapes"]:
        return ["--images", "2,1", "--jobs", "1"]
    if words[0] == "generate":
        return ["--size", "8", "--workers", "1"]
    if words[0] in ("analyze", "compare"):
        return ["--images", "2", *(["--steps", "40"] if "--steps" in words else [])]
    if words[0] == "app":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return ["--port", str(free.getsockname()[1])]
    return []


def lines(page: str) -> Iterator[list[str]]:
    """The arguments of crbp in the command lines of a page that are run here."""
    for block in BLOCKS[page]:
        if block.kind == "sh":
            yield from (words[1:] for words in commands(block.code) if words[0] == "crbp" and words[1] != "demo")


RUN = [page for page in BLOCKS if list(lines(page))]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with what a reader is told to have: COCO and photographs."""
    for name in ("configs", "examples", "benchmarks", "results"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    like_coco(tmp_path / "coco")
    for link in ("val2017", "annotations"):
        (tmp_path / link).symlink_to(tmp_path / "coco" / link)
    (tmp_path / "photographs").mkdir()
    Image.effect_noise((160, 120), 80).convert("RGB").save(tmp_path / "photographs" / "a.jpg")
    return tmp_path


def like_coco(root: Path) -> None:
    """Shapes in COCO's folders, in a list of 80 classes of things and 53 of stuff, as COCO's is."""
    write_shapes(root, images=(2, 1), size=128, workers=1, progress=False)
    (root / "annotations").mkdir()
    for split in ("train", "val"):
        (root / split).rename(root / f"{split}2017")
        (root / f"panoptic_{split}").rename(root / "annotations" / f"panoptic_{split}2017")
        for kind in ("panoptic", "instances"):
            file = root / f"{kind}_{split}.json"
            if file.exists():
                content = json.loads(file.read_text(encoding="utf-8"))
                if kind == "panoptic":
                    content["categories"] = filled_up(content["categories"])
                (root / "annotations" / f"{kind}_{split}2017.json").write_text(json.dumps(content), encoding="utf-8")
                file.unlink()


def filled_up(categories: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A list of categories with others, until there are as many as COCO has."""
    found = list(categories)
    for isthing, wanted in ((1, 80), (0, 53)):
        have = sum(each["isthing"] == isthing for each in categories)
        for number in range(wanted - have):
            found.append({"id": 1000 + len(found), "name": f"other {isthing} {number}", "isthing": isthing})
    return found


def trained(words: list[str]) -> None:
    """Train what a command line takes for granted."""
    for name in {found[1] for word in words if (found := re.search(r"runs/(\w+)/version_0", word))}:
        if not Path("runs", name, "version_0").exists():
            (config,) = ROOT.glob(f"configs/*/{name}.yaml")
            line = ["fit", "--config", f"configs/{config.parent.name}/{config.name}"]
            coco = ["--data.source.root", "coco"] if "_r50_" in name else []
            assert main([*line, *coco, *small(line)]) == 0


@pytest.mark.parametrize("page", RUN)
@pytest.mark.filterwarnings("default")  # of the libraries, on two images
def test_the_command_lines_of_a_page_run(
    page: str, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if any(words[0] == "app" for words in lines(page)):
        monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")  # as crbp app sets them
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        gradio = pytest.importorskip("gradio", reason="the extra app is not installed")
        monkeypatch.setattr(gradio.Blocks, "block_thread", lambda blocks: None)  # which would wait for Ctrl+C
        monkeypatch.setattr("webbrowser.open", lambda address: True)
    for words in lines(page):
        for block in BLOCKS[page]:
            if block.kind == "sh":
                files(block)
        given = given_names(words)
        trained(given)
        assert ended([*given, *small(given)]) == 0, f"{shlex.join(words)}\n{capsys.readouterr().err}"
        assert given[0] != "app" or "Open http://127.0.0.1:" in capsys.readouterr().out


def given_names(words: list[str]) -> list[str]:
    """A command line with the names that a reader would put in."""
    run = "runs/mini_rfpn_crbp10/version_0"
    named = ["runs/mini_hgru_crbp" + word.removeprefix("runs/NAME") if "runs/NAME" in word else word for word in words]
    if named[0] == "predict" and "…" in named:
        named = ["--config", f"{run}/config.yaml", "--ckpt_path", f"{run}/checkpoints/last.ckpt"]
        named = ["predict", *named, *words[words.index("--data.predict") :]]
    return filled(named) if "…" in named else named


def ended(words: list[str]) -> int:
    """The exit status of a command of crbp."""
    try:
        return main(words)
    except SystemExit as done:  # of --print_config
        return int(done.code or 0)


def test_the_table_of_the_page_is_what_compare_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (words,) = [words for words in lines("analysis.md") if "--images" in words]
    assert ended(words) == 0
    printed = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    page = (ROOT / "docs" / "analysis.md").read_text(encoding="utf-8")
    rows = [row.split(" | ") for row in re.findall(r"^\| (.* \| [\d.e-]+ \| [\d.e-]+) \|$", page, re.MULTILINE)]
    assert len(rows) == 7
    for name, *numbers in rows:
        (found,) = [cells[1:] for cells in printed if cells[0] == name]
        # Rounding differs between machines, and grows where the state does.
        within = {"abs": 0.002} if name.startswith("F1") else {"rel": 0.05}
        assert [float(cell) for cell in found] == pytest.approx([float(cell) for cell in numbers], **within)
