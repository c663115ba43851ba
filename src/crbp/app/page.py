"""The page: what is on it, and what happens when something is pressed."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import gradio as gr

from crbp.app.compare import follow_one, radii, radii_steps, shown
from crbp.app.images import FIRST, FRAMES, SIZES, Picture, drawn, made, uploaded
from crbp.app.models import Models
from crbp.errors import CrbpError

if TYPE_CHECKING:
    from crbp.app.panoptic import Panoptic

P = ParamSpec("P")
T = TypeVar("T")

STATIC = Path(__file__).parent / "static"
_FONT = ["system-ui", "sans-serif"]  # nothing is fetched from elsewhere
THEME = gr.themes.Default(primary_hue="indigo", font=_FONT, font_mono=["ui-monospace", "monospace"])
PICTURES = [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"]

_HEADING = """# Watch a recurrent model trace a contour
One contour is marked by a disc. A model has to light up that contour and no other. **C-RBP** trains it to come to rest:
the tracing stays right beyond the **N** steps it was trained for. Trained with **BPTT** it moves on."""
_MISSING = """### Panoptic segmentation is not installed
```sh
pip install 'crbp[panoptic]'
```

This tab then shows what a model sees in an image after each step of its recurrent mask head."""
_WAITING = '<p class="waiting">The first image is being traced …</p>'
_CHOOSE = '<p class="waiting">Choose an image, or segment one of validation.</p>'
_NUMBERS = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """What is on the page: its number, the picture, the models and how far they were run."""

    number: int
    picture: Picture
    names: tuple[str, str]
    steps: int


def page(models: Models, panoptic: Panoptic | None) -> gr.Blocks:
    """The whole page."""
    blocks: gr.Blocks
    with gr.Blocks(title="crbp: watch a model trace", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(_HEADING, elem_id="heading")
        with gr.Tab("Contours"):
            _contours(blocks, models)
        with gr.Tab("Panoptic segmentation"):
            if panoptic is None:
                gr.Markdown(_MISSING, elem_id="missing")
            else:
                _panoptic(panoptic)
    return blocks


def _contours(blocks: gr.Blocks, models: Models) -> None:
    state = gr.State(None)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            with gr.Tabs():
                with gr.Tab("Make"):
                    settings = _settings()
                    make = gr.Button("Trace it", variant="primary", elem_id="make")
                    other = gr.Button("Another image", elem_id="another")
                with gr.Tab("Draw"):
                    gr.HTML("<crbp-pad></crbp-pad>", elem_id="pad", apply_default_css=False)
                    drawing = gr.Textbox(visible=False)
                    frame = gr.Dropdown(list(FRAMES), value=next(iter(FRAMES)), label="Picture")
                    draw = gr.Button("Trace it", variant="primary", elem_id="draw")
                with gr.Tab("Upload"):
                    gr.Markdown("Bright strokes on a dark ground, a disc at one end of the contour to trace.")
                    file = gr.File(label="Image", file_types=PICTURES, type="filepath", height=140, elem_id="file")
                    size = gr.Slider(*SIZES, value=48, step=1, label="Longer side, in pixels, as the models see it")
                    upload = gr.Button("Trace it", variant="primary", elem_id="upload")
            with gr.Accordion("Models", open=False):
                pair = [
                    gr.Dropdown(list(models.files), value=name, label=label)
                    for name, label in zip(models.pair, ("Left", "Right"), strict=True)
                ]
        with gr.Column(scale=5, min_width=320):
            player = gr.HTML(_WAITING, elem_id="player", apply_default_css=False)
            late = gr.HTML("", elem_id="late")
    compare = _Comparison(models)
    wire = _Wiring(pair=pair, player=player, radii=late, state=state, find=compare.radii)

    def starting(picture: Callable[..., Picture]) -> Callable[..., tuple[str, _Shown]]:
        @_told
        def start(*values: Any, progress: gr.Progress = gr.Progress()) -> tuple[str, _Shown]:  # noqa: B008
            *given, left, right = values
            return compare(picture(*given), left, right, progress)

        return start

    from_settings = starting(lambda *given: made(**dict(zip(FIRST, given, strict=True))))
    next_seed = other.click(lambda seed: int(seed or 0) + 1, settings[-1], settings[-1], show_progress="hidden")
    wire(blocks.load, from_settings, settings)
    wire(make.click, from_settings, settings)
    wire(next_seed.then, from_settings, settings)
    pad = "(strokes, ...rest) => [document.querySelector('crbp-pad').json, ...rest]"
    wire(draw.click, starting(lambda strokes, frame: drawn(strokes, frame=frame)), [drawing, frame], js=pad)
    wire(upload.click, starting(lambda file, size: uploaded(file, size=size)), [file, size])
    pressed = [make.click, other.click, draw.click, upload.click]
    gr.on(pressed, None, cancels=wire.late)  # the power iterations of the comparison before


def _settings() -> list[Any]:
    """What `made` is given, in the order of `FIRST`."""
    return [
        gr.Dropdown(list(FRAMES), value=FIRST["frame"], label="Picture"),
        gr.Slider(2, 25, value=FIRST["length"], step=1, label="Contour length, in dashes", elem_id="length"),
        gr.Slider(0, 20, value=FIRST["distractors"], step=1, label="Distractors", elem_id="distractors"),
        gr.Slider(1, 8, value=FIRST["distractor_length"], step=1, label="Dashes of a distractor"),
        gr.Slider(1, 8, value=FIRST["straightness"], step=0.1, label="Straightness"),
        gr.Number(FIRST["seed"], minimum=0, maximum=2**53 - 1, precision=0, label="Seed", elem_id="seed"),
    ]


class _Wiring:
    """Every way to start a comparison does the same: it follows the models, then finds the radii."""

    def __init__(self, *, pair: list[Any], player: gr.HTML, radii: gr.HTML, state: gr.State, find: Any) -> None:
        self.pair, self.player, self.radii, self.state, self.find = pair, player, radii, state, find
        self.late: list[Any] = []

    def __call__(self, event: Callable[..., Any], run: Any, inputs: list[Any], *, js: str | None = None) -> None:
        started = event(
            run,
            [*inputs, *self.pair],
            [self.player, self.state],
            js=js,
            show_progress_on=self.player,
            concurrency_id="models",
            concurrency_limit=1,
            api_visibility="private",
        )
        self.late.append(
            started.success(
                self.find,
                self.state,
                self.radii,
                show_progress="hidden",
                concurrency_id="radii",
                concurrency_limit=1,
                api_visibility="private",
            )
        )


class _Comparison:
    """Two models on one image."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def __call__(self, picture: Picture, a: str, b: str, progress: gr.Progress) -> tuple[str, _Shown]:
        """The player of both models up to four times the larger number of steps that they were trained for."""
        names = (a, b)
        models = [self.models.get(name) for name in names]
        steps = 4 * max(model.net.evolve.steps for model in models)
        found = []
        for place, model in enumerate(models):
            progress((place + 1, 3), desc=f"{model.name}, {steps} steps")
            found.append(follow_one(model, picture, steps=steps))
        number = next(_NUMBERS)
        text = _element("crbp-player", shown(picture, found, number=number))
        return text, _Shown(number=number, picture=picture, names=names, steps=steps)

    def radii(self, of: _Shown | None) -> Iterator[str]:
        """The spectral radii of both models, each as soon as it is known."""
        if of is None:
            return
        found: list[list[tuple[int, float, bool]]] = [[], []]
        runs = []
        for points, name in zip(found, of.names, strict=True):
            net = self.models.get(name).net
            wanted = radii_steps(net.evolve.steps, of.steps)
            runs.append((points, radii(net, of.picture.image, steps=wanted)))
        for one in itertools.zip_longest(*(_into(points, run) for points, run in runs)):
            del one
            yield _element("crbp-radii", {"number": of.number, "found": found, "done": False})
        yield _element("crbp-radii", {"number": of.number, "found": found, "done": True})


