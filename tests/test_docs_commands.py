"""The command lines of the documentation, really run, page by page and in their order, on a few small images.

`small` appends what makes a line one of seconds on one CPU: sizes, and what asks for several devices or bfloat16, are
therefore not the reader's. A run that a page takes for granted is trained first. `crbp demo` and the launch files have
tests of their own. Lines of other programs run as well, but for those of `CI`.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from crbp.cli import main
from crbp.data.panoptic import write_shapes
from launched import BOUND, environment, free_port, started, step_of
from test_docs_code import BLOCKS, LAUNCHERS, ROOT, commands, files, filled
from test_launch import slurm

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
        return ["--port", free_port()]
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
    write_shapes(root, images=(2, 2), size=128, workers=1, progress=False)
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


# --- other programs ---------------------------------------------------------------------------------------------------

CI = {"pip install uv", "pytest", "pytest -m slow", ".ci/run"}  # what CI itself runs


def others(page: str) -> list[str]:
    """The command lines of a page that are of other programs, with the variables set before them."""
    found = []
    for block in BLOCKS[page]:
        if block.kind == "sh" and not block.slow:
            for line in block.code.replace("\\\n", " ").splitlines():
                line = line.removeprefix("uv run ").partition("   #")[0]
                if any(words[0] != "crbp" and " ".join(words) not in CI for words in commands(line)):
                    found.append(line.strip())
    return found


def run(line: str, *options: str, **settings: str) -> str:
    """Run a command line, with more options, by a shell; what it prints."""
    code = f"{line} {shlex.join(options)}"
    done = subprocess.run(
        ["bash", "-euc", code], env=environment(**settings), capture_output=True, text=True, timeout=BOUND, check=False
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@contextmanager
def served(line: str, port: str) -> Iterator[Callable[[str], str]]:
    """A server that a line starts; gives what it answers at a path."""

    def get(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=BOUND) as answer:
            return str(answer.read().decode())

    def answers() -> bool:
        try:
            return bool(get(""))
        except OSError:
            return False

    with started(shlex.split(line), Path.cwd(), environment()) as server:
        end = time.monotonic() + BOUND
        while not answers():
            assert server.poll() is None, Path("log").read_text(encoding="utf-8")
            assert time.monotonic() < end
            time.sleep(0.2)
        yield get


def launched(line: str) -> list[str]:
    """The options that make a line of a launch file one of seconds: its processes are counted by the file."""
    (config,) = (after for word, after in pairwise(shlex.split(line)) if word in LAUNCHERS)
    options = [each for each in small(["fit", "--config", config]) if not each.startswith("--trainer.devices=")]
    if "panoptic" in config:
        return [*options, "--trainer.sync_batchnorm=false"]  # which torch has for GPUs only
    return [*options, "--model.net.cell.channels=2", "--model.net.evolve.steps=3", "--model.step_jitter=1"]


def test_every_line_of_another_program_is_run_here() -> None:
    pages = {page for page in BLOCKS if others(page)}
    assert pages == {
        "CONTRIBUTING.md", "clusters.md", "diagnose.md", "examples/README.md", "results/panoptic/README.md",
        "results/pathfinder/README.md", "start.md",
    }  # fmt: skip


def test_torchrun_trains_on_one_machine_and_on_two(desk: Path) -> None:
    alone, first, second = (line for line in others("clusters.md") if "torchrun.sh" in line)
    run(alone, *launched(alone), PROCESSES="2", PORT=free_port())
    runs = Path("runs/pf14_hgru_crbp_cured")
    assert step_of(runs / "torchrun" / "checkpoints" / "last.ckpt") == 2
    port = free_port()
    with_both = environment(PROCESSES="1", PORT=port, RUN="both")
    here = [line.replace("MASTER=first", "MASTER=127.0.0.1") for line in (first, second)]
    assert here != [first, second]
    with ExitStack() as ended:
        asked = [["bash", "-euc", f"{line} {shlex.join(launched(line))}"] for line in here]
        nodes = [ended.enter_context(started(each, desk, with_both)) for each in asked]
        assert [node.wait(BOUND) for node in nodes] == [0, 0], Path("log").read_text(encoding="utf-8")
    assert step_of(runs / "both" / "checkpoints" / "last.ckpt") == 2


def test_sbatch_hands_the_launch_file_to_the_cluster(desk: Path) -> None:
    """SLURM itself is in `.ci/slurm`: what it would start on two nodes are here two processes."""
    job = slurm(desk, tasks=2)
    sbatch = desk / "bin" / "sbatch"
    sbatch.write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec bash "$@"\n', encoding="utf-8")
    sbatch.chmod(0o755)
    lines = [line.replace("/data/coco", "coco") for line in others("clusters.md") if "sbatch" in line]
    assert len(lines) == 2
    for line in lines:
        run(line, *launched(line), **job, TMPDIR=str(desk))
    for name in ("pf14_hgru_crbp_cured", "rfpn_r50_crbp20_1x"):
        assert step_of(Path("runs", name, "job_4711", "checkpoints", "last.ckpt")) == 2
    assert (desk / "crbp-4711" / "annotations").exists()


def test_tensorboard_shows_the_runs(desk: Path) -> None:
    (line,) = others("diagnose.md")
    trained(["runs/mini_hgru_crbp/version_0"])
    port = free_port()
    with served(f"{line} --port {port}", port) as get:
        end = time.monotonic() + BOUND
        while "mini_hgru_crbp/version_0" not in get("data/runs"):
            assert time.monotonic() < end
            time.sleep(0.2)


def test_the_site_is_served(desk: Path) -> None:
    (line,) = others("CONTRIBUTING.md")
    port = free_port()
    with served(f"{line} --config-file {ROOT / 'mkdocs.yml'} --dev-addr 127.0.0.1:{port}", port) as get:
        assert "<title>Overview - crbp</title>" in get("")


def test_completion_is_kept_where_bash_looks_for_it(desk: Path) -> None:
    (desk / ".venv").symlink_to(sys.prefix)
    (block,) = [block for block in BLOCKS["start.md"] if block.kind == "sh" and "completion bash" in block.code]
    run(block.code, HOME=str(desk))
    script = desk / ".local" / "share" / "bash-completion" / "completions" / "crbp"
    assert "crbp" in run(f"source {script}; complete -p crbp")


def test_an_example_runs_from_the_folder_of_the_project(desk: Path) -> None:
    at_length, shortly = others("examples/README.md")
    assert f"{at_length} --small" == shortly
    assert "BPTT" in run(shortly)


def test_a_model_is_fitted_to_a_few_images(desk: Path) -> None:
    (line,) = others("results/panoptic/README.md")
    listed = desk / "coco" / "annotations" / "panoptic_train2017.json"
    (desk / "categories.json").write_text(json.dumps(json.loads(listed.read_text())["categories"]))
    files_of = {"IMAGES": "coco/train2017", "PANOPTIC.json": str(listed), "CATEGORIES.json": "categories.json"}
    printed = run(" ".join(files_of.get(word, word) for word in line.split()), "--size", "64", "--steps", "2")
    assert json.loads(printed[printed.index("{\n") :])["optimiser_steps"] == 2


def test_rows_are_trained_tabled_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkout of one row of each kind, of a few images."""
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    configs, kept = tmp_path / "configs" / "pathfinder", tmp_path / "results" / "pathfinder"
    configs.mkdir(parents=True)
    kept.mkdir(parents=True)
    shutil.copy(ROOT / "results" / "pathfinder" / "README.md", kept)
    for name in ("small5_feedforward", "pf9_feedforward"):
        content = yaml.safe_load((ROOT / "configs" / "pathfinder" / f"{name}.yaml").read_text(encoding="utf-8"))
        content["trainer"] = {"max_epochs": 1, "num_sanity_val_steps": 0}
        content["data"]["init_args"] |= {"train_size": 64, "val_size": 8, "lead_in": None, "lead_in_size": 0}
        (configs / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    train, table, cost, test = others("results/pathfinder/README.md")
    assert "small5_feedforward done" in run(train)
    run(table)
    assert [file.stem for file in (kept / "weights").iterdir()] == ["small5_feedforward"]
    run(cost)
    assert "pf9_feedforward" in (tmp_path / "cost.csv").read_text(encoding="utf-8")
    run(test)
    assert "small5_feedforward" in (kept / "held_out.csv").read_text(encoding="utf-8")
