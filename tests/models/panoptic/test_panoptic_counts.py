"""Parameters, part by part, as published; counted without filling them."""

import re

import pytest
import torch

from crbp.cli import main
from crbp.models import RFPN, PanopticFPN
from crbp.models.panoptic import BackboneSettings, parts


def _parts(model: type[PanopticFPN], depth: int) -> dict[str, tuple[int, int]]:
    with torch.device("meta"):
        return {part.name.strip(): part[1:] for part in parts(model(depth))}


@pytest.mark.parametrize(
    ("model", "depth", "trainable", "total"),
    [
        (PanopticFPN, 50, 45_751_590, 45_973_990),
        (RFPN, 50, 44_968_038, 45_190_438),
        (PanopticFPN, 101, 64_691_494, 64_913_894),
        (RFPN, 101, 63_907_942, 64_130_342),
    ],
)
def test_published_counts(model, depth, trainable, total):
    assert _parts(model, depth)["all"] == (trainable, total)


def test_published_counts_of_the_parts():
    fpn, rfpn = _parts(PanopticFPN, 50), _parts(RFPN, 50)
    assert fpn["ResNet"] == (23_232_512, 23_454_912)
    assert fpn["stem"][0] == fpn["stage 2"][0] == 0
    assert fpn["stem"][1] + fpn["stage 2"][1] == 222_400
    for name, count in {
        "pyramid": 3_344_384,
        "proposals": 593_935,
        "box head": 13_895_680,
        "box predictor": 411_025,
        "mask head": 2_643_280,
        "semantic head": 1_630_774,
    }.items():
        assert fpn[name] == (count, count)
    assert rfpn["mask head"][0] == 1_859_728
    assert rfpn["output norm"][0] == 512
    assert rfpn["deconvolution"][0] == 262_400
    assert rfpn["predictor"][0] == 20_560
    shared = fpn.keys() & rfpn.keys() - {"mask head", "all"}
    assert all(fpn[name] == rfpn[name] for name in shared)


def test_the_parts_add_up():
    with torch.device("meta"):
        rows = parts(PanopticFPN(18, things=5, stuff=3))
    outer = [row for row in rows[:-1] if not row.name.startswith(" ")]
    for column in (1, 2):
        assert sum(row[column] for row in outer) == rows[-1][column]


def test_counts_of_the_recurrent_cell():
    with torch.device("meta"):
        cell = RFPN(18).mask_head.cell
    sizes = {name: parameter.numel() for name, parameter in cell.named_parameters()}
    assert sizes["inhibition.weight"] == sizes["excitation.weight"] == 589_824
    assert sizes["channel_squeeze.weight"] + sizes["channel_squeeze.bias"] == 16_448
    assert sizes["channel_expand.weight"] == 16_384
    assert sizes["spatial_squeeze.weight"] == 294_912
    assert sizes["spatial_squeeze.bias"] == 128
    assert sizes["spatial_map.weight"] == 1_152
    assert sizes["update_gate.weight"] + sizes["update_gate.bias"] == 65_792
    assert sizes["alpha"] == sizes["mu"] == sizes["attention_bias"] == 256
    assert sum(size for name, size in sizes.items() if "norm" in name) == 1_024


@pytest.mark.parametrize(("stages", "frozen"), [(0, 0), (1, 9_408), (2, 222_400), (5, 23_454_912)])
def test_frozen_stages(stages, frozen):
    with torch.device("meta"):
        total, trainable = (
            _count(PanopticFPN(backbone=BackboneSettings(frozen_stages=stages)), trained) for trained in (False, True)
        )
    assert total - trainable == frozen


def _count(model: PanopticFPN, trained: bool) -> int:
    return sum(each.numel() for each in model.parameters() if each.requires_grad or not trained)


@pytest.mark.parametrize(
    ("model", "depth", "trainable", "total"),
    [
        ("fpn", "50", "45 751 590", "45 973 990"),
        ("rfpn", "50", "44 968 038", "45 190 438"),
        ("fpn", "101", "64 691 494", "64 913 894"),
        ("rfpn", "101", "63 907 942", "64 130 342"),
    ],
)
def test_the_command_shows_them(model, depth, trainable, total, capsys):
    assert main(["model-summary", model, "--depth", depth]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"\ball\W+{trainable}\W+{total}\W", shown)
    assert f"ResNet-{depth}" in shown
    assert ("recurrent cell" in shown) == (model == "rfpn")
    if model == "rfpn":  # what stands below the cell, indented once more, is all of it
        cell, *parts = (
            int(count.replace(" ", ""))
            for count in re.findall(r"^│ (?:  recurrent cell|    \w+) +│ +([\d ]+?) │", shown, re.MULTILINE)
        )
        assert len(parts) == 12
        assert sum(parts) == cell


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["cnn"], "invalid choice: 'cnn'"), (["fpn", "--depth", "34"], "34"), (["fpn", "--things", "0"], "things .* 0")],
)
def test_the_command_names_mistakes(arguments, named, capsys):
    assert main(["model-summary", *arguments]) == 2
    assert re.search(named, capsys.readouterr().err)
