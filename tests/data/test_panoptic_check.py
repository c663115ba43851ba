"""A check finds each thing that can be wrong, by file and number, and nothing in a set that is right."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from panoptic_files import IDS, save, write
from PIL import Image

from crbp.cli import main
from crbp.data.panoptic import CocoPanoptic, DataError, check, rgb_from_ids


def run(root, **options):
    return check(root / "images", root / "panoptic.json", **{"workers": 1, **options})


def _labels(root, ids):
    Image.fromarray(rgb_from_ids(ids)).save(root / "panoptic" / "a.png")


def _cut_jpeg(path):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)).save(buffer, "JPEG", quality=100)
    path.write_bytes(buffer.getvalue()[:-40])


def _segment(content, place, **values):
    content["annotations"][0]["segments_info"][place].update(values)


# What is spoilt, given the folder and the JSON; what is found; whether the quick form finds it.
SPOILT = {
    "no PNG": (lambda r, c: (r / "panoptic/b.png").unlink(), "b.png: image 12: the panoptic PNG is missing", True),
    "no image": (lambda r, c: (r / "images/b.png").unlink(), "images/b.png: image 12: the image is missing", True),
    "not in the JSON": (
        lambda r, c: _labels(r, np.where(IDS == 0, 77, IDS)),
        "a.png: image 11, segment 77: the PNG has 6 pixels of it, which the JSON does not name",
        False,
    ),
    "not in the PNG": (
        lambda r, c: _labels(r, np.where(IDS == 5, 0, IDS)),
        "a.png: image 11, segment 5: no pixel of the PNG has it",
        False,
    ),
    "image of another size": (
        lambda r, c: Image.new("RGB", (6, 5)).save(r / "images/a.png"),
        "images/a.png: image 11: is 5 x 6 pixels (height x width), where the JSON says 4 x 6",
        False,
    ),
    "PNG of another size": (
        lambda r, c: Image.new("RGB", (5, 9)).save(r / "panoptic/b.png"),
        "panoptic/b.png: image 12: is 9 x 5 pixels",
        False,
    ),
    "empty image": (
        lambda r, c: c["annotations"][1].update(segments_info=[]),
        "panoptic.json: image 12 (b.png): has no segment",
        True,
    ),
    "area of 0": (lambda r, c: _segment(c, 2, area=0), "image 11 (a.png), segment 5: its area is 0", True),
    "another area": (
        lambda r, c: _segment(c, 2, area=9),
        "a.png: image 11, segment 5: the JSON's area is 9, the PNG's 4",
        False,
    ),
    "another box": (
        lambda r, c: _segment(c, 2, bbox=[3, 1, 2, 3]),
        "a.png: image 11, segment 5: the JSON's bbox is [3, 1, 2, 3], the PNG's [3, 1, 2, 2]",
        False,
    ),
    "no box": (lambda r, c: _segment(c, 2, bbox=[3, 1]), "segment 5: its bbox is [3, 1], not", True),
    "a segment twice": (lambda r, c: _segment(c, 2, id=90), "segment 90: the id occurs twice in this image", True),
    "an image twice": (
        lambda r, c: c["images"].append(c["images"][1]),
        "image 12 (b.png): is twice in the list of images",
        True,
    ),
    "two annotations": (
        lambda r, c: c["annotations"].append(c["annotations"][1]),
        "image 12 (b.png): has more than one annotation",
        True,
    ),
    "unknown category": (
        lambda r, c: _segment(c, 2, category_id=8),
        "image 11 (a.png), segment 5: its category 8 is not in the list of categories",
        True,
    ),
    "unknown image": (lambda r, c: c["images"].pop(), "image 12 (b.png): has an annotation but is not", True),
    "unreadable PNG": (
        lambda r, c: (r / "panoptic/b.png").write_text("x"),
        "panoptic/b.png: image 12: the panoptic PNG cannot be read",
        False,
    ),
    "unreadable image": (
        lambda r, c: (r / "images/b.png").write_bytes((r / "images/b.png").read_bytes()[:50]),
        "images/b.png: image 12: the image cannot be read",
        False,
    ),
    "image cut short": (
        lambda r, c: _cut_jpeg(r / "images/b.png"),
        "images/b.png: image 12: the image cannot be read",
        False,
    ),
    "a lossy PNG": (
        lambda r, c: Image.new("L", (5, 3)).save(r / "panoptic/b.png"),
        "panoptic/b.png: image 12: is a PNG of mode L",
        False,
    ),
    "an image of 16 bits": (
        lambda r, c: Image.fromarray(np.zeros((3, 5), np.uint16)).save(r / "images/b.png"),
        "images/b.png: image 12: the image is of mode I;16, more than 8 bits a channel",
        False,
    ),
    "a file twice": (
        lambda r, c: c["images"][1].update(file_name="a.png"),
        "panoptic.json: image 12 (a.png): has the same file as image 11",
        True,
    ),
    "no number": (lambda r, c: c["images"][1].pop("id"), "an image: lacks 'id'", True),
    "not a dict": (lambda r, c: c["annotations"].append(5), "an annotation of image: is int 5, not a dict", True),
}


@pytest.mark.parametrize("name", SPOILT)
def test_each_fault_is_found(tmp_path, name):
    content = write(tmp_path)
    spoil, words, quick = SPOILT[name]
    spoil(tmp_path, content)
    save(tmp_path, content)
    report = run(tmp_path)
    assert any(words in str(each) for each in report.findings), [*map(str, report.findings)]
    assert report.total == len(report.findings)
    assert bool(run(tmp_path, quick=True).total) == quick
    with pytest.raises(DataError, match="run crbp data check"):
        report.require()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"annotations": [{"image_id": 11}, {"image_id": 13, "iscrowd": 1}]}, None),
        ({"annotations": [{"image_id": 13}]}, "instances.json: image 13: has an annotation but is not in the panoptic"),
        ({"annotations": [{"id": 1}]}, "instances.json: an annotation has no usable 'image_id'"),
        (None, "instances.json: has no list 'images'"),
    ],
)
def test_a_file_of_instances_is_looked_at_too(tmp_path, content, words):
    save(tmp_path, write(tmp_path))
    (tmp_path / "instances.json").write_text(json.dumps(content and {"images": [], **content}))
    report = run(tmp_path, instances=tmp_path / "instances.json")
    assert [words in str(each) for each in report.findings] == ([] if words is None else [True])


def test_a_sound_set_has_its_statistics(tmp_path):
    content = write(tmp_path)
    content["images"].append({"id": 13, "file_name": "c.png", "height": 2, "width": 2})
    save(tmp_path, content)
    for quick in (False, True):
        report = run(tmp_path, quick=quick)
        report.require()
        found = report.statistics
        assert (found.images, found.unlabelled) == (2, 1)
        assert found.sizes.tolist() == [[4, 6], [3, 5]]
        assert found.segments.tolist() == [5, 1]
        assert found.counts.tolist() == [2, 2, 1, 1]  # cat, sky, dog, sea
        assert found.crowds.tolist() == [0, 0, 1, 0]
        assert found.pixels.tolist() == [8, 21, 3, 1]
        np.testing.assert_allclose(found.shares.sum(), 1 - 6 / 39)


def test_all_faults_are_counted_and_some_listed(tmp_path):
    content = write(tmp_path)
    for place in range(5):
        _segment(content, place, category_id=1000)
    content["annotations"][1]["segments_info"] = []
    save(tmp_path, content)
    report = run(tmp_path, limit=4)
    assert (len(report.findings), report.total) == (4, 7)  # 5 categories, 1 empty image, 1 number the JSON lost
    assert run(tmp_path, limit=4, quick=True, allow_empty=True).total == 5
    with pytest.raises(DataError, match="7 findings in all"):
        report.require()
    with pytest.raises(ValueError, match="limit must be"):
        run(tmp_path, limit=0)
    with pytest.raises(ValueError, match="workers must be"):
        run(tmp_path, workers=0)


@pytest.mark.parametrize("images", [0, 2])
def test_a_set_without_annotations_passes_no_check_and_is_not_trained_on(tmp_path, capsys, images):
    content = write(tmp_path)
    save(tmp_path, {**content, "images": content["images"][:images], "annotations": []})
    words = "panoptic.json: annotations: the list is empty: no image has an annotation"
    for quick in (False, True):
        report = run(tmp_path, quick=quick, allow_empty=True)
        assert [words in str(each) for each in report.findings] == [True]
        assert (report.statistics.images, report.statistics.unlabelled) == (0, images)
    arguments = ["--images", str(tmp_path / "images"), "--panoptic", str(tmp_path / "panoptic.json"), "--jobs", "1"]
    assert main(["data", "check", *arguments]) == 2
    assert words in capsys.readouterr().out
    with pytest.raises(DataError, match=words):
        CocoPanoptic(tmp_path / "images", tmp_path / "panoptic.json")


def test_a_turned_image_has_the_size_that_it_is_shown_in(tmp_path):
    write(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (4, 6)).save(tmp_path / "images" / "a.png", exif=exif)
    assert run(tmp_path).findings == ()
    assert CocoPanoptic(tmp_path / "images", tmp_path / "panoptic.json")[0][0].shape == (3, 4, 6)


@pytest.mark.slow
def test_processes_find_what_one_finds(tmp_path, monkeypatch):
    content = write(tmp_path)
    images = [{**content["images"][k % 2], "id": k, "file_name": f"{k}.png"} for k in range(200)]
    for k in range(200):
        (tmp_path / "images" / f"{k}.png").symlink_to(tmp_path / "images" / content["images"][k % 2]["file_name"])
    annotations = [{**content["annotations"][k % 2], "image_id": k} for k in range(200)]
    annotations[150] = {**annotations[150], "segments_info": annotations[150]["segments_info"][1:]}
    save(tmp_path, {**content, "images": images, "annotations": annotations})
    one, two = run(tmp_path), run(tmp_path, workers=2)
    assert one.findings == two.findings
    assert one.total == 1
    assert one.statistics.pixels.tolist() == two.statistics.pixels.tolist()


def test_the_command(tmp_path, capsys):
    write(tmp_path)
    arguments = ["data", "check", "--images", str(tmp_path / "images"), "--panoptic", str(tmp_path / "panoptic.json")]
    arguments += ["--jobs", "1"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "2 images, nothing wrong" in shown
    assert "height   3 … 4" in shown
    for words in ("cat", "thing", "(void)", "15.38%", "20.51%"):
        assert words in shown
    assert main([*arguments, "--quick"]) == 0
    assert "JSON only" in capsys.readouterr().out

    (tmp_path / "panoptic.json").unlink()
    assert main(arguments) == 2
    assert "panoptic.json: cannot be read as JSON" in capsys.readouterr().err
    assert main(["data", "chekc", "--images", "a", "--panoptic", "b"]) == 2
    assert "invalid choice: 'chekc'" in capsys.readouterr().err


@pytest.mark.parametrize("name", SPOILT)
def test_the_command_names_each_fault_and_has_statistics_all_the_same(tmp_path, capsys, name):
    content = write(tmp_path)
    spoil, words, _ = SPOILT[name]
    spoil(tmp_path, content)
    save(tmp_path, content)
    arguments = ["--images", str(tmp_path / "images"), "--panoptic", str(tmp_path / "panoptic.json"), "--jobs", "1"]
    assert main(["data", "check", *arguments]) == 2
    told = capsys.readouterr()
    assert words in told.out
    report = run(tmp_path)
    assert f"crbp: error: {report.total} findings; correct the data set" in told.err
    found = report.statistics
    assert f"{found.images} images, as far as they can be read" in told.out
    assert told.out.index("segments ") > told.out.index(words)
    rows = [line.split() for line in told.out.splitlines()]
    for place, each in enumerate(content["categories"]):
        (row,) = [row for row in rows if row[0] == each["name"]]
        assert (row[2], row[-1]) == (str(found.counts[place]), f"{found.shares[place]:.2%}")


def test_where_no_image_can_be_read_the_command_has_findings_alone(tmp_path, capsys):
    content = write(tmp_path)
    for image in content["images"]:
        image["height"] = 0
    save(tmp_path, content)
    arguments = ["--images", str(tmp_path / "images"), "--panoptic", str(tmp_path / "panoptic.json"), "--jobs", "1"]
    assert main(["data", "check", *arguments]) == 2
    told = capsys.readouterr().out
    assert "panoptic.json: image 11" in told
    assert told.endswith("0 images, as far as they can be read; 2 more have no sound annotation\n")


def test_other_categories_can_be_named(tmp_path):
    content = write(tmp_path)
    (tmp_path / "c.json").write_text(json.dumps(content["categories"][:3]))
    report = run(tmp_path, categories=tmp_path / "c.json", quick=True)
    assert [str(each).split(": ", 1)[1] for each in report.findings] == [
        "image 11 (a.png), segment 91: its category 91 is not in the list of categories"
    ]


def test_real_images_are_sound(shared_data):
    root = shared_data / "coco_panoptic_sample"
    report = check(root / "input_images", root / "panoptic_examples.json", workers=1)
    assert report.findings == ()
    assert report.statistics.crowds.sum() == 3
