"""Sizes are detectron2's, draws a function of seed, epoch and image, and maps follow their image."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from crbp.data.panoptic import Augment, Keep, Resize, View, shortest_edge
from crbp.data.panoptic.transforms import view_image, view_labels


def detectron2(old_height, old_width, short_edge_length, max_size):
    """ResizeShortestEdge.get_output_shape of detectron2, word for word."""
    h, w = old_height, old_width
    size = short_edge_length * 1.0
    scale = size / min(h, w)
    newh, neww = (size, scale * w) if h < w else (scale * h, size)
    if max(newh, neww) > max_size:
        scale = max_size * 1.0 / max(newh, neww)
        newh = newh * scale
        neww = neww * scale
    return int(newh + 0.5), int(neww + 0.5)


def test_sizes_are_those_of_detectron2():
    for height, width, shortest in np.random.default_rng(0).integers(20, 900, (2000, 3)).tolist():
        assert shortest_edge(height, width, shortest=shortest, longest=1333) == detectron2(
            height, width, shortest, 1333
        )
    assert shortest_edge(427, 640, shortest=800, longest=1333) == (800, 1199)
    assert shortest_edge(360, 640, shortest=800, longest=1333) == (750, 1333)


def test_no_side_vanishes():
    assert shortest_edge(1, 9000, shortest=800, longest=1333) == (1, 1333)


def test_what_is_drawn_is_a_function_of_seed_epoch_and_image():
    augment = Augment(seed=3)
    drawn = {(e, i): augment.view(480, 640, epoch=e, index=i) for e in range(20) for i in range(50)}
    assert all(Augment(seed=3).view(480, 640, epoch=e, index=i) == view for (e, i), view in drawn.items())
    heights = [view.height for view in drawn.values()]
    assert set(heights) == {640, 672, 704, 736, 768, 800}
    assert 400 < sum(view.flip for view in drawn.values()) < 600
    for changed in ({"seed": 4, "epoch": 0}, {"seed": 3, "epoch": 1}):
        other = Augment(seed=changed["seed"])
        again = [other.view(480, 640, epoch=changed["epoch"], index=i) for i in range(50)]
        assert again != [drawn[0, i] for i in range(50)]


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_sure_flip_is_sure(flip):
    augment = Augment(shortest=(96,), longest=128, flip=flip)
    assert {augment.view(96, 96, epoch=0, index=i) for i in range(100)} == {View(96, 96, flip == 1.0)}


def test_values_are_values():
    assert Augment(shortest=[640, 672]) == Augment(shortest=(640, 672))
    assert Resize(shortest=600).view(480, 640, epoch=5, index=1) == View(600, 800, False)
    assert Keep().view(480, 640, epoch=5, index=1) == View(480, 640, False)
    for value in (Augment(), Resize(), Keep(), View(1, 2, False)):
        with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
            value.flip = True


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shortest": ()}, "shortest is empty"),
        ({"shortest": (0,)}, "shortest must be a whole number"),
        ({"longest": 700}, "longest=700 is below shortest=800"),
        ({"flip": 1.5}, r"flip must lie in \[0, 1\]"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_wrong_values_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Augment(**settings)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
@pytest.mark.parametrize("view", [View(80, 64, True), View(20, 17, False)])
def test_a_map_is_resized_as_every_mask_of_it_would_be(dtype, view):
    ids = np.random.default_rng(0).integers(0, 250, (37, 51)).astype(dtype)
    seen = view_labels(ids, view)
    assert seen.dtype == dtype
    for value in (0, 7, 249):
        mask = Image.fromarray((ids == value).astype(np.uint8)).resize(
            (view.width, view.height), Image.Resampling.NEAREST
        )
        np.testing.assert_array_equal(seen == value, np.asarray(mask)[:, :: -1 if view.flip else 1])


def test_an_image_is_flipped_after_pillows_bilinear_resize():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    seen = view_image(Image.fromarray(pixels), View(13, 17, True))
    want = Image.fromarray(pixels).resize((17, 13), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(seen, np.asarray(want)[:, ::-1])
    np.testing.assert_array_equal(view_image(Image.fromarray(pixels), View(20, 30, False)), pixels)
