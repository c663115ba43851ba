"""Segment numbers survive their colours, masks their run lengths, both as the official tools have them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from panopticapi.utils import id2rgb, rgb2id
from PIL import Image
from pycocotools import mask as coco

from crbp.data.panoptic import DataError, ids_from_rgb, png, read_ids, read_image, rgb_from_ids, run_lengths


def test_colours_are_those_of_the_official_tool():
    ids = np.random.default_rng(0).integers(0, 1 << 24, (20, 30))
    ids[0, :3] = 0, 255, (1 << 24) - 1
    colours = rgb_from_ids(ids)
    np.testing.assert_array_equal(colours, id2rgb(ids))
    np.testing.assert_array_equal(ids_from_rgb(colours), rgb2id(colours))
    np.testing.assert_array_equal(ids_from_rgb(colours), ids)


def test_what_no_colour_can_hold_is_refused():
    for wrong in (-1, 1 << 24):
        with pytest.raises(ValueError, match="must lie in 0 … 2\\*\\*24 - 1"):
            rgb_from_ids(np.array([[wrong]]))
    for wrong in (np.zeros((2, 2), np.uint8), np.zeros((2, 2, 4), np.uint8), np.zeros((2, 2, 3), np.int64)):
        with pytest.raises(ValueError, match="colours must be"):
            ids_from_rgb(wrong)


def test_a_png_reads_back_and_other_files_are_refused(tmp_path):
    ids = np.random.default_rng(1).integers(0, 1 << 24, (5, 7))
    (tmp_path / "a.png").write_bytes(png(rgb_from_ids(ids)))
    np.testing.assert_array_equal(read_ids(tmp_path / "a.png"), ids)
    Image.fromarray(ids.astype(np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(rgb_from_ids(ids)).save(tmp_path / "lossy.jpg")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no image")
    for name, words in (
        ("grey.png", "of mode L"),
        ("lossy.jpg", "is a JPEG"),
        ("cut.png", "cannot be read"),
        ("text.png", "cannot be read"),
        ("none.png", "No such file"),
    ):
        with pytest.raises(DataError, match=rf"{name}: .*{words}"):
            read_ids(tmp_path / name)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools' own arrays
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_run_lengths_are_those_of_coco(density):
    mask = np.random.default_rng(2).random((13, 9)) < density
    for each in (mask, ~mask):
        runs = run_lengths(each)
        assert sum(runs["counts"]) == mask.size
        np.testing.assert_array_equal(coco.decode(coco.frPyObjects(runs, 13, 9)), each)


def test_an_image_is_turned_as_its_camera_says(tmp_path):
    pixels = np.random.default_rng(3).integers(0, 256, (4, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png")), np.rot90(pixels, -1))


@pytest.mark.parametrize(
    ("dtype", "name", "mode"),
    [(np.uint16, "a.png", "I;16"), (np.uint16, "a.tif", "I;16"), (np.int32, "a.tif", "I"), (np.float32, "a.tif", "F")],
)
def test_more_than_8_bits_a_channel_are_refused(tmp_path, dtype, name, mode):
    Image.fromarray((np.arange(20) * 3000).reshape(4, 5).astype(dtype)).save(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name}: the image is of mode {mode}, .*; convert it to 8 bits a channel"):
        read_image(tmp_path / name)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes_of_8_bits_are_read(tmp_path, mode):
    Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode).save(tmp_path / "a.tif")
    assert np.asarray(read_image(tmp_path / "a.tif")).tolist() == [[[255] * 3] * 5] * 4


def test_grey_images_get_three_colours_and_broken_ones_a_name(tmp_path):
    Image.fromarray(np.full((2, 3), 9, np.uint8)).save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png")).tolist() == [[[9] * 3] * 3] * 2
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(4).integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[:-400])
    with pytest.raises(DataError, match=r"cut.jpg: the image cannot be read"):
        read_image(tmp_path / "cut.jpg")
