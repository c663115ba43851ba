"""Files from elsewhere, broken or made to do harm, end in an error that names the file, and reach nothing outside."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from panoptic_files import save, write
from PIL import Image

from crbp.data._files import faults
from crbp.data._foreign import MAX_PIXELS, leads_out
from crbp.data.panoptic import Categories, CocoPanoptic, DataError, check, read_ids, read_image
from crbp.data.pathfinder import FolderPathfinder, verify
from crbp.metrics.panoptic_files import PanopticWriter, evaluate_panoptic_files

NESTED = "[" * 100_000 + "]" * 100_000


def folder(root: Path, cells: Any = None) -> Path:
    """A folder of one contour image, with a metadata file."""
    for kind in ("imgs", "seg"):
        (root / kind).mkdir()
        Image.new("L", (4, 4)).save(root / kind / "a.png")
    (root / "metadata").mkdir()
    np.save(root / "metadata" / "1.npy", np.array([["imgs", "seg", "a.png", "0"]] if cells is None else cells))
    return root


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a row of it."""
    made = b"\x89PNG\r\n\x1a\n"
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for kind, content in ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(3 * width + 1))), (b"IEND", b"")):
        made += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return made


OUTSIDE = ["/etc/passwd", "../a.png", "x/../../a.png", "C:\\a.png", "..\\a.png", "a\0.png", "\ud800", "", "/", "."]


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii)
def test_a_name_in_a_panoptic_json_cannot_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    for part in ("images", "annotations"):
        content = write(tmp_path)
        content[part][0]["file_name"] = name
        save(tmp_path, content)
        with pytest.raises(DataError, match="leads out of the folder"):
            CocoPanoptic(tmp_path / "images", tmp_path / "panoptic.json")
        assert "leads out" in str(check(tmp_path / "images", tmp_path / "panoptic.json", workers=1).findings[0])
    with pytest.raises(DataError, match="leads out of the folder"):  # of the annotations, which are left spoilt
        evaluate_panoptic_files(tmp_path / "panoptic.json", None, tmp_path / "panoptic.json", None)


@pytest.mark.parametrize("name", ["a.png", "x/a.png", "10:00.png", "…/ü.png", "..a"])
def test_other_names_stay_inside(name: str) -> None:
    assert not leads_out(name)


def test_predictions_are_not_written_outside_their_folder(tmp_path: Path) -> None:
    ids = np.ones((2, 2), np.int64)
    with PanopticWriter(tmp_path / "in" / "found.json") as writer:
        for number in ("../../a", "/tmp/a"):
            with pytest.raises(ValueError, match="leads out of the folder"):
                writer.write(number, ids, [{"id": 1, "category_id": 1}])
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_checksums_and_manifests_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.sha256").write_text("00  ../secret\n")
    assert "leads out of the folder" in faults(tmp_path / "set", tmp_path / "set" / "a.sha256")[0]
    batch = {"sha256": "0", "images": 1}
    for wrong in ({"../secret": batch}, {"a": 3}, [], None, {"a": {"sha256": "0", "images": "1"}}):
        (tmp_path / "set" / "manifest.json").write_text(json.dumps({"shards": 1, "complete": True, "batches": wrong}))
        with pytest.raises(DataError, match="not a manifest that was written here"):
            verify(tmp_path / "set")


@pytest.mark.parametrize("size", [(20_000, 20_000), (1, MAX_PIXELS + 1), (9_000, 9_000)])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path, size: tuple[int, int]) -> None:
    bomb = folder(tmp_path) / "imgs" / "a.png"
    bomb.write_bytes(png_header(*size))
    for read in (read_ids, read_image):
        with pytest.raises(DataError, match=r"a.png: .*pixels"):
            read(bomb)
    (tmp_path / "seg" / "a.png").write_bytes(png_header(*size))
    with pytest.raises(DataError, match=r"a.png: .*pixels"):
        FolderPathfinder(tmp_path)[0]


def test_a_png_larger_than_its_json_says_is_not_decoded(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "panoptic" / "a.png").write_bytes(png_header(8_000, 8_000)[:80])  # decoding would find it cut short
    with pytest.raises(DataError, match=r"8000 x 8000 pixels .*the JSON says 4 x 6"):
        CocoPanoptic(tmp_path / "images", tmp_path / "panoptic.json")[0]


