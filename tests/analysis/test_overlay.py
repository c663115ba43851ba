from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

from crbp.analysis.overlay import overlay

NAMES = {1: "square", 2: "ring", 7: "a floor with a very long name"}
COLOURS = {1: (220, 20, 60), 2: (0, 80, 200), 7: (90, 160, 90)}
SEGMENTS = [
    {"id": 5, "category_id": 1},
    {"id": 6, "category_id": 1},
    {"id": 9, "category_id": 2, "isthing": True},
    {"id": 300, "category_id": 7},
]


def scene() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Two squares, a ring, a floor, and void on the left."""
    ids = np.zeros((60, 80), np.int32)
    ids[45:, 10:] = 300
    ids[5:25, 20:40] = 5
    ids[25:42, 22:37] = 6
    rows, columns = np.mgrid[:60, :80]
    ids[np.abs(np.hypot(rows - 22, columns - 60) - 12) < 5] = 9
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    return pixels, ids


def draw(**changes: Any) -> Image.Image:
    pixels, ids = scene()
    arguments: dict[str, Any] = {
        "image": pixels,
        "panoptic_map": ids,
        "segments": SEGMENTS,
        "names": NAMES,
        "colours": COLOURS,
    }
    return overlay(**{**arguments, **changes})


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[float, float], str]]:
    """What is written into pictures, and where."""
    found = []
    real = ImageDraw.ImageDraw.text

    def text(self: Any, xy: Any, words: str, *rest: Any, **more: Any) -> None:
        found.append((xy, words))
        real(self, xy, words, *rest, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return found


def test_small_pictures_grow_by_a_whole_factor() -> None:
    picture = draw(shortest=150)  # 60 is enlarged three times
    assert picture.width == 240
    assert picture.height > 180
    assert picture.getpixel((0, picture.height - 1)) == (255, 255, 255)  # the legend
    large = draw(shortest=60, opacity=0)
    assert large.width == 80
    np.testing.assert_array_equal(np.asarray(large)[:4], scene()[0][:4])  # void


@pytest.mark.parametrize(
    ("size", "scale"), [((3000, 8), 1), ((5000, 40), 1), ((1000, 100), 4), ((100, 1000), 4), ((80, 60), 8)]
)
def test_a_narrow_picture_grows_no_further_than_4096_pixels(size: tuple[int, int], scale: int) -> None:
    pixels, ids = np.zeros((*size, 3), np.uint8), np.zeros(size, int)
    assert draw(image=pixels, panoptic_map=ids, segments=[]).size == (scale * size[1], scale * size[0])


def test_equal_arguments_make_equal_pictures_of_arrays_and_tensors() -> None:
    pixels, ids = scene()
    first = draw()
    again = draw(image=torch.from_numpy(pixels), panoptic_map=torch.from_numpy(ids), segments=SEGMENTS[::-1])
    assert first.tobytes() == again.tobytes()


def test_segments_of_a_class_differ_in_shade_and_the_largest_has_the_colour_itself() -> None:
    solid = np.asarray(draw(opacity=1, shortest=480))
    # Points well inside, away from contours and names, at a scale of 8.
    first, second = solid[8 * 5 + 16, 8 * 20 + 16], solid[8 * 42 - 16, 8 * 22 + 16]
    assert tuple(first) == COLOURS[1]
    assert tuple(second) != COLOURS[1]
    assert tuple(second) == (154, 14, 42)


def test_the_fill_is_translucent_and_the_contour_is_not() -> None:
    pixels, _ = scene()
    half, solid = (np.asarray(draw(opacity=share)).astype(float) for share in (0.5, 1))
    inside = (8 * 5 + 16, 8 * 20 + 16)
    np.testing.assert_allclose(half[inside], (pixels[7, 22] + np.array(COLOURS[1])) / 2, atol=0.5)
    edge = (8 * 5, 8 * 20 + 16)
    np.testing.assert_array_equal(half[edge], solid[edge])
    assert (solid[edge] > solid[inside]).all()
    above, below = 8 * 25 - 1, 8 * 25  # where one square meets the other: each has its own contour
    assert (solid[above, 8 * 30] > solid[above - 6, 8 * 30]).all()
    assert (solid[below, 8 * 30] > solid[below + 6, 8 * 30]).all()
    assert (solid[above, 8 * 30] != solid[below, 8 * 30]).any()


def test_names_stand_in_their_segments_and_apart(written: list[tuple[tuple[float, float], str]]) -> None:
    picture = draw()
    _, ids = scene()
    by_id = {segment["id"]: NAMES[segment["category_id"]] for segment in SEGMENTS}
    names = [entry for entry in written if entry[0][1] < 480]
    assert sorted(name for _, name in names) == sorted(by_id.values())
    for (x, y), name in names:
        number = int(ids[int(y) // 8, int(x) // 8])
        assert by_id[number] == name
        depth = ndimage.distance_transform_edt(np.pad(ids == number, 1))[1:-1, 1:-1]
        assert depth[int(y) // 8, int(x) // 8] >= depth.max() - 0.5  # nowhere is farther inside
    legend = [name for (_, y), name in written if y >= 480]
    assert legend == [NAMES[7], "ring", "square × 2"]  # by area
    assert picture.width == 640


def test_names_stay_in_the_picture_and_do_not_meet(written: list[tuple[tuple[float, float], str]]) -> None:
    ids = np.zeros((40, 60), np.int64)
    ids[:20, :12], ids[20:, :12], ids[:20, 12:24] = 5, 6, 9
    segments = [{"id": number, "category_id": 7} for number in (5, 6, 9)]
    draw(image=np.zeros((40, 60, 3), np.uint8), panoptic_map=ids, segments=segments)
    names = [entry for entry in written if entry[0][1] < 480]
    assert len(names) == 2  # the two side by side have no room for both
    font_size = round(480 / 36)
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    for (x, _), name in names:
        assert x > probe.textlength(name, font_size=font_size) / 2


def test_thin_segments_get_no_name(written: list[tuple[tuple[float, float], str]]) -> None:
    ids = np.zeros((480, 480), np.int64)
    ids[:, 100:110] = 5
    draw(image=np.zeros((480, 480, 3), np.uint8), panoptic_map=ids)
    assert [name for _, name in written] == ["square"]  # in the legend


def test_nothing_found() -> None:
    pixels, ids = scene()
    empty = draw(panoptic_map=np.zeros_like(ids), segments=[])
    np.testing.assert_array_equal(np.asarray(empty), pixels.repeat(8, 0).repeat(8, 1))


def test_a_long_legend_takes_rows() -> None:
    assert draw(names={**NAMES, 2: "a ring, too, of which much could be said " * 2}).height > draw().height


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": np.zeros((60, 80), np.uint8)}, r"must be \(H, W, 3\) of uint8, not \(60, 80\)"),
        ({"image": np.zeros((60, 80, 3), np.float32)}, "of float32"),
        ({"panoptic_map": np.zeros((60, 8), int)}, r"must be \(60, 80\) of integers"),
        ({"panoptic_map": np.zeros((60, 80))}, "of float64"),
        ({"opacity": 1.5}, r"in \[0, 1\], not 1.5"),
        ({"segments": SEGMENTS[1:]}, "has the id 5, which no segment has"),
        ({"names": {1: "square", 7: "floor"}}, "category 2 of segment 9 needs a name"),
        ({"colours": {1: (0, 0, 0), 7: (0, 0, 0)}}, "category 2 of segment 9 needs a name and a colour"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(**changes)
