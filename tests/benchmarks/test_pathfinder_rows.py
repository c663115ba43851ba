"""The script that trains and collects the rows of contour tracing, through the real commands."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

import crbp
from crbp.analysis import memory_curve
from crbp.models import PathfinderNet
from crbp.tasks import Origin, load_net, load_trained, save_net
from crbp.tasks.weights import build


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> Any:
    return load_script("benchmarks/pathfinder.py")


@pytest.fixture
def results(load_script: Callable[[str], ModuleType]) -> Any:
    return load_script("benchmarks/pathfinder_results.py")


@pytest.fixture
def runner(load_script: Callable[[str], ModuleType]) -> Any:
    return load_script("benchmarks/_runs.py")


def test_an_unknown_row_is_named(script: Any, runner: Any) -> None:
    assert "small5_hgru_crbp" in runner.rows(script.CONFIGS, "small5_*")
    with pytest.raises(SystemExit, match="no configuration is called nope"):
        runner.rows(script.CONFIGS, "nope")


@pytest.mark.slow
def test_a_row_is_trained_analysed_and_set_into_the_table(
    script: Any, runner: Any, results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = yaml.safe_load((script.CONFIGS / "mini_hgru_crbp.yaml").read_text())
    content["trainer"] = {"max_epochs": 1, "limit_val_batches": 1}
    content["data"]["init_args"] |= {"train_size": 32, "batch_size": 16, "val_size": 16, "lead_in_size": 16}
    config = tmp_path / "tiny_hgru_crbp.yaml"
    config.write_text(yaml.safe_dump(content))
    monkeypatch.setattr(script, "IMAGES", 8)
    runner.train(config, 3, tmp_path / "runs", script.analyse)
    run = tmp_path / "runs" / "tiny_hgru_crbp_seed3" / "version_0"
    first = (run / "made.json").read_text()
    runner.train(config, 3, tmp_path / "runs", script.analyse)  # there is nothing left to do
    assert (run / "made.json").read_text() == first
    unfinished = tmp_path / "runs" / "other" / "version_0"
    unfinished.mkdir(parents=True)
    for names in (vars(results), results.figures.__globals__):  # of the tables, and of the figures
        monkeypatch.setitem(names, "TASKS", ("mini",))
    results.keep([run, unfinished], tmp_path / "out")
    results.write(tmp_path / "out")
    (line,) = csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines())
    assert (line["row"], line["task"], line["images"], line["steps"]) == ("tiny_hgru_crbp_seed3", "mini", "32", "8")
    assert line["seed"] == "3"
    assert 0 <= float(line["f1_at_4n"]) <= 1
    assert float(line["residual_at_4n"]) > 0
    assert float(line["saved_mib"]) > 0
    for name in ("accuracy", "beyond", "training"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 1000
    weights = load_net(tmp_path / "out" / "weights" / "tiny_hgru_crbp_seed3.safetensors")
    assert sum(parameter.numel() for parameter in weights.parameters()) == int(line["parameters"])
    tags = {row["tag"] for row in csv.DictReader((tmp_path / "out" / "curves.csv").read_text().splitlines())}
    assert {"val/f1", "val/residual", "val/penalty"} <= tags


def test_rows_trained_elsewhere_stay_in_the_table(results: Any, tmp_path: Path) -> None:
    kept = Path(results.ROOT / "results" / "pathfinder" / "rows" / "small9_hgru_crbp.json").read_text()
    (tmp_path / "rows").mkdir()
    for seed in (0, 1):
        (tmp_path / "rows" / f"seed{seed}.json").write_text(kept.replace('"seed":0', f'"seed":{seed}'))
    results.keep([], tmp_path)
    results.write(tmp_path)
    lines = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [line["seed"] for line in lines] == ["0", "1"]
    assert lines[0]["f1_at_n"] == f"{json.loads(kept)['line']['f1_at_n']:.4g}"


def weights(folder: Path, name: str, gradient: str, **task: Any) -> Path:
    cell = {"class_path": "crbp.cells.HGRU", "init_args": {"channels": 2, "kernel_size": 3}}
    evolve = {"steps": 3, "gradient": {"class_path": gradient}}
    net = {"class_path": "crbp.models.PathfinderNet", "init_args": {"cell": cell, "evolve": evolve}}
    made = build(torch.nn.Module, net, "the test's net")
    run = {"model": {"class_path": "crbp.tasks.ContourTask", "init_args": task}}
    folder.mkdir(exist_ok=True)
    save_net(made.state_dict(), folder / f"{name}.safetensors", Origin(net=net, run=run, name=name))
    return folder / f"{name}.safetensors"


def test_memory_is_that_of_the_penalties_trained_with(results: Any, tmp_path: Path) -> None:
    lipschitz = {"class_path": "crbp.tasks.LipschitzPenalty", "init_args": {"weight": 5.0}}

    def sums(run: crbp.Run) -> torch.Tensor:
        penalties = crbp.lipschitz_penalty(run, reduction="mean_square"), crbp.spectral_penalty(run)
        return torch.stack([5 * penalties[0], 0.2 * penalties[1]]).sum()

    none = {"residual_weight": 0.0, "spectral_weight": 0.2}
    file = weights(tmp_path, "two", "crbp.RBP", penalty=lipschitz, **none)
    net = load_net(file)
    assert isinstance(net, PathfinderNet)
    assert results.PathfinderConfig.preset("mini").image_size == 32

    def wanted(images: int, **settings: Any) -> int:
        (found,) = memory_curve(net, torch.rand(images, 1, 32, 32), gradient=crbp.RBP(), steps=(3,), **settings)
        return found

    each, shared = results.saved(file, "mini")
    assert shared + 3 * each == wanted(3, penalty=sums)
    plain, of_plain = results.saved(weights(tmp_path, "rbp", "crbp.RBP", penalty=None), "mini")
    assert of_plain + 3 * plain == wanted(3)
    assert plain < each
    last, _ = results.saved(weights(tmp_path, "last", "crbp.BPTT", supervision="last"), "mini")
    assert results.saved(weights(tmp_path, "all", "crbp.BPTT", supervision="all"), "mini")[0] > last


def test_spectra_of_kernels_count_once_for_all_images(results: Any) -> None:
    """The same network with kernels of two sizes: what is kept of an image is the same, and the spectra are not."""
    kept = results.ROOT / "results" / "pathfinder" / "weights"
    small, large = (results.saved(kept / f"small14_hgru_bptt{of}.safetensors", "small14") for of in ("_k3", ""))
    assert small[0] == pytest.approx(large[0], rel=3e-3)
    assert large[1] > 10 * small[1]


def test_memory_is_counted_anew_and_nothing_else_changed(results: Any, tmp_path: Path) -> None:
    kept = results.ROOT / "results" / "pathfinder" / "rows"
    (tmp_path / "rows").mkdir()
    before = {}
    for name in ("small9_hgru_crbp", "small9_feedforward"):
        before[name] = json.loads((kept / f"{name}.json").read_text())
        before[name]["line"]["task"] = "mini"
        (tmp_path / "rows" / f"{name}.json").write_text(json.dumps(before[name]))
    file = weights(tmp_path / "weights", "small9_hgru_crbp", "crbp.RBP", penalty=None)
    results.recount(tmp_path)
    after = {name: json.loads((tmp_path / "rows" / f"{name}.json").read_text()) for name in before}
    for name, counted in zip(("saved_mib", "shared_mib"), results.saved(file, "mini"), strict=True):
        before["small9_hgru_crbp"]["line"][name] = float(f"{counted / 2**20:.5g}")
    assert after == before


def test_without_rows_there_is_no_table(results: Any, tmp_path: Path) -> None:
    results.keep([], tmp_path)
    with pytest.raises(SystemExit, match="no finished run was found"):
        results.write(tmp_path)


def test_the_page_shows_the_rows_that_are_kept(results: Any, tmp_path: Path) -> None:
    folder = results.ROOT / "results" / "pathfinder"
    files = sorted((folder / "rows").glob("*.json"))
    rows = [results.Row(**json.loads(file.read_text())) for file in files]
    page, tables = (folder / "README.md").read_text(), results.tables(folder)
    assert results.with_tables(page, tables) == page  # else run benchmarks/pathfinder_results.py
    (tmp_path / "rows").mkdir()
    shutil.copy(files[0], tmp_path / "rows")
    emptied = results.with_tables(page, results.tables(tmp_path))
    assert len(emptied) < len(page)
    assert results.with_tables(emptied, tables) == page
    names = {row.line["row"] for row in rows}
    assert names == {line["row"] for line in csv.DictReader((folder / "table.csv").read_text().splitlines())}
    assert names == {file.stem for file in (folder / "weights").glob("*.safetensors")}


def test_the_rows_that_are_kept_are_those_of_their_configurations(
    script: Any, results: Any, load_script: Callable[[str], ModuleType]
) -> None:
    """As many images, in a batch and in all, and the same settings: what a reader gets who trains the row again."""
    differing = load_script("benchmarks/tuning.py").differing
    for line in csv.DictReader((results.ROOT / "results" / "pathfinder" / "table.csv").read_text().splitlines()):
        name = line["row"].removesuffix(f"_seed{line['seed']}")
        config = yaml.safe_load((script.CONFIGS / f"{name}.yaml").read_text())
        data, net = config["data"]["init_args"], config["model"]["init_args"]["net"]["init_args"]
        assert int(line["images"]) == data["train_size"] * config["trainer"]["max_epochs"], name
        assert int(line["batch"]) == data["batch_size"], name
        assert line["steps"] == str(net["evolve"]["steps"] if "evolve" in net else ""), name
        _, origin = load_trained(results.ROOT / "results" / "pathfinder" / "weights" / f"{line['row']}.safetensors")
        for part in ("model", "data"):
            # What a run does not name is a setting that there was not at its time.
            found = [each for each in differing(config[part], origin.run[part], part) if each[1] is not None]
            assert found == [], line["row"]


def test_every_kept_row_was_measured_on_the_test_split(results: Any, load_script: Callable[[str], ModuleType]) -> None:
    script = load_script("benchmarks/held_out.py")
    rows = [line["row"] for line in csv.DictReader((script.FOLDER / "held_out.csv").read_text().splitlines())]
    assert rows == sorted(file.stem for file in (results.ROOT / "results/pathfinder/weights").glob("*.safetensors"))
    page = " ".join((script.FOLDER / "README.md").read_text().split())
    found = script.apart(script.FOLDER / "held_out.csv")
    for at, digits in {"mean": 4, "least": 3, "largest": 3}.items():
        for when in ("n", "4n"):
            said = f"{found[f'{at}_at_{when}']:+.{digits}f}".replace("0.", ".", 1)
            assert said in page, f"{at} at {when} is {said}"


def test_many_images_stand_beside_their_row(results: Any) -> None:
    row = json.loads((results.ROOT / "results" / "pathfinder" / "rows" / "small9_hgru_crbp.json").read_text())["line"]
    other = {**row, "row": f"{row['row']}_seed7", "seed": 7}
    found = {"images": 40, "f1_at_n": 0.5, "f1_at_4n": 0.25, "residual_at_4n": 0.002, "radius_below_1": 39}
    many = [
        {"row": row["row"], **found, "radius_largest": 1.5},
        {"row": other["row"], **found, "images": 60, "f1_at_n": 0.75, "radius_largest": 2.0},
    ]
    table = results.settled([other, {**row, "row": "not measured"}, row], many)
    cells = ["9 dashes, C-RBP", "0, 7", "40, 60", ".5000, .7500", ".2500, .2500", "2.0e-03, 2.0e-03"]
    assert table.splitlines()[2:] == [f"| {' | '.join(cells)} | 97.5%, 65.0% | 1.50, 2.00 |"]


def test_seeds_stand_side_by_side(results: Any) -> None:
    row = json.loads((results.ROOT / "results" / "pathfinder" / "rows" / "small9_hgru_crbp.json").read_text())["line"]
    name = row["row"]
    others = [{**row, "row": f"{name}_seed{seed}", "seed": seed, "f1_at_n": seed / 100} for seed in (10, 2)]
    other_task = {**row, "row": "mini_hgru_crbp", "task": "mini"}
    table = results.measures_of([other_task, *others, row])
    assert len(table.splitlines()) == 4
    assert f"| {row['f1_at_n']:.3f}, .020, .100 |".replace("| 0", "| ") in table


def test_steps_are_timed_beside_those_of_bptt_the_quickest_first(results: Any) -> None:
    seconds = {"small14_hgru_crbp": "0.05", "small14_hgru_bptt": "0.02", "small14_feedforward": "0.004"}
    steps = {"small14_hgru_crbp": "24", "small14_hgru_bptt": "6", "small14_feedforward": ""}
    table = results.step_times(
        [{"row": row, "steps": steps[row], "seconds_per_image": value} for row, value in seconds.items()]
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert rows == [
        ["`small14_feedforward`", "", "4.0", "0.20×"],
        ["`small14_hgru_bptt`", "6", "20.0", "1.00×"],
        ["`small14_hgru_crbp`", "24", "50.0", "2.50×"],
    ]


def test_what_is_measured_again_of_a_row_takes_its_place(
    load_script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    script = load_script("benchmarks/_kept.py")
    for row, value in (("b", 1), ("a", 2), ("b", 3)):
        script.put({"row": row, "value": value}, tmp_path / "list.json")
    assert json.loads((tmp_path / "list.json").read_text()) == [{"row": "a", "value": 2}, {"row": "b", "value": 3}]
    assert [file.stem for file in script.kept(["small9_hgru_crbp_seed1", "small9_feed*"])] == [
        "small9_feedforward",
        "small9_hgru_crbp_seed1",
    ]
    with pytest.raises(SystemExit, match="no kept row is called nothing"):
        script.kept(["nothing"])
