"""Shapes are a function of their seed, in files as on the fly, and every thing of them can be told."""

from __future__ import annotations

import colorsys
import json
import subprocess
from typing import get_args

import numpy as np
import pytest
import torch

from crbp.cli import main
from crbp.data.panoptic import (
    CocoPanoptic,
    DataError,
    Resize,
    Shapes,
    check,
    ids_from_rgb,
    instance_annotations,
    rgb_from_ids,
    write_shapes,
)
from crbp.data.panoptic import _layout as layout
from crbp.data.panoptic._forms import FORMS, MARGIN, Stream
from crbp.data.panoptic.shapes import CATEGORIES, segment_ids

NAMES = (
    *("stripes", "checks", "dots", "ring", "square", "star", "star", "ring", "star", "snake", "star", "star"),
    *("triangle", "crescent", "square", "square"),
)
SHAPES = {"size": 128, "objects": [6, 14], "stream_version": 1}
PIXELS = 5836170
AREAS = [0, 3515, 5647, 4492, 247, 218, 147, 177, 129, 166, 147, 200, 364, 174, 38, 595, 128]


def _write(out, images=(6, 3), **options):
    return write_shapes(out, images=images, size=128, **{"batch_size": 4, "workers": 1, "progress": False, **options})


def _files(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_an_image_is_a_function_of_seed_split_and_place():
    base = {"objects": (6, 14), "seed": 0, "split": "train", "index": 3}
    first, again = layout.draw(128, **base), layout.draw(128, **base)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.places, again.places)
    for change in (
        {"seed": 1},
        {"split": "val"},
        {"index": 4},
        {"looks": "plain"},
        {"looks": "coloured"},
        {"zoom": 1.5},
        {"alike": 0.5},
    ):
        assert (layout.draw(128, **{**base, **change}).image != first.image).any()


def test_a_picture_of_a_seed_stays_what_it_is():
    drawn = layout.draw(128, (6, 14), seed=0, split="train", index=0)
    # A change of these, which a written set would not resume with, needs a new STREAM_VERSION.
    assert layout.STREAM_VERSION == 1
    assert drawn.names == NAMES
    assert int(drawn.image.astype(np.int64).sum()) == PIXELS
    assert np.bincount(drawn.places.ravel()).tolist() == AREAS


def test_a_coloured_picture_of_a_seed_stays_what_it_is():
    drawn = layout.draw(128, (3, 7), looks="coloured", zoom=1.6, seed=0, split="train", index=0)
    assert layout.STREAM_VERSION == 1  # as above
    assert drawn.names == ("stripes", "plain", "blotches", "checks", "star", "spiral", "star", "ring", "star")
    assert int(drawn.image.astype(np.int64).sum()) == 5786763


def test_plain_things_have_one_colour_each(monkeypatch):
    drawn = {}
    for looks in get_args(layout.Looks):
        kinds = []
        paint = layout._paint.paint
        monkeypatch.setattr(
            layout._paint, "paint", lambda *given, kinds=kinds, paint=paint: (kinds.append(given), paint(*given))
        )
        for index in range(4):
            layout.draw(128, (6, 14), looks=looks, seed=5, split="train", index=index)
        monkeypatch.undo()
        drawn[looks] = {int(given[7][0]) for given in kinds if given[6] != 0}  # textures of what has a place
    assert drawn["plain"] == drawn["coloured"] == {layout._paint.PLAIN}
    assert len(drawn["textured"]) > 3


def test_a_class_of_coloured_things_is_told_by_its_colour():
    hues = {name: [] for name in layout.THINGS}
    for index in range(30):
        drawn = layout.draw(128, (3, 7), looks="coloured", seed=5, split="train", index=index)
        for place, name in enumerate(drawn.names, start=1):
            if name in hues:
                red, green, blue = np.median(drawn.image[drawn.places == place], axis=0) / 255
                hues[name].append(colorsys.rgb_to_hsv(red, green, blue)[0])
    for k, name in enumerate(layout.THINGS):
        away = np.abs((np.array(hues[name]) - k / 10 + 0.5) % 1.0 - 0.5)
        assert np.mean(away < 0.05) > 0.9, name  # strokes and what shines through an edge change few


