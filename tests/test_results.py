"""What `results` ships can be used: every file of weights loads, and is of the row that the table says."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from crbp._card import written_card
from crbp.tasks import PanopticData, load_net, load_trained
from crbp.tasks.weights import build

FOLDER = Path(__file__).parents[1] / "results" / "pathfinder"
ROWS = {row["row"]: row for row in csv.DictReader((FOLDER / "table.csv").read_text(encoding="utf-8").splitlines())}


def test_every_row_has_its_weights_and_its_configuration() -> None:
    assert {file.stem for file in (FOLDER / "weights").glob("*.safetensors")} == ROWS.keys()
    for name, row in ROWS.items():
        config = name.removesuffix(f"_seed{row['seed']}")
        assert (FOLDER.parents[1] / "configs" / "pathfinder" / f"{config}.yaml").is_file()


@pytest.mark.parametrize("name", ROWS)
def test_shipped_weights_trace_an_image(name: str) -> None:
    file = FOLDER / "weights" / f"{name}.safetensors"
    assert b"save_dir" not in file.read_bytes()  # nothing of the machine that it was trained on
    net = load_net(file).eval()
    assert sum(parameter.numel() for parameter in net.parameters()) == int(ROWS[name]["parameters"])
    with torch.no_grad():
        logits = net(torch.zeros(1, 1, 48, 48)).logits
    assert logits.shape == (1, 2, 48, 48)
    assert bool(logits.isfinite().all())


def test_shipped_panoptic_weights_segment_an_image() -> None:
    folder = FOLDER.parent / "panoptic"
    (file,) = (folder / "weights").glob("*.safetensors")
    rows = csv.DictReader((folder / "table.csv").read_text(encoding="utf-8").splitlines())
    row = next(row for row in rows if row["row"] == file.stem and row["steps"] == row["trained_steps"])
    net, origin = load_trained(file)
    assert f"| pq | {row['pq']} |" in written_card(file, net, origin, numbers={}, licence="mit")  # at its own steps
    assert b"save_dir" not in file.read_bytes()
    assert origin.run["model"]["init_args"]["weights"].startswith("runs/")  # nothing of the machine either
    assert sum(parameter.numel() for parameter in net.parameters()) == int(row["parameters"])
    data = build(PanopticData, origin.run["data"], "the data")
    image, _ = data.source.split("val", data.resize)[0]
    (seen,) = net([image])
    assert seen.panoptic.shape == (128, 128)
    assert sum(segment["isthing"] for segment in seen.segments) >= 3  # there are six
