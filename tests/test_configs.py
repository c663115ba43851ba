from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor

import crbp
from crbp.tasks import ContourData, ContourTask

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted((FOLDER / "pathfinder").glob("*.yaml"))
PAPER_PARAMETERS = {"hgru": 284_127, "convlstm": 1_126_452, "feedforward": 845_527}


@cache
def parser() -> ArgumentParser:
    made = ArgumentParser(exit_on_error=False)
    made.add_argument("--seed_everything", type=int)
    made.add_argument("--trainer", type=dict)
    made.add_subclass_arguments(ContourTask, "model")
    made.add_subclass_arguments(ContourData, "data")
    return made


def load(path: Path, **changes: Any) -> Any:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    net = content["model"]["init_args"]["net"]["init_args"]
    if "cell" in net:
        net["cell"]["init_args"].update(changes)
        if "horizon" in changes:  # a run cut short, and with it what its length is varied by
            net["evolve"]["steps"] = changes["horizon"]
            if "step_jitter" in (task := content["model"]["init_args"]):
                task["step_jitter"] = 1
    else:
        net.update({name: value for name, value in changes.items() if name != "horizon"})
    return parser().instantiate(parser().parse_object(content))


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"image": torch.rand(2, 1, 10, 10, generator=generator), "mask": torch.ones(2, 10, 10).bool()}


def test_files_are_what_the_script_writes(load_script: Callable[[str], ModuleType]) -> None:
    script = load_script("configs/make_pathfinder.py")
    assert script.files() == {path.name: path.read_text(encoding="utf-8") for path in FILES}


def marked(path: Path) -> Any:
    """Slow where a cell is compiled that no other row has."""
    own = path.stem.startswith("small") and path.stem.endswith(("_allsteps", "_cbptt", "_published"))
    return pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if own else [])


@pytest.mark.parametrize("path", [marked(path) for path in FILES])
def test_config_builds_and_takes_a_step(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = load(path, channels=3, kernel_size=3, horizon=4)
    assert made.data.train_dataloader().batch_size == made.data.batch_size
    task = made.model
    # The first of ten steps, without what a trainer takes to set up.
    monkeypatch.setattr(task, "_trainer", SimpleNamespace(global_step=0, estimated_stepping_batches=10))
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    monkeypatch.setattr(task, "log_dict", lambda *_, **__: None)
    optimizer = torch.optim.Adam(task.parameters(), lr=task.learning_rate)
    before = [parameter.detach().clone() for parameter in task.parameters()]
    loss = task.training_step(batch(), 0)
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    moved = [not torch.equal(old, new) for old, new in zip(before, task.parameters(), strict=True)]
    assert sum(moved) >= len(moved) - 2  # κ, ω and the like all learn; a bias before a norm may not


@pytest.mark.parametrize("cell", PAPER_PARAMETERS)
def test_parameters_of_the_paper(cell: str) -> None:
    paths = [path for path in FILES if path.stem.startswith("pf14") and cell in path.stem and "_k" not in path.stem]
    task = load(paths[0]).model
    assert sum(parameter.numel() for parameter in task.parameters()) == PAPER_PARAMETERS[cell]


def test_settings_of_the_paper() -> None:
    steps = {}
    for path in FILES:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        task, data = content["model"]["init_args"], content["data"]["init_args"]
        if not path.stem.startswith("pf"):
            continue
        assert (data["batch_size"], data["flips"], content["trainer"]["max_epochs"]) == (128, True, 20)
        assert task["learning_rate"] == 1e-3
        cured = path.stem.endswith("_cured")
        assert ("gradient_clip_val" in content["trainer"]) == (task.get("schedule") == "constant") == (not cured)
        assert data["source"]["init_args"]["preset"] == path.stem.split("_")[0]
        net = task["net"]["init_args"]
        steps[path.stem] = net["evolve"]["steps"] if "evolve" in net else None
        assert ("penalty" in task) == ("cbptt" in path.stem or "crbp" in path.stem)
        if "penalty" in task:
            assert task["penalty"]["init_args"] == {"weight": 10.0, "bound": 0.9, "reduction": "mean_square"}
            n = net["evolve"]["steps"]
            settling = tuple(
                task[name] for name in ("penalty_ramp", "residual_weight", "spectral_weight", "step_jitter")
            )
            assert task.get("spectral_bound") == (round(6 ** (-1 / (3 * n)), 4) if cured else None)
            assert settling == ((0.8, 1.0, 1.0, 2 * n) if cured else (0.0, 0.0, 0.0, 0))
    assert [steps[f"pf{length}_hgru_crbp"] for length in (9, 14, 20, 25)] == [20, 20, 30, 80]
    assert [steps[f"pf{length}_hgru_rbp"] for length in (9, 14, 20, 25)] == [20, 20, 20, 50]
    assert [steps[f"pf14_hgru_crbp_k{size}"] for size in (3, 5, 9)] == [300, 100, 30]
    assert steps["pf14_hgru_bptt"] == steps["pf25_convlstm_cbptt"] == steps["pf20_hgru_truncated"] == 6


def test_series_of_the_paper_has_fifteen_terms() -> None:
    task = load(FOLDER / "pathfinder" / "pf14_hgru_crbp.yaml", channels=3, kernel_size=3).model
    assert task.net.evolve.gradient == crbp.RBP(crbp.Neumann(terms=15), on_divergence="fallback")