def test_zoom_makes_all_as_many_times_as_large():
    areas = {}
    for zoom in (1.0, 2.0):
        drawn = [layout.draw(128, (1, 1), zoom=zoom, seed=5, split="train", index=index) for index in range(60)]
        counted = [(np.bincount(each.places.ravel()), each) for each in drawn if not any(each.crowd)]
        areas[zoom] = np.mean([count[-1] for count, each in counted if each.names[-1] in layout.THINGS])
    assert 3.0 < areas[2.0] / areas[1.0] < 4.5  # 4, less what lies beyond the border


def test_more_that_are_alike_share_their_class_with_another():
    shares = {}
    for alike in (0.0, 0.25, 0.75):
        drawn = [
            layout.draw(128, (6, 8), looks="coloured", alike=alike, seed=5, split="val", index=i) for i in range(40)
        ]
        named = [[name for name in each.names if name in layout.THINGS] for each in drawn]
        shares[alike] = np.mean([names.count(name) > 1 for names in named for name in names])
    assert shares[0.0] < shares[0.25] - 0.1 < shares[0.75] - 0.4


@pytest.mark.parametrize("size", [128, 200])
def test_what_is_left_of_every_thing_can_be_told(size):
    for index in range(12):
        drawn = layout.draw(size, (6, 14), seed=5, split="train", index=index)
        areas = np.bincount(drawn.places.ravel(), minlength=len(drawn.names) + 1)
        assert drawn.image.shape == (size, size, 3)
        assert drawn.places.shape == (size, size)
        assert (areas[1:] >= layout.LEAST_AREA * (size / 192) ** 2).all()
        assert areas[0] < 0.02 * size**2
        stuff = [name for name in drawn.names if name in layout.STUFF]
        assert 1 <= len(stuff) == len(set(stuff)) <= 4
        assert all(name in layout.THINGS for name in drawn.names[len(stuff) :])


def test_no_thing_is_hidden_by_more_than_its_share(monkeypatch):
    seen = []
    finish = layout._Picture.finish

    def spy(picture):
        seen.append((picture.areas, picture._count()[len(picture.stuff) + 1 :], [t.crowd for t in picture.things]))
        np.testing.assert_array_equal(picture.visible, picture._count())
        return finish(picture)

    monkeypatch.setattr(layout._Picture, "finish", spy)
    for index in range(12):
        layout.draw(128, (10, 20), seed=6, split="train", index=index)
    shares = [v / a for areas, visible, _ in seen for a, v in zip(areas, visible, strict=False)]
    assert min(shares) >= layout.LEAST_VISIBLE
    assert np.mean(np.array(shares) < 0.9) > 0.2  # and much is hidden


def test_classes_looks_and_crowds_all_occur():
    drawn = [layout.draw(128, (6, 14), seed=7, split="train", index=k) for k in range(40)]
    assert {name for each in drawn for name in each.names} == {*layout.THINGS, *layout.STUFF}
    assert any(any(each.crowd) for each in drawn)
    counts = [sum(name in layout.THINGS for name in each.names) for each in drawn]
    assert 6 <= np.mean(counts) <= 14


def test_long_things_are_cut_in_two():
    cut = 0
    for index in range(16):
        drawn = layout.draw(128, (6, 14), seed=8, split="train", index=index)
        for k, name in enumerate(drawn.names, start=1):
            if name in ("bar", "snake", "ring", "spiral"):
                cut += _pieces(drawn.places == k) > 1
    assert cut >= 8


def _pieces(mask):
    """The number of connected pieces of at least 12 pixels."""
    from scipy.ndimage import label

    return int((np.bincount(label(mask, np.ones((3, 3)))[0].ravel())[1:] >= 12).sum())


