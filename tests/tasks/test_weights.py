from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_contours import LEAF_SPEC, tiny_data, tiny_net, tiny_task, trainer

from crbp.tasks import Origin, SafetensorsExport, WeightsError, load_net, save_net

pytestmark = pytest.mark.filterwarnings(LEAF_SPEC)


def named(path: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": settings}


CELL = named("crbp.cells.HGRU", channels=4, kernel_size=3, norm_scale=1.0, horizon=4)
SOLVER = named("crbp.Neumann", terms=3)
GRADIENT = named("crbp.RBP", solver=SOLVER, on_divergence="fallback")
ORIGIN = Origin(net=named("crbp.models.PathfinderNet", cell=CELL, evolve={"steps": 4, "gradient": GRADIENT}))


def changed(**settings: Any) -> Origin:
    return replace(ORIGIN, net=named("crbp.models.PathfinderNet", **{**ORIGIN.net["init_args"], **settings}))


def test_round_trip(tmp_path: Path) -> None:
    net = tiny_net().eval()
    save_net(net.state_dict(), tmp_path / "a.safetensors", ORIGIN)
    again = load_net(tmp_path / "a.safetensors")
    image = torch.rand(2, 1, 12, 12)
    assert torch.equal(again(image).logits, net(image).logits)
    assert again.evolve == net.evolve
    assert not again.training


def test_export_keeps_best_and_last(tmp_path: Path) -> None:
    class Scores(SafetensorsExport):
        """Says that the first epoch was the best."""

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.callback_metrics["val/f1"] = torch.tensor(1.0 / (1 + trainer.current_epoch))
            super().on_validation_end(trainer, pl_module)
            if trainer.current_epoch == 0 and not trainer.sanity_checking:
                self.first = {name: value.clone() for name, value in pl_module.net.state_dict().items()}

    task, export = tiny_task(), Scores(ORIGIN)
    trainer(tmp_path, max_epochs=2, callbacks=[export]).fit(task, tiny_data())
    best, last = (load_net(tmp_path / "weights" / f"{name}.safetensors").state_dict() for name in ("best", "last"))
    assert all(torch.equal(best[name], value) for name, value in export.first.items())
    assert all(torch.equal(last[name], value) for name, value in task.net.state_dict().items())
    assert any(not torch.equal(best[name], last[name]) for name in best)


def test_best_score_survives_a_resume() -> None:
    export = SafetensorsExport(ORIGIN)
    export.best = 0.7
    again = SafetensorsExport(ORIGIN)
    again.load_state_dict(export.state_dict())
    assert again.best == 0.7


def write_text(path: Path) -> None:
    path.write_text("not weights", encoding="utf-8")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (write_text, "cannot be read"),
        (lambda path: save_file({"a": torch.zeros(1)}, path), "does not say which network"),
        (lambda path: save_net(tiny_net().state_dict(), path, changed(norm="none")), "do not fit the network"),
        (lambda path: save_net(tiny_net().state_dict(), path, changed(nrom="none")), "'nrom' is not accepted"),
        (
            lambda path: save_net(tiny_net().state_dict(), path, changed(cell=named("elsewhere.Cell"))),
            r"pass trust=\(…, 'elsewhere'\)",
        ),
        (lambda path: save_net({}, path, changed(cell="torch.nn.Identity")), r"pass trust=\(…, 'torch'\)"),
        (lambda path: save_net({}, path, changed(evolve={"steps": 0})), "steps must be a whole number"),
    ],
)
def test_mistakes(tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "a.safetensors"
    make(path)
    with pytest.raises(WeightsError, match=message):
        load_net(path)


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_net(tiny_net().state_dict(), path, ORIGIN)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(WeightsError, match="cannot be read"):
        load_net(path)
