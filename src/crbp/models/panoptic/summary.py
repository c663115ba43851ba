"""How many parameters each part of a panoptic model has, and the command that shows it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from crbp._command import Parser
from crbp.models.panoptic.mask_head import RecurrentMaskHead
from crbp.models.panoptic.panoptic_fpn import RFPN, PanopticFPN

MODELS: dict[str, type[PanopticFPN]] = {"fpn": PanopticFPN, "rfpn": RFPN}


class Part(NamedTuple):
    """A part of a model.

    Attributes:
        name: of the part; indented by two spaces a level where it belongs to the part before.
        trainable: its numbers that are trained.
        total: all of them.
    """

    name: str
    trainable: int
    total: int


def parts(model: PanopticFPN) -> list[Part]:
    """The parts of a model, and their sum as the last; buffers, such as frozen statistics, are no parameters."""
    stem, *stages = model.backbone.parts()
    heads = model.roi_heads
    rows = [
        _part("ResNet", [model.backbone.body]),
        _part("  stem", stem),
        *(_part(f"  stage {number}", stage) for number, stage in enumerate(stages, 2)),
        _part("pyramid", [model.backbone.fpn]),
        _part("proposals", [model.rpn]),
        _part("box head", [heads.box_head]),
        _part("box predictor", [heads.box_predictor]),
        _part("mask head", [heads.mask_head, heads.mask_predictor]),
        *_mask_parts(heads.mask_head),
        _part("  deconvolution", [heads.mask_predictor.conv5_mask]),
        _part("  predictor", [heads.mask_predictor.mask_fcn_logits]),
        _part("semantic head", [model.semantic_head]),
    ]
    return [*rows, _part("all", [model])]


def _mask_parts(head: nn.Module) -> list[Part]:
    if isinstance(head, RecurrentMaskHead):
        cell = [_part(f"    {name}", [each]) for name, each in head.cell.named_children()]
        own = [_of(f"    {name}", [each]) for name, each in head.cell.named_parameters(recurse=False)]
        return [_part("  recurrent cell", [head.cell]), *cell, *own, _part("  output norm", [head.output_norm])]
    return [_part("  convolutions", [head])]


def _part(name: str, modules: Iterable[nn.Module]) -> Part:
    return _of(name, (each for module in modules for each in module.parameters()))


def _of(name: str, parameters: Iterable[nn.Parameter]) -> Part:
    sizes = [(each.numel(), each.requires_grad) for each in parameters]
    return Part(name, sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))


def parser() -> Parser:
    """The command's parser."""
    made = Parser(prog="crbp model-summary", description="Count the parameters of a panoptic model part by part.")
    made.add_argument("model", choices=sorted(MODELS), help="Panoptic FPN, or the one with a recurrent mask head")
    made.add_argument("--depth", type=int, choices=(18, 50, 101), default=50, help="of the ResNet (default: 50)")
    made.add_argument("--things", type=int, default=80, help="thing classes (default: 80, those of COCO)")
    made.add_argument("--stuff", type=int, default=53, help="stuff classes (default: 53)")
    return made


def main(arguments: list[str]) -> None:
    """The command ``crbp model-summary``."""
    asked = parser()
    options = asked.parse_args(arguments)
    try:
        # Parameters are counted, not filled.
        with torch.device("meta"):
            model = MODELS[options.model](options.depth, things=options.things, stuff=options.stuff)
    except ValueError as error:
        asked.error(str(error))
    _print(parts(model), f"{type(model).__name__}, ResNet-{options.depth}")


def _print(rows: list[Part], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("part", title=title)
    for column in ("trainable", "all"):
        table.add_column(column, justify="right")
    for row in rows[:-1]:
        style = "dim" if row.name.startswith(" ") else None
        table.add_row(row.name, *(f"{number:,}".replace(",", " ") for number in row[1:]), style=style)
    table.add_section()
    table.add_row(rows[-1].name, *(f"{number:,}".replace(",", " ") for number in rows[-1][1:]), style="bold")
    Console().print(table)