def _into(points: list[tuple[int, float, bool]], run: Iterator[tuple[int, float, bool]]) -> Iterator[None]:
    for point in run:
        points.append(point)
        yield


def _panoptic(panoptic: Panoptic) -> None:
    from crbp.app.panoptic import frames, picture_of

    trained = panoptic.net.steps
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            file = gr.File(label="Image", file_types=PICTURES, type="filepath", height=140, elem_id="panoptic-file")
            index = gr.Number(0, minimum=0, precision=0, label="Without a file: validation image number")
            last = gr.Slider(1, 4 * trained, value=2 * trained, step=1, label=f"Last step (trained for N = {trained})")
            start = gr.Button("Segment it", variant="primary", elem_id="segment")
            gr.Markdown(_known([entry.name for entry in panoptic.categories.entries]), elem_id="known")
        with gr.Column(scale=5, min_width=320):
            player = gr.HTML(_CHOOSE, elem_id="frames", apply_default_css=False)

    @_told
    def segment(file: str | None, index: int, last: int, progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
        wanted, done = int(last), []
        picture = picture_of(panoptic, file, index=int(index))
        for frame in frames(panoptic, picture, steps=wanted):
            done.append(frame)
            progress((len(done), wanted), desc=f"step {len(done)} of {wanted}")
        return _element("crbp-frames", {"trained": trained, "frames": done})

    start.click(segment, [file, index, last], player, concurrency_limit=1, api_visibility="private")


def _known(names: Sequence[str], most: int = 20) -> str:
    """What the network was trained to tell: of anything else it makes one of these."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"It knows {html.escape(', '.join(names[:most]))}{more}, and nothing else."


def _element(tag: str, data: Any) -> str:
    return f'<{tag} data-show="{html.escape(json.dumps(data, allow_nan=False))}"></{tag}>'


def _told(run: Callable[P, T]) -> Callable[P, T]:
    """A mistake of the user's becomes a message on the page."""

    @wraps(run)
    def telling(*values: P.args, **named: P.kwargs) -> T:
        try:
            return run(*values, **named)
        except CrbpError as error:
            raise gr.Error(html.escape(str(error)), duration=20, title="Not run", print_exception=False) from None

    return telling