def test_what_is_too_small_to_be_told_leaves_the_labels():
    picture = layout._Picture(128, Stream(0), layout.WINDOW, "textured", layout.ALIKE)
    picture.places[:] = 1
    picture.places[0, :20] = 2
    picture.places[4:10, 4:10] = 3
    drawn = picture.finish()
    assert drawn.places[0, 0] == 0
    assert drawn.names == (layout.STUFF[picture.stuff[0]], layout.STUFF[picture.stuff[2]])
    assert drawn.places[5, 5] == 2


@pytest.mark.parametrize("name", FORMS)
def test_an_outline_fills_its_extent_and_no_more(name):
    for key in range(5):
        form = FORMS[name](Stream(key), 1.0)
        reach = form.extent + MARGIN
        side = int(2 * reach) + 2
        field = np.empty((side, side), np.float32)
        form.draw(field, 0, 0, 1.0, np.array([side / 2, side / 2]))
        inside = field < 0
        away = np.hypot(*(np.indices((side, side)) + 0.5 - side / 2))
        assert away[inside].max() <= form.extent + 1.0
        assert inside.sum() > layout.LEAST_AREA
        # A distance: it changes by at most about 1 from a pixel to the next, at most about 1 off at the outline.
        near = np.abs(field[:, :-1]) < 2
        steps = np.abs(np.diff(field, axis=1))[near & (np.abs(field[:, 1:]) < 2)]
        assert steps.max() < 1.3
        if len(form.spine):
            spine = (form.spine + side / 2).astype(int)
            assert inside[spine[:, 1], spine[:, 0]].mean() > 0.7


def test_segment_numbers_are_colours_near_their_category():
    # Each thing at each of the places that an image can have, and each kind of stuff.
    numbers = [segment_ids(np.full(255, id, np.int32)) for id in CATEGORIES.things]
    numbers.append(segment_ids(np.array(CATEGORIES.stuff, np.int32)))
    flat = np.concatenate(numbers)
    assert len(set(flat.tolist())) == len(flat)
    assert flat.min() > 0
    np.testing.assert_array_equal(ids_from_rgb(rgb_from_ids(flat[None]))[0], flat)
    for id, found in zip(CATEGORIES.things, numbers, strict=False):
        away = rgb_from_ids(found[None])[0].astype(int) - np.minimum(CATEGORIES.colour(id), 231)
        assert np.abs(away).max() == 24


def test_files_hold_the_pixels_made_on_the_fly(tmp_path):
    done = _write(tmp_path)
    assert (done.made, done.kept) == (9, 0)
    for split, images in (("train", 6), ("val", 3)):
        made = Shapes(128, split=split, images=images)
        read = CocoPanoptic(tmp_path / split, tmp_path / f"panoptic_{split}.json")
        assert len(read) == len(made) == images
        assert read.categories == made.categories == CATEGORIES
        written = json.loads((tmp_path / f"instances_{split}.json").read_text(encoding="utf-8"))["annotations"]
        numbers = [each["id"] for each in written]
        assert len(set(numbers)) == len(numbers)
        assert min(numbers) >= 1
        things = [each for k in range(images) for each in instance_annotations(made.scene(k), CATEGORIES, first_id=1)]
        assert [{**each, "id": 0} for each in written] == [{**each, "id": 0} for each in things]
        for k in range(images):
            (image, target), (other, wanted) = read[k], made[k]
            torch.testing.assert_close(image, other)
            assert target.keys() == wanted.keys()
            for key in target:
                torch.testing.assert_close(target[key], wanted[key])
            assert read.panoptic(k)[1] == made.panoptic(k)[1]
            torch.testing.assert_close(read.panoptic(k)[0], made.panoptic(k)[0])
        report = check(tmp_path / split, tmp_path / f"panoptic_{split}.json", workers=1)
        assert report.findings == ()