def test_a_prediction_of_another_size_is_not_decoded(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path / "found")
    (tmp_path / "found" / "panoptic" / "a.png").write_bytes(png_header(8_000, 8_000)[:80])
    with pytest.raises(
        DataError, match=r"image 11: the prediction is of \(8000, 8000\) pixels, the target of \(4, 6\)"
    ):
        evaluate_panoptic_files(tmp_path / "panoptic.json", None, tmp_path / "found" / "panoptic.json", None)


def test_an_image_of_one_pixel_is_read(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").size == (1, 1)
    assert read_ids(tmp_path / "a.png").shape == (1, 1)


def test_a_format_that_pillow_hands_to_another_program_is_no_image(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(DataError, match="cannot identify"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{'descr': '<U12', 'fortran_order': False, 'shape': (6, 5", "cannot be read"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999999,)}", "cannot be read"),
        ("{'descr': '<U0', 'fortran_order': False, 'shape': (100000000, 4)}", "not strings"),
    ],
)
def test_a_header_of_metadata_that_lies_is_told(tmp_path: Path, header: str, message: str) -> None:
    head = header.ljust(127).encode() + b"\n"
    (folder(tmp_path) / "metadata" / "1.npy").write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head)
    with pytest.raises(DataError, match=message):
        FolderPathfinder(tmp_path)


def test_metadata_of_what_is_no_text_is_told(tmp_path: Path) -> None:
    cells = np.array([["imgs", "seg", "a.png", "0"]])
    cells.view(np.uint32)[0, 0] = 0x7FFFFFFF
    with pytest.raises(DataError, match="is no character"):
        FolderPathfinder(folder(tmp_path, cells))
    np.save(tmp_path / "metadata" / "1.npy", np.array([[b"imgs", b"seg", b"\xff.png", b"0"]]))
    with pytest.raises(DataError, match="a cell is no text"):
        FolderPathfinder(tmp_path)


@pytest.mark.parametrize("label", ["inf", "-1", "1e400", "nan", "9" * 40])
def test_a_label_that_is_no_class_is_told(tmp_path: Path, label: str) -> None:
    with pytest.raises(DataError, match="label"):
        FolderPathfinder(folder(tmp_path, [["imgs", "a.png", "0", label]]))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("images", 0, "height"), 10**12, "32 bits cannot hold"),
        (("images", 0, "id"), 10**30, "64 bits cannot hold"),
        (("annotations", 0, "segments_info", 0, "category_id"), 2**31, "32 bits cannot hold"),
        (("annotations", 0, "segments_info", 0, "area"), 10**400, "not a number"),
        (("annotations", 0, "segments_info", 0, "area"), float("nan"), "not a number"),
        (("annotations", 0, "segments_info", 0, "bbox"), [0, 0, 0, 10**400], "bbox"),
        (("categories", 0, "id"), 2**40, "whole number"),
    ],
)
def test_numbers_that_no_array_holds_are_told(tmp_path: Path, path: Any, value: Any, message: str) -> None:
    content: Any = write(tmp_path)
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    save(tmp_path, content)
    with pytest.raises(DataError, match=message):
        CocoPanoptic(tmp_path / "images", tmp_path / "panoptic.json")


def test_json_nested_too_deep_is_told_by_every_reader(tmp_path: Path) -> None:
    write(tmp_path)
    nested = tmp_path / "nested.json"
    nested.write_text(NESTED)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "manifest.json").write_text(NESTED)
    for read in (
        lambda: CocoPanoptic(tmp_path / "images", nested, labels=tmp_path / "panoptic"),
        lambda: CocoPanoptic(tmp_path / "images", tmp_path / "panoptic.json", instances=nested, filter_empty=True),
        lambda: Categories.read(nested),
        lambda: evaluate_panoptic_files(nested, None, nested, None),
        lambda: verify(tmp_path / "set"),
    ):
        with pytest.raises(DataError, match="cannot be read as JSON"):
            read()


def test_errors_can_be_printed_whatever_they_name() -> None:
    assert str(DataError("\ud800", "is bad", "mend it")).encode() == rb"\ud800: is bad; mend it"
