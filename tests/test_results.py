"""What `results` ships can be used: every file of weights loads, and is of the row that the table says."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from crbp._card import written_card
from crbp.tasks import PanopticData, load_trained
from crbp.tasks.weights import build

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "results" / "pathfinder"
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
    net, origin = load_trained(file)
    assert origin.name == name.removesuffix(f"_seed{ROWS[name]['seed']}")
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


def test_the_pages_tell_the_demo_as_it_was_measured() -> None:
    found = json.loads((ROOT / "results" / "demo" / "numbers.json").read_text(encoding="utf-8"))
    assert found["f1_at_n"] >= 0.97
    assert abs(found["f1_at_4n"] - found["f1_at_n"]) <= 0.005
    table = f"""
| F1 at N = {found["steps"]} | {found["f1_at_n"]:.3f} | {found["bptt_f1_at_n"]:.3f} | at least .970 |
| F1 at 4N = {4 * found["steps"]} | {found["f1_at_4n"]:.3f} | {found["bptt_f1_at_4n"]:.3f} | within .005 of that at N |
| relative residual at 4N | {found["residual_at_4n"]:.1e} | {found["bptt_residual_at_4n"]:.1e} | below 5e-3 |
| spectral radius below 1 at 4N | {found["stable_share"]:.0%} of images | {found["bptt_stable_share"]:.0%} | |
| images seen | {found["images"]:,} | {found["bptt_images"]:,} | |
| saved activations of one image at 64 steps | {found["memory_mib"]["64"]:.1f} MiB | {found["bptt_memory_mib"]["64"]:.1f} MiB | flat |
| marking every stroke | {found["all_strokes_f1"]:.3f} | | at least .2 below |
| seconds in all | {found["seconds"]:.0f} | | at most 360 |
"""  # noqa: E501
    page = (ROOT / "results" / "demo" / "README.md").read_text(encoding="utf-8")
    assert table in page
    assert f"`crbp demo --seed {found['seed']}`, commit {found['commit']}, {found['machine']};" in page
    told = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for piece in (
        f"for {found['training_seconds'] / 60:.1f} minutes on one CPU core",
        f"with F1 **{found['f1_at_n']:.3f}** on images it has never seen "
        f"(marking every stroke scores {found['all_strokes_f1']:.3f}), and still does when run four times longer: "
        f"**{found['f1_at_4n']:.3f}**",
        f"from {found['bptt_f1_at_n']:.3f} to {found['bptt_f1_at_4n']:.3f}",
        f"{found['bptt_memory_mib']['64']:.0f} MiB of activations an image at 64 steps, against "
        f"{found['memory_mib']['64']:.1f} MiB at any number of steps",
        f"seed {found['seed']}, commit {found['commit']}",
        f"{found['seconds']:.0f} s in all",
    ):
        assert piece in told


def test_the_guide_tells_the_mini_row_as_it_was_measured() -> None:
    half, whole = json.loads((ROOT / "results" / "panoptic" / "mini.json").read_text(encoding="utf-8"))["validation"]
    told = " ".join((ROOT / "docs" / "panoptic.md").read_text(encoding="utf-8").split())
    assert whole["optimiser_steps"] == 2 * half["optimiser_steps"] == 500
    assert (
        f"a PQ of {100 * half['pq']:.1f} percent on the 100 images of validation after {half['minutes']:.0f} minutes, "
        f"all of them to {100 * whole['pq']:.1f} after {whole['minutes']:.0f} (things {100 * whole['pq_things']:.1f}, "
        f"stuff {100 * whole['pq_stuff']:.1f}; seed 0"
    ) in told
