"""What the live demo measures and shows, without a browser."""

from __future__ import annotations

import base64
import html
import io
import json
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import crbp
from crbp.analysis import evidential_uncertainty, follow, reaction_time
from crbp.app import images
from crbp.app.compare import Model, follow_one, load_recurrent, radii, radii_steps, shown
from crbp.app.images import FIRST, FRAMES, ImageError, drawn, made, uploaded
from crbp.app.models import DEFAULTS, Models
from crbp.cli import main
from crbp.errors import CrbpError
from crbp.hub import shipped
from crbp.losses import expected_probability
from crbp.models import FeedForwardNet, PathfinderNet
from crbp.tasks import Origin, save_net

FRAME = next(iter(FRAMES))
SETTINGS = {"frame": FRAME, "length": 5, "distractors": 3, "distractor_length": 2, "straightness": 2.2, "seed": 3}
LINE = [[0.2, 0.3], [0.5, 0.35], [0.8, 0.3]]


def net(steps: int = 3) -> PathfinderNet:
    torch.manual_seed(0)
    cell = crbp.cells.HGRU(4, 3, norm_scale=1.0)
    return PathfinderNet(cell, crbp.Evolve(steps=steps), target_share=0.4).eval().requires_grad_(False)


def pixels(source: str) -> np.ndarray[Any, Any]:
    kind, _, content = source.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_a_made_image_is_the_one_of_its_seed_and_settings() -> None:
    first, same, other = made(**SETTINGS), made(**SETTINGS), made(**{**SETTINGS, "seed": 4})
    assert torch.equal(first.image, same.image)
    assert not torch.equal(first.image, other.image)
    assert first.image.shape == (1, 1, 48, 48)
    assert first.mask is not None
    assert first.mask.shape == (1, 48, 48)
    lit = first.image[0, 0] > 0.2
    assert lit[first.mask[0]].float().mean() > 0.9
    assert lit.sum() > first.mask.sum()  # of the distractors


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("frame", "40 × 40", "'40 × 40' is unknown; choose one of"),
        ("length", 1, "contour_length=1 is outside .* dashes of a long contour"),
        ("length", 2.5, "contour length=2.5 is no whole number"),
        ("distractors", 60, "60 distractors of 2 do not fit .* choose fewer or shorter ones"),
        ("straightness", 0.1, "continuity=0.1 is outside"),
        ("seed", -1, "choose another seed"),
        ("seed", None, "seed=None is no whole number"),
    ],
)
def test_settings_that_make_no_image_are_told_with_the_remedy(setting: str, value: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        made(**{**SETTINGS, setting: value})


def test_the_two_models_part_on_the_first_image() -> None:
    """As docs/app.md tells."""
    f1 = {name: follow_one(load_recurrent(shipped()[name]), made(**FIRST), steps=48).f1 for name in DEFAULTS}
    ends = {name: [round(float(each[step - 1]), 2) for step in (12, 48)] for name, each in f1.items()}
    assert ends["small9_hgru_crbp"] == [0.99, 1]
    assert float(f1["small9_hgru_bptt"][5]) == 1
    assert ends["small9_hgru_bptt"][1] < 0.7


def test_dashes_lie_on_their_line_as_long_and_as_far_apart_as_asked() -> None:
    corner = np.array([[0.0, 0.0], [0.0, 10.0], [20.0, 10.0]])
    found = images.dashes(corner, length=2.0, gap=1.0)
    assert len(found) == 10
    assert found[0] == (0.0, 0.0, 0.0, 2.0)
    assert found[4] == pytest.approx((2.0, 10.0, 4.0, 10.0))
    straight = [dash for dash in found if dash[1] == dash[3] == 10]
    assert all(dash[2] - dash[0] == pytest.approx(2.0) for dash in straight)
    assert all(b[0] - a[2] == pytest.approx(1.0) for a, b in pairwise(straight))


def test_a_drawing_is_dashes_with_a_disc_where_the_first_stroke_starts() -> None:
    alone, both = (drawn(json.dumps(strokes), frame=FRAME) for strokes in ([LINE], [LINE, [[0.1, 0.8], [0.9, 0.8]]]))
    row, column = round(0.3 * 48), round(0.2 * 48)
    assert bool((alone.image[0, 0, row - 1 : row + 1, column - 1 : column + 1] == 1).all())
    assert torch.equal(alone.mask, both.mask)  # further strokes are distractors
    assert alone.mask is not None
    assert not bool(alone.mask[0, 24:].any())
    assert float(both.image[0, 0, 36:].sum()) > 20
    along = alone.image[0, 0, 12:20].amax(dim=0)[16:38]
    assert float(along.min()) < 0.5 < float(along.max())  # gaps between dashes


def test_a_drawn_contour_is_traced_by_a_shipped_model() -> None:
    model = load_recurrent(shipped()[DEFAULTS[0]])
    picture = drawn(json.dumps([LINE, [[0.1, 0.8], [0.5, 0.75]]]), frame=FRAME)
    found = follow_one(model, picture, steps=model.net.evolve.steps)
    assert found.f1 is not None
    assert float(found.f1[-1]) > 0.8


@pytest.mark.parametrize(
    ("strokes", "message"),
    [
        (None, "the drawing is empty: draw a line"),
        ("[]", "the drawing is empty"),
        ("[[[0.5, 0.5]]]", "the drawing is empty"),  # a touch
        ("[[0.5]]", "no list of strokes"),
        ("{", "no list of strokes"),
        ('[[["a", 1], [2, 3]]]', "no list of strokes"),
        ("[[[NaN, 1], [0, 0]]]", "points that are no numbers"),
        (json.dumps([LINE] * 65), "more than 64 strokes"),
    ],
)
def test_no_drawing_is_told_with_the_remedy(strokes: str | None, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        drawn(strokes, frame=FRAME)


def test_an_upload_is_brought_to_size_and_to_bright_strokes(tmp_path: Path) -> None:
    strokes = np.zeros((90, 120), np.uint8)
    strokes[40:50, 20:100] = 255
    dark, bright = tmp_path / "dark.png", tmp_path / "bright.jpg"
    Image.fromarray(strokes).save(dark)
    Image.fromarray(255 - strokes).convert("RGB").save(bright, quality=95)
    first, second = (uploaded(file, size=60) for file in (dark, bright))
    assert first.image.shape == (1, 1, 45, 60)
    assert first.mask is None
    torch.testing.assert_close(first.image, second.image, atol=0.05, rtol=0)
    assert "inverted" in second.told
    assert "inverted" not in first.told


def test_a_large_photograph_is_read_at_a_fraction_of_its_size(tmp_path: Path) -> None:
    file = tmp_path / "large.jpg"
    whole = Image.new("RGB", (4000, 3000))
    whole.paste((255, 255, 255), (1000, 1000, 2000, 1200))
    whole.save(file)
    assert uploaded(file, size=160).image.shape == (1, 1, 120, 160)


def strokes(kind: str) -> Image.Image:
    """One stroke: in 16 bits, in numbers, or opaque on nothing."""
    drawn = np.zeros((64, 64))
    drawn[30:34, 8:56] = 1
    if kind == "16 bits":
        return Image.fromarray((2_000 + 18_000 * drawn).astype(np.uint16))
    if kind == "numbers":
        return Image.fromarray(drawn.astype(np.float32) / 255)
    shade = np.full((64, 64, 3), 255 if kind == "white on nothing" else 0)
    return Image.fromarray(np.dstack([shade, 255 * drawn]).astype(np.uint8), "RGBA")


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["16 bits", "numbers", "black on nothing", "white on nothing"])
def test_an_upload_of_any_depth_shows_its_stroke(kind: str, tmp_path: Path) -> None:
    strokes(kind).save(file := tmp_path / "a.tiff")
    image = uploaded(file, size=64).image[0, 0]
    assert (image[31, 20], image[5, 5]) == (1, 0)


def test_an_upload_of_one_grey_is_refused(tmp_path: Path) -> None:
    Image.new("L", (50, 50), 30).save(file := tmp_path / "a.png")
    with pytest.raises(ImageError, match="one grey"):
        uploaded(file, size=48)


def test_what_is_no_upload_is_told_by_its_name_with_the_remedy(tmp_path: Path) -> None:
    broken, narrow, whole = (tmp_path / name for name in ("broken.png", "narrow.png", "whole.png"))
    Image.new("L", (300, 4)).save(narrow)
    Image.new("L", (64, 64)).save(whole)
    broken.write_bytes(whole.read_bytes()[:60])
    for file, size, message in (
        (None, 48, "there is no file yet: choose one"),
        (broken, 48, "^broken.png: the image cannot be read; choose a PNG"),
        (tmp_path / "absent.png", 48, "^absent.png: the image cannot be read"),
        (narrow, 48, "narrow.png is 300 × 4 pixels, too narrow"),
        (whole, "48", "size='48' is not a whole number"),
        (whole, 1000, "size=1000 is not a whole number of 32 to 160"),
    ):
        with pytest.raises(ImageError, match=message):
            uploaded(file, size=size)


def test_following_one_image_agrees_with_the_analysis_and_the_formula() -> None:
    model, picture = net(), made(**SETTINGS)
    assert picture.mask is not None
    found = follow_one(Model(name="a", net=model, evidential=False), picture, steps=5)
    wanted = follow(model, picture.image, picture.mask, steps=5, shown=1)
    torch.testing.assert_close(found.probability, wanted.probability[:, 0])
    torch.testing.assert_close(found.residual, wanted.residual)
    torch.testing.assert_close(found.f1, wanted.f1)
    with torch.no_grad():
        logits = model(picture.image, steps=5).logits
    torch.testing.assert_close(found.uncertainty[-1], evidential_uncertainty(logits)[0])
    torch.testing.assert_close(found.reaction_time, reaction_time(found.uncertainty))


def test_radii_are_those_of_runs_of_so_many_steps() -> None:
    model, picture = net(), made(**SETTINGS)
    for step, radius, converged in radii(model, picture.image, steps=[4, 1]):
        with torch.no_grad():
            run = model(picture.image, steps=step).run
        wanted = crbp.spectral_radius(run, iterations=40, generator=torch.Generator().manual_seed(0))
        assert radius == pytest.approx(float(wanted.radius), rel=1e-4)
        assert converged == bool(wanted.converged)
    assert [found[0] for found in radii(model, picture.image, steps=[4, 1])] == [4, 1]


def test_states_that_are_not_finite_have_no_radius_and_leave_gaps() -> None:
    model, picture = net(), made(**SETTINGS)
    with torch.no_grad():
        model.filters.bias.fill_(float("nan"))
    assert list(radii(model, picture.image, steps=[1, 2])) == []
    told = shown(picture, [follow_one(Model(name="a", net=model, evidential=True), picture, steps=3)], number=1)
    json.dumps(told, allow_nan=False)
    assert told["models"][0]["residual"] == [None] * 3


def test_radii_are_looked_for_at_n_first_and_never_beyond_the_end() -> None:
    assert radii_steps(12, 48) == [12, 1, 48, 6, 24, 36, 3]
    assert radii_steps(1, 4) == [1, 4, 2, 3]


def test_the_page_is_given_every_frame() -> None:
    picture = made(**SETTINGS)
    models = [Model(name=f"<{steps}>", net=net(steps), evidential=steps == 3) for steps in (2, 3)]
    found = [follow_one(model, picture, steps=8) for model in models]
    told = shown(picture, found, number=7)
    assert (told["number"], told["steps"], told["width"], told["height"]) == (7, 8, 48, 48)
    assert [model["trained"] for model in told["models"]] == [2, 3]
    assert [model["evidential"] for model in told["models"]] == [False, True]
    strip = pixels(told["models"][1]["probability"])
    assert strip.shape == (8 * 48, 48)
    wanted = (found[1].probability[4] * 255).round().numpy()
    np.testing.assert_array_equal(strip[4 * 48 : 5 * 48], wanted)
    both = torch.stack([each.uncertainty for each in found])
    assert told["uncertaintyRange"] == pytest.approx([float(both.min()), float(both.max())])
    np.testing.assert_array_equal(pixels(told["target"]) > 0, picture.mask[0].numpy())  # type: ignore[index]
    assert all(len(model[key]) == 8 for model in told["models"] for key in ("residual", "f1", "meanUncertainty"))


def test_a_model_of_ones_own_is_read_at_once_and_comes_first(tmp_path: Path) -> None:
    file = tmp_path / "weights" / "best.safetensors"
    file.parent.mkdir()
    file.write_bytes(shipped()[DEFAULTS[0]].read_bytes())
    models = Models.with_files([("mine", file), ("", file)])
    assert models.pair == ("mine", f"{DEFAULTS[0]} (2)")  # the weights say which run trained them
    assert models.get("mine").net.evolve.steps == models.get(DEFAULTS[0]).net.evolve.steps
    assert models.get("mine") is models.get("mine")
    assert models.get("mine").name == "mine"
    assert Models.with_files([]).pair == DEFAULTS
    with pytest.raises(CrbpError, match="'absent' is no model here; choose one of"):
        models.get("absent")


@pytest.mark.parametrize("loss", ["focal", "evidential", None])
def test_what_the_uncertainty_means_is_read_from_the_run(loss: str | None, tmp_path: Path) -> None:
    settings = {} if loss is None else {"loss": loss}
    described = {"class_path": "crbp.models.PathfinderNet", "init_args": {
        "cell": {"class_path": "crbp.cells.HGRU", "init_args": {"channels": 4, "kernel_size": 3, "norm_scale": 1.0}},
        "evolve": {"steps": 3}, "target_share": 0.4}}  # fmt: skip
    run = {"model": {"class_path": "crbp.tasks.ContourTask", "init_args": settings}}
    save_net(net().state_dict(), tmp_path / "a.safetensors", Origin(net=described, run=run, name="mine"))
    model = load_recurrent(tmp_path / "a.safetensors")
    assert model.evidential == (loss == "evidential")
    picture = made(**SETTINGS)
    with torch.no_grad():
        logits = model.net(picture.image, steps=2).logits
    wanted = expected_probability(logits) if model.evidential else logits.softmax(dim=1)
    torch.testing.assert_close(follow_one(model, picture, steps=2).probability[-1:], wanted[:, 1])


def test_the_shipped_evidential_model_is_known_as_one() -> None:
    assert load_recurrent(shipped()["small9_hgru_crbp_evidential"]).evidential
    assert not load_recurrent(shipped()[DEFAULTS[0]]).evidential


def test_a_model_without_steps_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "forward.safetensors"
    described = {"class_path": "crbp.models.FeedForwardNet", "init_args": {"channels": 4, "kernel_size": 3}}
    save_net(FeedForwardNet(channels=4, kernel_size=3).state_dict(), file, Origin(net=described))
    with pytest.raises(CrbpError, match="FeedForwardNet; give a recurrent model that traces contours"):
        Models.with_files([("", file)])


def panoptic_weights(folder: Path, source: dict[str, Any] | None = None) -> Path:
    """A checkpoint of the smallest shipped configuration, untrained; as from a run on another source."""
    from crbp.models import PanopticFPN
    from crbp.tasks.weights import build

    text = Path(__file__).parents[1].joinpath("configs/panoptic/mini_rfpn_crbp10.yaml").read_text(encoding="utf-8")
    run = yaml.safe_load(text)
    run["data"]["init_args"]["source"] = source or run["data"]["init_args"]["source"]
    described = run["model"]["init_args"]["net"]
    described["init_args"]["evolve"]["steps"] = 2
    torch.manual_seed(0)
    made_net = build(PanopticFPN, described, "the test's network")
    save_net(made_net.state_dict(), folder / "rfpn.safetensors", Origin(net=described, run=run))
    return folder / "rfpn.safetensors"


def test_a_panoptic_checkpoint_shows_an_image_after_each_step(tmp_path: Path) -> None:
    from crbp.app.panoptic import frames, load_panoptic, picture_of

    found = load_panoptic(panoptic_weights(tmp_path))
    image = picture_of(found, None, index=0)
    assert image.size == (192, 192)
    got = list(frames(found, image, steps=3))
    assert [frame["t"] for frame in got] == [1, 2, 3]
    assert found.net.steps == 2  # as it was
    for frame in got:
        content = base64.b64decode(frame["source"].removeprefix("data:image/jpeg;base64,"))
        assert min(Image.open(io.BytesIO(content)).size) >= 480
    with pytest.raises(ImageError, match="image 100 of validation is outside 0 to 99"):
        picture_of(found, None, index=100)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"^broken\.png: the image cannot be read; choose a PNG"):
        picture_of(found, str(tmp_path / "broken.png"), index=0)


