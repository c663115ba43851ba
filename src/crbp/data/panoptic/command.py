"""`crbp data check` and `crbp generate shapes`: options in, tables out."""

from __future__ import annotations

import argparse
from typing import get_args

from rich.console import Console
from rich.table import Table

from crbp._command import Parser
from crbp.data.panoptic._looks import ALIKE, Looks
from crbp.data.panoptic.check import Report, check
from crbp.errors import CrbpError


def data(arguments: list[str]) -> None:
    """Carry out `crbp data`.

    Raises:
        CrbpError: the set has something wrong with it, or the options have.
    """
    options = data_parser().parse_args(arguments)
    settings = vars(options)
    settings.pop("what")
    try:
        report = check(settings.pop("images"), settings.pop("panoptic"), progress=True, **settings)
    except (ValueError, OSError) as error:
        raise CrbpError(str(error)) from error
    console = Console(soft_wrap=True, highlight=False)
    for finding in report.findings:
        console.print(str(finding), markup=False)
    _tell(console, report, quick=options.quick)
    if report.total:
        hidden = report.total - len(report.findings)
        more = f", {hidden} of them not listed (see --limit)" if hidden else ""
        raise CrbpError(f"{report.total} findings{more}; correct the data set before training on it")


def shapes(arguments: list[str]) -> None:
    """Carry out `crbp generate shapes`.

    Raises:
        CrbpError: the options are wrong, or the folder cannot be written or holds another set.
    """
    from crbp.data.panoptic.writer import write_shapes

    settings = vars(shapes_parser().parse_args(arguments))
    try:
        written = write_shapes(settings.pop("out"), **settings)
    except (ValueError, OSError) as error:
        raise CrbpError(str(error)) from error
    print(f"{written.made} images made, {written.kept} kept from before: {written.manifest}")


def shapes_parser() -> Parser:
    """The parser of ``crbp generate shapes``."""
    about = "Write a synthetic panoptic data set in COCO's format: textured shapes that overlap."
    parser = Parser(prog="crbp generate shapes", description=about, allow_abbrev=False)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--images", type=_pair, default=(10_000, 1_000), metavar="TRAIN,VAL", help="how many (default: 10000,1000)"
    )
    parser.add_argument("--size", type=int, default=192, help="height and width, 128 to 512 (default: 192)")
    parser.add_argument(
        "--objects", type=_pair, default=(6, 14), metavar="LEAST,MOST", help="things of an image (default: 6,14)"
    )
    parser.add_argument(
        "--looks",
        choices=get_args(Looks),
        default="textured",
        help="of things: with textures, of one colour each, or with a colour for each class (default: textured)",
    )
    parser.add_argument(
        "--zoom", type=float, default=1.0, help="everything as many times as large, 1 to 2 (default: 1)"
    )
    parser.add_argument(
        "--alike",
        type=float,
        default=ALIKE,
        metavar="SHARE",
        help="of things laid over one that looks the same, 0 to 0.75 (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other images (default: 0)")
    parser.add_argument("--jobs", dest="workers", type=int, help="processes (default: the cores at hand)")
    return parser


def _pair(text: str) -> tuple[int, int]:
    first, _, second = text.partition(",")
    try:
        return int(first), int(second)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not two whole numbers, such as 10000,1000") from None


def data_parser() -> Parser:
    """The parser of ``crbp data``."""
    about = "List everything that is wrong with a panoptic data set, then its statistics."
    parser = Parser(prog="crbp data", description=about, allow_abbrev=False)
    parser.add_argument("what", choices=("check",), help="what to do")
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of the images")
    parser.add_argument(
        "--panoptic", required=True, metavar="FILE", help="the JSON, such as annotations/panoptic_val2017.json"
    )
    parser.add_argument(
        "--labels", metavar="DIR", help="folder of the PNGs (default: beside the JSON, of the same name)"
    )
    parser.add_argument(
        "--categories", metavar="FILE", help="a JSON of categories (default: those of the panoptic JSON)"
    )
    parser.add_argument("--instances", metavar="FILE", help="COCO's instances JSON, if training is given one")
    parser.add_argument("--quick", action="store_true", help="only the JSON and whether the files are there")
    parser.add_argument("--allow-empty", action="store_true", help="an image without a segment is no finding")
    parser.add_argument("--limit", type=int, default=100, help="findings to list; all are counted (default: 100)")
    parser.add_argument("--jobs", dest="workers", type=int, help="processes (default: the cores at hand)")
    return parser


def _tell(console: Console, report: Report, *, quick: bool) -> None:
    found, sound = report.statistics, not report.total
    looked = "JSON only; the files are there" if sound else "JSON only"
    console.print(
        f"{found.images} images, {'nothing wrong' if sound else 'as far as they can be read'}"
        + (f" ({looked})" if quick else "")
        + (f"; {found.unlabelled} more have no {'' if sound else 'sound '}annotation" if found.unlabelled else "")
    )
    if not found.images:
        return
    for name, values in (
        ("height", found.sizes[:, 0]),
        ("width", found.sizes[:, 1]),
        ("segments", found.segments),
    ):
        low, middle, high = sorted(values.tolist())[0], sorted(values.tolist())[len(values) // 2], max(values.tolist())
        console.print(f"  {name:<9}{low} … {high}, median {middle}")
    table = Table("category", "", "segments", "crowds", "pixels", box=None, pad_edge=False)
    for place, each in enumerate(report.categories.entries):
        kind = "thing" if each.isthing else "stuff"
        crowds = str(found.crowds[place] or "")
        table.add_row(each.name, kind, str(found.counts[place]), crowds, f"{found.shares[place]:.2%}")
    table.add_row("(void)", "", "", "", f"{max(0.0, 1 - found.shares.sum()):.2%}")
    console.print(table)
