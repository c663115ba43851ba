"""Targets are what the JSON and the PNG say, on a set known pixel by pixel and on real images; faults are named."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from panoptic_files import CATEGORIES, IDS, SEGMENTS, save, write
from PIL import Image
from pycocotools.coco import COCO
from torch.utils.data import DataLoader

from crbp.data.panoptic import (
    Augment,
    CocoPanoptic,
    DataError,
    Key,
    Resize,
    View,
    collate,
    instance_annotations,
    rgb_from_ids,
)
from crbp.data.panoptic.dataset import example, mask_boxes
from crbp.data.panoptic.reader import locate


def read(root, **options):
    return CocoPanoptic(root / "images", root / "panoptic.json", **options)


def test_targets_of_a_known_set(tmp_path):
    write(tmp_path)
    data = read(tmp_path)
    image, target = data[0]
    assert (image.dtype, image.shape) == (torch.uint8, (3, 4, 6))
    np.testing.assert_array_equal(image[0].numpy(), IDS % 251)
    np.testing.assert_array_equal(image[2].numpy(), IDS % 239)
    assert target["labels"].tolist() == [0, 0]
    assert target["labels"].dtype == torch.int64
    assert target["boxes"].dtype == torch.float32
    assert target["boxes"].tolist() == [[0, 0, 2, 2], [3, 1, 5, 3]]
    assert target["masks"].dtype == torch.bool
    np.testing.assert_array_equal(target["masks"].numpy(), np.stack([IDS == 70000, IDS == 5]))
    want = np.select([IDS == 90, IDS == 91, IDS == 0], [1, 2, 255], 0)
    assert target["semantic"].dtype == torch.int64
    np.testing.assert_array_equal(target["semantic"].numpy(), want)
    assert (target["image_id"], target["size"]) == (11, (4, 6))


def test_an_image_without_instances_has_empty_targets(tmp_path):
    write(tmp_path)
    _, target = read(tmp_path)[1]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["masks"].shape == (0, 3, 5)
    assert target["semantic"].unique().tolist() == [1]


def test_the_ground_truth_for_the_metric(tmp_path):
    write(tmp_path)
    ids, segments = read(tmp_path, transform=Resize(shortest=50)).panoptic(0)
    assert ids.dtype == torch.int32
    np.testing.assert_array_equal(ids.numpy(), IDS)
    assert segments == SEGMENTS


def test_images_without_instances_can_be_left_out(tmp_path):
    content = write(tmp_path)
    data = read(tmp_path, filter_empty=True)
    assert (len(data), data.dropped, data.image_ids.tolist()) == (1, 1, [11])
    for segment in content["annotations"][0]["segments_info"]:
        segment["iscrowd"] = int(segment["category_id"] in (7, 3))
    save(tmp_path, content)
    with pytest.raises(DataError, match=r"no image of 2 has things, .*; filter_empty=False .*keeps all"):
        read(tmp_path, filter_empty=True)
    assert len(read(tmp_path)) == 2


def test_instances_decide_what_is_empty(tmp_path):
    write(tmp_path)
    annotations = [
        {"id": 1, "image_id": 11, "category_id": 7, "iscrowd": 1, "bbox": [0, 0, 3, 3]},
        {"id": 2, "image_id": 12, "category_id": 7, "iscrowd": 0, "bbox": [1, 1, 2, 2]},
    ]
    images = [{"id": 11}, {"id": 12}, {"id": 13}]
    (tmp_path / "i.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": []}))
    data = read(tmp_path, filter_empty=True, instances=tmp_path / "i.json")
    assert data.image_ids.tolist() == [12]
    (tmp_path / "i.json").write_text(json.dumps({"images": [], "annotations": [{}]}))
    with pytest.raises(DataError, match=r"i.json: an annotation has no usable 'image_id'"):
        read(tmp_path, filter_empty=True, instances=tmp_path / "i.json")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools' own arrays
def test_annotations_of_a_scene_are_those_of_coco(tmp_path, capsys):
    write(tmp_path)
    data, coco = read(tmp_path), COCO()
    coco.dataset = {
        "images": [{"id": 11, "height": 4, "width": 6}],
        "annotations": instance_annotations(data.scene(0), data.categories, first_id=1),
        "categories": [each for each in CATEGORIES if each["isthing"]],
    }
    coco.createIndex()
    assert sorted(coco.getCatIds()) == [3, 7]
    assert [coco.anns[k]["iscrowd"] for k in sorted(coco.anns)] == [0, 0, 1]
    for annotation, id in zip(coco.loadAnns([1, 2, 3]), (70000, 5, 300), strict=True):
        assert annotation["image_id"] == 11
        np.testing.assert_array_equal(coco.annToMask(annotation), id == IDS)


def test_categories_may_come_from_elsewhere(tmp_path):
    content = write(tmp_path)
    del content["categories"]
    save(tmp_path, content)
    with pytest.raises(DataError, match=r"panoptic.json: has no 'categories'"):
        read(tmp_path)
    (tmp_path / "c.json").write_text(json.dumps(CATEGORIES[::-1]))
    data = read(tmp_path, categories=tmp_path / "c.json")
    assert data.categories.things == (3, 7)
    assert data[0][1]["labels"].tolist() == [1, 1]


def _drop(content, key):
    del content["annotations"][0][key]


WRONG = [
    (lambda c: _drop(c, "image_id"), "lacks 'image_id'"),
    (lambda c: _drop(c, "segments_info"), "annotation of image 11: lacks 'segments_info'"),
    (lambda c: c["images"].append(c["images"][0]), r"image 11 \(a.png\): is twice in the list of images"),
    (lambda c: c["annotations"].append(c["annotations"][1]), r"image 12 \(b.png\): has more than one annotation"),
    (lambda c: c["images"].pop(), r"image 12 \(b.png\): has an annotation but is not in the list"),
    (lambda c: c["annotations"][0]["segments_info"][1].update(id=5), "segment 5: the id occurs twice"),
    (lambda c: c["annotations"][0]["segments_info"][1].update(category_id=8), "segment 90: its category 8 is not"),
    (lambda c: c["annotations"][0]["segments_info"][1].update(area=0), "segment 90: its area is 0"),
    (lambda c: c["annotations"][0]["segments_info"][1].update(iscrowd=1), "is a crowd of sky, which is stuff"),
    (lambda c: c["annotations"][0]["segments_info"][1].update(id=1 << 24), "three bytes of a PNG can hold"),
    (lambda c: c["images"][0].update(width="6"), "image 11: has width '6', not of type int"),
]


@pytest.mark.parametrize(("spoil", "words"), WRONG, ids=[words for _, words in WRONG])
def test_a_wrong_json_names_image_and_segment(tmp_path, spoil, words):
    content = write(tmp_path)
    spoil(content)
    save(tmp_path, content)
    with pytest.raises(DataError, match=rf"panoptic.json: .*{words}.*run crbp data check"):
        read(tmp_path)


def test_files_that_are_not_there_are_named_before_the_first_item(tmp_path):
    write(tmp_path)
    (tmp_path / "images" / "b.png").unlink()
    with pytest.raises(DataError, match=r"b.png: the file of image 12 is missing"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"elsewhere: there is no such folder"):
        read(tmp_path, labels=tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"none/images: there is no such folder"):
        CocoPanoptic(tmp_path / "none" / "images", tmp_path / "panoptic.json")
    (tmp_path / "panoptic.json").write_text("{")
    with pytest.raises(DataError, match=r"panoptic.json: cannot be read as JSON"):
        read(tmp_path)
    (tmp_path / "panoptic.json").write_text('{"images": []}')
    with pytest.raises(DataError, match=r"panoptic.json: has no list 'annotations'"):
        read(tmp_path)


def test_a_png_that_is_not_what_the_json_says_is_named(tmp_path):
    content = write(tmp_path)
    path = tmp_path / "panoptic" / "a.png"
    Image.fromarray(rgb_from_ids(np.where(IDS == 0, 77, IDS))).save(path)
    with pytest.raises(DataError, match=r"a.png: the PNG has the segment 77, which the JSON does not name"):
        read(tmp_path)[0]
    Image.fromarray(rgb_from_ids(np.where(IDS == 5, 0, IDS))).save(path)
    with pytest.raises(DataError, match=r"a.png: no pixel has the segment 5 that the JSON names"):
        read(tmp_path)[0]
    Image.fromarray(rgb_from_ids(np.tile(IDS, (1, 2)))).save(path)
    with pytest.raises(DataError, match=r"a.png: the PNG of image 11 is 4 x 12 pixels .*the JSON says 4 x 6"):
        read(tmp_path)[0]
    write(tmp_path, content)
    Image.new("RGB", (6, 5)).save(tmp_path / "images" / "a.png")
    with pytest.raises(DataError, match=r"images/a.png: the image of image 11 is 5 x 6"):
        read(tmp_path)[0]
    assert read(tmp_path)[1][1]["image_id"] == 12


def test_segments_are_found_whatever_their_numbers():
    rng = np.random.default_rng(0)
    for count in (0, 1, 30, 400):
        known = rng.permutation(np.arange(1, 1 << 16))[:count].astype(np.int32)
        places = rng.integers(0, count + 1, (40, 50))
        found, strangers = locate(np.concatenate([[0], known])[places].astype(np.int32), known)
        np.testing.assert_array_equal(found, places)
        assert found.dtype == (np.uint8 if count < 256 else np.int32)
        assert not strangers.any()
        ids = np.concatenate([[0], known])[places].astype(np.int32)
        ids[3, 4] = 1 << 20
        found, strangers = locate(ids, known)
        assert strangers.nonzero() == (np.array([3]), np.array([4]))
        assert found[3, 4] == 0


def test_boxes_enclose_their_masks_and_nothing_more():
    masks = np.random.default_rng(0).random((50, 9, 12)) < np.linspace(0.0, 0.2, 50)[:, None, None]
    boxes, seen = mask_boxes(masks)
    for mask, (x0, y0, x1, y1), any_pixel in zip(masks, boxes.astype(int), seen, strict=True):
        assert any_pixel == mask.any()
        assert mask[y0:y1, x0:x1].sum() == mask.sum()
        if any_pixel:
            sides = mask[y0, x0:x1], mask[y1 - 1, x0:x1], mask[y0:y1, x0], mask[y0:y1, x1 - 1]
            assert all(side.any() for side in sides)


def test_a_flip_turns_image_and_targets_alike(tmp_path):
    write(tmp_path)
    data = read(tmp_path)
    image, target = data[0]
    turned, other = example(data.scene(0), View(4, 6, True), data.categories)
    torch.testing.assert_close(turned.flip(-1), image)
    for key in ("masks", "semantic"):
        torch.testing.assert_close(other[key].flip(-1), target[key])
    x0, y0, x1, y1 = target["boxes"].unbind(1)
    torch.testing.assert_close(other["boxes"], torch.stack([6 - x1, y0, 6 - x0, y1], dim=1))


def test_instances_that_a_resize_hides_are_left_out(tmp_path):
    write(tmp_path)
    data = read(tmp_path, transform=Resize(shortest=2, longest=3))
    image, target = data[0]
    assert image.shape == (3, 2, 3)
    assert len(target["labels"]) == len(target["masks"]) == len(target["boxes"])
    assert target["masks"].flatten(1).any(1).all()
    tiny = read(tmp_path, transform=Resize(shortest=1, longest=1))[0][1]
    assert tiny["masks"].tolist() == [[[True]]]  # of the second cat, in the middle
    assert (tiny["labels"].tolist(), tiny["boxes"].tolist()) == ([0], [[0, 0, 1, 1]])
    assert target["size"] == (4, 6)


def test_an_epoch_changes_the_view_and_comes_back(tmp_path):
    write(tmp_path)
    data = read(tmp_path, transform=Augment(shortest=tuple(range(8, 40)), longest=64))
    shapes = [tuple(data[Key(0, epoch)][0].shape) for epoch in range(6)]
    assert len(set(shapes)) > 1
    assert shapes == [tuple(data[Key(0, epoch)][0].shape) for epoch in range(6)]
    torch.testing.assert_close(data[0][0], data[Key(0, 0)][0])


def test_places_count_from_both_ends(tmp_path):
    write(tmp_path)
    data = read(tmp_path)
    assert data[-1][1]["image_id"] == data[1][1]["image_id"] == 12
    assert data.name(-1) == "b.png"
    with pytest.raises(IndexError, match="index 2 is out of range for 2 images"):
        data[2]


def test_workers_give_what_this_process_gives(tmp_path):
    write(tmp_path)
    data = read(tmp_path)
    loader = DataLoader(data, batch_size=2, num_workers=1, collate_fn=collate, multiprocessing_context="fork")
    ((images, targets),) = list(loader)
    for k, (image, target) in enumerate(zip(images, targets, strict=True)):
        torch.testing.assert_close(image, data[k][0])
        torch.testing.assert_close(target["masks"], data[k][1]["masks"])


def test_what_a_worker_holds_of_an_image_is_small(tmp_path):
    content = write(tmp_path)
    images = [{**content["images"][0], "id": k} for k in range(1000)]
    annotations = [{**content["annotations"][0], "image_id": k} for k in range(1000)]
    save(tmp_path, {**content, "images": images, "annotations": annotations})
    data = read(tmp_path)
    assert len(data) == 1000
    # 49 bytes a segment, and no Python object of it: as few objects as for two images.
    assert len(pickle.dumps(data)) < 1000 * (5 * 50 + 100)


def test_real_images(shared_data):
    root = shared_data / "coco_panoptic_sample"
    data = CocoPanoptic(root / "input_images", root / "panoptic_examples.json", labels=root / "panoptic_examples")
    content = json.loads((root / "panoptic_examples.json").read_text())
    assert (len(data), len(data.categories.things), len(data.categories.stuff)) == (2, 80, 53)
    for index, annotation in enumerate(content["annotations"]):
        ids, segments = data.panoptic(index)
        assert segments == [{key: each[key] for key in SEGMENTS[0]} for each in annotation["segments_info"]]
        _, target = data[index]
        things = [
            each
            for each in annotation["segments_info"]
            if data.categories.isthing(each["category_id"]) and not each["iscrowd"]
        ]
        assert target["masks"].flatten(1).sum(1).tolist() == [each["area"] for each in things]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (each["bbox"] for each in things)]
        assert target["boxes"].tolist() == corners
        labels = [data.categories.thing_label(each["category_id"]) for each in things]
        assert target["labels"].tolist() == labels
        assert ((ids == 0) == (target["semantic"] == 255)).all()


def test_the_error_of_a_worker_is_that_of_the_reader() -> None:
    """A loader raises an error again from its message alone."""
    error = DataError("picture.png", "it is broken", "fetch it again")
    assert str(DataError(str(error))) == str(pickle.loads(pickle.dumps(error))) == str(error)