def test_a_checkpoint_trained_on_files_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their names are no classes, and what is in them is no configuration."""
    from crbp.app.panoptic import load_panoptic, picture_of
    from crbp.data.panoptic import write_shapes

    write_shapes(tmp_path / "mine", images=(1, 2), size=128, workers=1, progress=False)
    monkeypatch.chdir(tmp_path / "mine")
    files = {"images": "val", "panoptic": "panoptic_val.json", "instances": "instances_val.json"}
    assert all(Path(file).exists() for file in files.values())
    for name, settings in (("CocoSource", {"val": files}), ("Coco", {"root": ".", "train": "train", "val": "val"})):
        found = load_panoptic(panoptic_weights(tmp_path, {"class_path": f"crbp.tasks.{name}", "init_args": settings}))
        with Image.open(sorted(Path("val").iterdir())[1]) as wanted:
            np.testing.assert_array_equal(np.asarray(picture_of(found, None, index=1)), np.asarray(wanted))


def test_a_picture_of_ones_own_is_segmented_in_place_of_a_validation_image(tmp_path: Path) -> None:
    from crbp.app.panoptic import frames, load_panoptic, picture_of

    found = load_panoptic(panoptic_weights(tmp_path))
    halves = np.zeros((96, 144, 3), np.uint8)
    halves[:, 72:] = (250, 40, 10)
    Image.fromarray(halves).save(tmp_path / "mine.png")
    own = picture_of(found, str(tmp_path / "mine.png"), index=0)
    np.testing.assert_array_equal(np.asarray(own), halves)
    shown = [*frames(found, own, steps=2)][-1]
    other = [*frames(found, picture_of(found, None, index=0), steps=2)][-1]
    assert shown["source"] != other["source"]
    content = base64.b64decode(shown["source"].removeprefix("data:image/jpeg;base64,"))
    drawn = np.asarray(Image.open(io.BytesIO(content)))[:480]  # the rest is the legend
    # All but contours and names shows half of the picture, and of a segment at most half.
    laid_over = drawn - halves.repeat(5, axis=0).repeat(5, axis=1) / 2
    assert ((laid_over > -8) & (laid_over < 136)).all(axis=-1).mean() > 0.85


@pytest.mark.slow
def test_the_page_is_built_without_a_warning() -> None:
    pytest.importorskip("gradio_client", reason="the extra app is not installed")
    program = """
