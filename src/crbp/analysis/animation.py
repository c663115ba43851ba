"""Contours being traced: a picture for every step, an animation, and a page's part to go through them."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from crbp.analysis.overlay import font_of

# Okabe and Ito: told apart by colour-blind readers.
_TRACED, _MISSED, _WRONG = np.array([240, 228, 66]), np.array([86, 180, 233]), np.array([213, 94, 0])
_GROUND, _INK, _FAINT = (24, 24, 28), (240, 240, 240), (110, 110, 118)  # an own ground: pages are light or dark
COLOURS = "Yellow: traced. Blue: on the contour and not reached. Red: traced and not on the contour."
GAP = 2  # pixels between images
LARGEST = 800_000  # bytes of an animation
_MOST = 40  # pictures of one
_SECONDS = {"up to N": 0.16, "beyond": 0.1, "at N": 1.0, "at the end": 1.6}


def tracing_frames(image: Tensor, mask: Tensor, probability: Tensor, *, columns: int = 3) -> list[Image.Image]:
    """What a model has traced after each step, as one picture of all images, a pixel of it one of theirs.

    Yellow is traced; blue is on the contour and not reached; red is traced and not on the contour.

    Args:
        image: ``(B, 1, H, W)`` in [0, 1].
        mask: ``(B, H, W)`` of bool.
        probability: of the target after step 1 … T, ``(T, B, H, W)``; what is not finite counts as 0.
        columns: images side by side.
    """
    belief = probability.nan_to_num(0.0).clamp(0, 1).numpy()[..., None]
    ground = np.repeat(110 * image[:, 0].numpy()[..., None], 3, axis=-1)
    target = mask.numpy()[..., None]
    pictures = []
    for seen in belief:
        on = _MISSED + seen * (_TRACED - _MISSED)
        off = ground + seen * (_WRONG - ground)
        pictures.append(Image.fromarray(_grid(np.where(target, on, off).round().astype(np.uint8), columns)))
    return pictures


def tracing_gif(
    frames: Mapping[str, Sequence[Image.Image]], *, trained: Mapping[str, int], largest: int = LARGEST
) -> bytes:
    """An animation of one model or of several side by side, which says at which step it is.

    It runs to the last step and starts over. Steps beyond those trained for are shown in part where there are many.

    Args:
        frames: model name → its picture after step 1 … T, as `tracing_frames` makes them.
        trained: model name → N, the steps it was trained for.
        largest: bytes; pictures are made smaller and fewer until it fits.

    Raises:
        ValueError: if there is no model, or one has other steps than another.
    """
    lengths = {len(pictures) for pictures in frames.values()}
    if len(lengths) != 1 or not min(lengths, default=0):
        raise ValueError(f"every model needs a picture after every step, not {sorted(lengths)} of them")
    width, _ = next(iter(frames.values()))[0].size
    scale, most = max(1, round(700 / (len(frames) * width))), _MOST
    while True:
        made = _gif(frames, trained, scale, most)
        if len(made) <= largest or (scale == 1 and most <= 5):
            return made
        smaller = int(scale * math.sqrt(largest / len(made)))
        scale, most = (max(1, min(scale - 1, smaller)), most) if scale > 1 else (1, most // 2)


def scrubber(frames: Mapping[str, Sequence[Image.Image]], *, trained: Mapping[str, int], gif: bytes) -> str:
    """HTML of the same to go through by hand: nothing moves until it is asked to.

    Args:
        frames: as for `tracing_gif`.
        trained: as for `tracing_gif`.
        gif: that `tracing_gif` made.
    """
    last = len(next(iter(frames.values())))
    start = max(trained.values())
    encoded = {name: [_png(picture) for picture in pictures] for name, pictures in frames.items()}
    views = "\n".join(
        f'<div><img alt="What {html.escape(name)} has traced" src="data:image/png;base64,{pictures[start - 1]}">'
        f"<p>{html.escape(name)}, trained for {trained[name]} steps</p></div>"
        for name, pictures in encoded.items()
    )
    together: dict[int, list[str]] = {}
    for name, n in trained.items():
        together.setdefault(n, []).append(name)
    marks = "".join(
        f'<span style="--at: {(n - 1) / max(1, last - 1):.4f}">'
        f"N = {n}{'' if len(together) == 1 else ': ' + html.escape(', '.join(names))}</span>"
        for n, names in sorted(together.items())
    )
    return _SCRUBBER.format(
        views=views,
        marks=marks,
        last=last,
        start=start,
        rows=len(together),
        colours=COLOURS,
        gif=base64.b64encode(gif).decode(),
        frames=json.dumps(list(encoded.values())),
        trained=json.dumps(sorted(together)),
    )


def _grid(pictures: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Images ``(B, H, W, 3)`` in rows, a gap between them."""
    count, height, width, _ = pictures.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    grid = np.empty((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), np.uint8)
    grid[:] = _GROUND
    for place, picture in enumerate(pictures):
        top, left = place // columns * (height + GAP), place % columns * (width + GAP)
        grid[top : top + height, left : left + width] = picture
    return grid


