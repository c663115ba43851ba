"""What is shown of tracing is what the model believed, step by step, and its page stands still until it is asked."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from crbp.analysis import tracing_frames, tracing_gif
from crbp.analysis.animation import GAP, scrubber

YELLOW, BLUE, RED = [240, 228, 66], [86, 180, 233], [213, 94, 0]


def frames(steps: int = 8, images: int = 3, size: int = 16) -> list[Image.Image]:
    image = torch.rand(images, 1, size, size)
    mask = torch.rand(images, size, size) > 0.7
    return tracing_frames(image, mask, torch.rand(steps, images, size, size), columns=2)


def test_a_pixel_has_the_colour_of_what_is_believed_of_it() -> None:
    image, mask = torch.zeros(1, 1, 2, 2), torch.tensor([[[True, True], [False, False]]])
    image[0, 0, 1, 1] = 1.0
    belief = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]], [[[torch.nan, 0.5], [0.0, 0.0]]]])
    first, second = (np.asarray(each) for each in tracing_frames(image, mask, belief))
    assert first.tolist() == [[YELLOW, BLUE], [RED, [110] * 3]]
    assert second[0, 0].tolist() == BLUE  # nothing is believed where the state is not finite
    assert second[0, 1].tolist() == [163, 204, 150]
    assert second[1].tolist() == [[0] * 3, [110] * 3]


def test_images_stand_in_rows() -> None:
    assert frames(1, 3, 16)[0].size == (2 * 16 + GAP, 2 * 16 + GAP)
    assert frames(1, 1, 16)[0].size == (16, 16)


def test_an_animation_shows_every_step_trained_for_and_the_last() -> None:
    pictures = frames(50)
    made = Image.open(io.BytesIO(tracing_gif({"a": pictures, "a" * 200: pictures}, trained={"a": 3, "a" * 200: 5})))
    waits = [each.info["duration"] for each in ImageSequence.Iterator(made)]
    assert made.info["loop"] == 0
    assert 6 < len(waits) <= 40
    assert waits[2] > 2 * waits[1]  # it rests at each N
    assert waits[4] > 2 * waits[3]
    assert waits[-1] > 2 * waits[-2]


def test_an_animation_fits_into_the_bytes_it_may_have() -> None:
    pictures = frames(30, 4, 32)  # noise, which cannot be compressed
    whole, less = (tracing_gif({"a": pictures}, trained={"a": 4}, largest=size) for size in (10**9, 100_000))
    assert len(less) <= 100_000 < len(whole)


def test_models_of_different_lengths_are_refused() -> None:
    for given in ({}, {"a": frames(2), "b": frames(3)}, {"a": []}):
        with pytest.raises(ValueError, match="a picture after every step"):
            tracing_gif(given, trained=dict.fromkeys(given, 1))


def test_a_page_holds_every_step_and_plays_only_when_asked() -> None:
    pictures = frames(6)
    found = scrubber({"<a>": pictures, "b": pictures}, trained={"<a>": 2, "b": 3}, gif=b"GIF")
    (held,) = re.findall(r"const frames = (\[.*?\]), trained = ", found)
    kept = json.loads(held)
    assert [len(each) for each in kept] == [6, 6]
    shown = Image.open(io.BytesIO(base64.b64decode(kept[0][0]))).convert("RGB")
    assert shown.size == pictures[0].size
    assert re.findall(r'min="1" max="(\d+)" value="(\d+)"', found) == [("6", "3")]
    assert "N = 2: &lt;a&gt;" in found
    assert "N = 3: b" in found
    assert "<a>" not in found
    # Of its two ways to move, one waits for a click and the other is folded away.
    assert found.index("<details>") < found.index("data:image/gif")
    assert "<details open" not in found
    assert found.count("setInterval") == 1
    assert found.index("const play") < found.index("setInterval") < found.index('addEventListener("click"')
    assert "prefers-reduced-motion" in found