from crbp.app.models import Models
from crbp.app.page import _element, page
blocks = page(Models.with_files([]), None)
print(blocks.analytics_enabled, blocks.get_config_file())
print(_element("crbp-player", {"name": '"><b>&'}))
"""
    # In a process of its own: Gradio leaves an event loop open at the end.
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False ")
    for wanted in ("crbp-pad", "pip install 'crbp[panoptic]'", *DEFAULTS):
        assert wanted in done.stdout
    assert html.escape(json.dumps({"name": '"><b>&'})) in done.stdout


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["app", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("crbp.cli.find_spec", lambda name: None if name == "gradio" else sys)
    assert "needs gradio, not installed here; run: pip install 'crbp[app]'" in complaint(capsys)


def test_mistakes_of_the_command_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("crbp.cli.find_spec", lambda name: sys)  # all of it is told before Gradio is imported
    assert "--port must lie in 1 … 65535, not 0" in complaint(capsys, "--port", "0")
    assert "absent.ckpt does not exist" in complaint(capsys, "--checkpoint", "absent.ckpt")
    assert "absent.ckpt does not exist" in complaint(capsys, "--panoptic", "absent.ckpt")
    contour = str(shipped()[DEFAULTS[0]])
    assert "which has no steps to change; give an R-FPN" in complaint(capsys, "--panoptic", contour)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port} cannot be served at" in complaint(capsys, "--port", port)