def _png(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.quantize(64, dither=Image.Dither.NONE).save(content, "PNG", optimize=True)
    return base64.b64encode(content.getvalue()).decode()


def _gif(frames: Mapping[str, Sequence[Image.Image]], trained: Mapping[str, int], scale: int, most: int) -> bytes:
    last, longest = len(next(iter(frames.values()))), max(trained.values())
    later = max(1, -(-(last - longest) // max(1, most - longest)))
    steps = sorted({*range(1, longest + 1), *range(longest, last + 1, later), last})
    drawn = [_panel(frames, trained, step, last, scale) for step in steps]
    # One palette for all pictures, of those with the most colours: a palette each would take more room and flicker.
    sample = Image.new("RGB", (drawn[0].width, 2 * drawn[0].height))
    sample.paste(drawn[len(drawn) // 4])
    sample.paste(drawn[-1], (0, drawn[0].height))
    palette = sample.quantize(96)
    flat = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in drawn]
    content = io.BytesIO()
    flat[0].save(
        content, "GIF", save_all=True, append_images=flat[1:], optimize=True, loop=0,
        duration=[round(1000 * _wait(step, trained, last)) for step in steps],
    )  # fmt: skip
    return content.getvalue()


def _wait(step: int, trained: Mapping[str, int], last: int) -> float:
    if step == last:
        return _SECONDS["at the end"]
    if step in trained.values():
        return _SECONDS["at N"]
    return _SECONDS["up to N" if step < max(trained.values()) else "beyond"]


def _panel(
    frames: Mapping[str, Sequence[Image.Image]], trained: Mapping[str, int], step: int, last: int, scale: int
) -> Image.Image:
    """One picture of the animation: the models side by side, how far it is, and what the colours mean."""
    width, height = (scale * length for length in next(iter(frames.values()))[0].size)
    margin, font, small = 12, font_of(15), font_of(12)
    canvas = Image.new("RGB", (max(360, len(frames) * (width + margin) + margin), height + 112), _GROUND)
    draw = ImageDraw.Draw(canvas)
    for place, (name, pictures) in enumerate(frames.items()):
        left = margin + place * (width + margin)
        canvas.paste(pictures[step - 1].resize((width, height), Image.Resampling.NEAREST), (left, 46))
        told = f"step {step} of {trained[name]} trained for"
        if step > trained[name]:
            told = f"step {step}, beyond the {trained[name]} trained for"
        draw.text((left, 6), _shortened(name, font, width), _INK, font)
        draw.text((left, 26), told, _INK if step > trained[name] else (180, 180, 188), small)
    top, right = height + 62, canvas.width - margin
    draw.rectangle((margin, top, right, top + 6), _FAINT)
    reached = margin + round((right - margin) * step / last)
    draw.rectangle((margin, top, reached, top + 6), _INK)
    for n in sorted(set(trained.values())):
        at = margin + round((right - margin) * n / last)
        draw.rectangle((at - 1, top - 4, at + 1, top + 10), tuple(_TRACED.tolist()))
        draw.text((at, top + 12), f"N = {n}", _INK, small, "ma")
    left = margin
    for colour, text in ((_TRACED, "traced"), (_MISSED, "not reached"), (_WRONG, "not on the contour")):
        draw.rectangle((left, top + 33, left + 10, top + 43), tuple(colour.tolist()))
        draw.text((left + 15, top + 38), text, _INK, small, "lm")
        left += 15 + round(small.getlength(text)) + 18
    return canvas


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    while font.getlength(text) > width and len(text) > 2:
        text = text[:-2] + "…"
    return text


_SCRUBBER = """<figure id="scrubber" class="scrubber">
<div class="views">
{views}
</div>
<div class="controls" hidden>
<button type="button">Play</button>
<label><span class="hint">Step</span>
<input type="range" min="1" max="{last}" value="{start}" step="1">
<span class="marks" style="height: {rows}.4em">{marks}</span></label>
<output></output>
</div>
<figcaption>{colours} Drag, or use the arrow keys; Home and End go to the first and the last step.</figcaption>
<details><summary>The same as an animation (GIF)</summary><img alt="The contours being traced step by step"
 src="data:image/gif;base64,{gif}"></details>
<script>
(() => {{
  const frames = {frames}, trained = {trained};
  const figure = document.getElementById("scrubber"), pictures = figure.querySelectorAll(".views img");
  const range = figure.querySelector("input"), told = figure.querySelector("output");
  const button = figure.querySelector("button");
  const slowly = matchMedia("(prefers-reduced-motion: reduce)");
  let timer = 0;
  const show = () => {{
    const step = Number(range.value);
    pictures.forEach((picture, i) => {{ picture.src = "data:image/png;base64," + frames[i][step - 1]; }});
    const where = step > Math.max(...trained) ? ", beyond the steps trained for"
      : step === trained[0] && trained.length === 1 ? " = N" : "";
    told.textContent = "step " + step + " of {last}" + where;
    range.setAttribute("aria-valuetext", told.textContent);
  }};
  const stop = () => {{ clearInterval(timer); timer = 0; button.textContent = "Play"; }};
  const play = () => {{
    if (Number(range.value) === {last}) range.value = 1;
    button.textContent = "Pause";
    timer = setInterval(() => {{
      range.value = Number(range.value) + 1;
      show();
      if (Number(range.value) === {last}) stop();
    }}, slowly.matches ? 1000 : 160);
    show();
  }};
  range.addEventListener("input", () => {{ stop(); show(); }});
  button.addEventListener("click", () => timer ? stop() : play());
  figure.querySelector(".controls").hidden = false;
  show();
}})();
</script>
</figure>"""