@pytest.mark.parametrize("kind", [{"looks": "plain"}, {"looks": "coloured"}, {"zoom": 1.5}, {"alike": 0.5}])
def test_other_kinds_of_shapes_are_written_as_they_are_made(tmp_path, kind):
    _write(tmp_path, **kind)
    read = CocoPanoptic(tmp_path / "train", tmp_path / "panoptic_train.json")
    made = Shapes(128, images=6, **kind)
    assert all(np.array_equal(read.scene(k).image, made.scene(k).image) for k in range(6))


def test_a_writing_broken_off_goes_on(tmp_path):
    _write(tmp_path)
    before = _files(tmp_path)
    assert json.loads(before["manifest.json"])["complete"]
    sums = [name for name in before if name.startswith("checksums/")]
    subprocess.run(["sha256sum", "--check", "--quiet", *sums], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "checksums" / "train-000001.sha256").unlink()  # killed before it was whole
    damaged = tmp_path / "panoptic_val" / "000000000002.png"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (tmp_path / "instances_val.json").unlink()
    done = _write(tmp_path)
    assert (done.made, done.kept) == (5, 4)
    assert _files(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "of other seed"),
        ({"images": (7, 3)}, "of other images"),
        ({"objects": (1, 2)}, "of other shapes"),
        ({"looks": "plain"}, "of other shapes"),
        ({"zoom": 2}, "of other shapes"),
        ({"alike": 0.5}, "of other shapes"),
    ],
)
def test_two_sets_cannot_share_a_folder(tmp_path, change, words):
    (tmp_path / "manifest.json").write_text(
        json.dumps({"shapes": SHAPES, "seed": 0, "images": [6, 3], "batch_size": 4})
    )
    with pytest.raises(DataError, match=words):
        _write(tmp_path, **change)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 100}, "size must be a whole number of 128 to 512"),
        ({"objects": (5, 4)}, "objects must be"),
        ({"objects": (1, 65)}, "objects must be"),
        ({"looks": "colored"}, "looks must be one of 'textured', 'plain', 'coloured', not 'colored'"),
        ({"zoom": 0.5}, "zoom must be a number of 1 to 2, not 0.5"),
        ({"zoom": float("nan")}, "zoom must be"),
        ({"alike": 0.8}, "alike must be a share of 0 to 0.75, not 0.8"),
        ({"alike": float("nan")}, "alike must be"),
        ({"seed": -1}, "seed must be"),
        ({"images": 0}, "images must be"),
        ({"split": "test"}, "split must be one of 'train', 'val'"),
    ],
)
def test_wrong_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Shapes(**options)


def test_shapes_take_a_transform():
    data = Shapes(128, images=2, transform=Resize(shortest=64, longest=64))
    image, target = data[1]
    assert image.shape == (3, 64, 64)
    assert target["masks"].shape[1:] == target["semantic"].shape == (64, 64)
    assert target["size"] == (128, 128)
    assert data.scene(-1).image_id == target["image_id"] == 2
    for ask in (data.scene, data.panoptic, data.__getitem__):
        with pytest.raises(IndexError, match="index 2 is out of range for 2 images"):
            ask(2)


def test_the_command(tmp_path, capsys):
    arguments = ["generate", "shapes", "--out", str(tmp_path / "s"), "--images", "2,1", "--size", "128", "--jobs", "1"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("3 images made, 0 kept from before: ")
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("0 images made, 3 kept")
    for wrong, words in (
        (["--images", "5"], "'5' is not two whole numbers"),
        (["--size", "64"], "size must be a whole number of 128 to 512 pixels, not 64"),
        (["--seed", "1"], "the folder holds a data set of other seed"),
        (["--looks", "plain"], "the folder holds a data set of other shapes"),
        (["--zoom", "3"], "zoom must be a number of 1 to 2, not 3.0"),
        (["--alike", "0.5"], "the folder holds a data set of other shapes"),
        (["--color", "1"], "unrecognized arguments"),
    ):
        assert main([*arguments, *wrong]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
def test_processes_write_what_one_writes(tmp_path):
    _write(tmp_path / "one")
    _write(tmp_path / "two", workers=2)
    assert _files(tmp_path / "one") == _files(tmp_path / "two")
