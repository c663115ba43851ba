"""The live demo, end to end, and the reports: the real server, a real browser, and what a user does with it.

With CRBP_SCREENSHOTS=FOLDER the pictures of the documentation are taken on the way. With CRBP_BROWSER=required what is
skipped for want of a browser fails.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from crbp.app.compare import follow_one, load_recurrent
from crbp.app.images import FIRST, made
from crbp.cli import main
from crbp.hub import shipped
from launched import free_port

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

REQUIRED = os.environ.get("CRBP_BROWSER") == "required"


def needed(module: str, reason: str) -> Any:
    return import_module(module) if REQUIRED else pytest.importorskip(module, reason=reason)


needed("gradio_client", "the extra app is not installed")
api = needed("playwright.sync_api", "playwright is not installed")
pytestmark = pytest.mark.slow

PATIENCE = 120_000  # milliseconds: a busy machine with two cores takes its time
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True}


def chromium(*, required: bool = REQUIRED) -> str:
    file = os.environ.get("CRBP_CHROMIUM") or shutil.which("chromium")
    if file is None:
        reason = "there is no browser; put chromium on the PATH, or its path into CRBP_CHROMIUM"
        (pytest.fail if required else pytest.skip)(reason)
    return file


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    file = chromium()
    as_root = hasattr(os, "geteuid") and os.geteuid() == 0
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=file, args=["--no-sandbox"] if as_root else [])
        yield started
        started.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "crbp.cli", "app", "--port", port]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith(f"Open http://127.0.0.1:{port}/"), line
        yield f"http://127.0.0.1:{port}/"
        server.terminate()


@pytest.fixture
def page(browser: Browser, address: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The page with its first image traced; what it asks of other hosts, and errors in it, fail the test."""
    faults: list[str] = []
    context = browser.new_context(**getattr(request, "param", DESKTOP), reduced_motion="reduce")
    opened = context.new_page()
    opened.set_default_timeout(PATIENCE)
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on(
        "request", lambda asked: None if asked.url.startswith((address, "data:", "blob:")) else faults.append(asked.url)
    )
    opened.goto(address)
    opened.wait_for_selector("crbp-player[data-ready]")
    yield opened
    context.close()
    assert not faults


def photograph(page: Page, name: str, **settings: Any) -> None:
    if folder := os.environ.get("CRBP_SCREENSHOTS"):
        page.wait_for_timeout(500)
        page.screenshot(path=Path(folder) / f"{name}.png", **settings)


def number(page: Page) -> int:
    return int(page.locator("crbp-player").get_attribute("data-run") or 0)


def traced(page: Page, before: int) -> None:
    """Wait for the next run to be shown."""
    page.wait_for_selector(f"crbp-player[data-ready]:not([data-run='{before}'])")


def pictures(page: Page, where: str = ".panels") -> list[str]:
    """What the canvases of a part of the player show."""
    found: list[str] = page.eval_on_selector_all(
        f"crbp-player {where} canvas", "all => all.map(each => each.toDataURL())"
    )
    return found


def brightness(page: Page, where: str) -> list[list[float]]:
    """Of each pixel of each canvas of a part of the player; viridis is the brighter, the larger its number."""
    read = """all => all.map(each => {
        const { data } = each.getContext("2d").getImageData(0, 0, each.width, each.height);
        const light = (at) => 0.3 * data[at] + 0.59 * data[at + 1] + 0.11 * data[at + 2];
        return Array.from({ length: data.length / 4 }, (_, i) => light(4 * i));
    })"""
    found: list[list[float]] = page.eval_on_selector_all(f"crbp-player {where} canvas", read)
    return found


def go(page: Page, t: int) -> None:
    page.eval_on_selector(
        "crbp-player input[type=range]", "(each, t) => { each.value = t; each.dispatchEvent(new Event('input')); }", t
    )


def message(page: Page) -> str:
    toast = page.locator(".toast-body").last
    toast.wait_for()
    return toast.inner_text()


def choose(page: Page, label: str, option: str) -> None:
    """An option of one of Gradio's drop-down lists."""
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()


def test_without_a_browser_the_tests_are_skipped_or_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CRBP_CHROMIUM", raising=False)
    with pytest.raises(pytest.skip.Exception, match="there is no browser"):
        chromium(required=False)
    with pytest.raises(pytest.fail.Exception, match="there is no browser"):
        chromium(required=True)


def test_make_scrub_and_compare(page: Page) -> None:
    player = page.locator("crbp-player")
    assert player.get_by_text("t = 1 of 48").is_visible()
    for text in ("small9_hgru_crbp", "small9_hgru_bptt", "N = 12", "N = 6"):
        assert player.get_by_text(text, exact=True).first.is_visible()
    image, left, right = pictures(page)
    slider = player.locator("input[type=range]")
    slider.focus()
    for _ in range(11):
        page.keyboard.press("ArrowRight")
    assert player.get_by_text("t = 12 of 48").is_visible()
    later = pictures(page)
    assert later[0] == image
    assert later[1] != left
    assert later[2] != right
    assert later[1] != later[2]
    page.keyboard.press("End")
    assert player.get_by_text("t = 48 of 48").is_visible()
    assert player.locator("figcaption").nth(1).inner_text().endswith("F1 1.000")
    go(page, 12)
    assert pictures(page) == later
    player.get_by_role("button", name="Uncertainty ε").press("Enter")
    assert pictures(page)[1] != later[1]
    player.get_by_role("button", name="Probability").press("Enter")
    assert pictures(page) == later


def until(page: Page, holds: str) -> None:
    """Wait until this holds of the step t that is shown; a single one may be gone before it is seen."""
    page.wait_for_function(f"() => (t => {holds})(Number(document.querySelector('crbp-player').dataset.t))")


def test_play_goes_on_by_itself_and_starts_again_at_the_end(page: Page) -> None:
    player = page.locator("crbp-player")
    player.get_by_role("button", name="Play").press("Space")
    until(page, "t >= 3")
    player.get_by_role("button", name="Pause").click()
    stopped = player.get_attribute("data-t")
    page.wait_for_timeout(400)
    assert player.get_attribute("data-t") == stopped
    go(page, 48)
    player.get_by_role("button", name="Play").click()
    until(page, "t >= 2 && t < 48")


def test_radii_come_in_and_a_click_on_a_chart_goes_to_its_step(page: Page) -> None:
    page.wait_for_selector("crbp-player .dot.model-0")
    page.wait_for_selector("crbp-player .dot.model-1")
    player = page.locator("crbp-player")
    chart = player.locator(".charts svg").first
    box = chart.bounding_box()
    assert box is not None
    chart.click(position={"x": box["width"] - 2, "y": box["height"] / 2})
    assert player.get_by_text("t = 48 of 48").is_visible()
    assert "not known to be trained with an evidential loss" in player.inner_text()
    if "CRBP_SCREENSHOTS" in os.environ:  # a busy machine takes minutes for all of them
        page.wait_for_function("document.querySelectorAll('crbp-player .dot').length >= 13")
    photograph(page, "app", full_page=True)


def test_another_image_takes_the_next_seed(page: Page) -> None:
    before, (image, *_) = number(page), pictures(page)
    page.locator("#another").click()
    traced(page, before)
    assert pictures(page)[0] != image
    assert page.locator("#seed input").input_value() == str(FIRST["seed"] + 1)


def test_an_evidential_model_shows_its_uncertainty_and_reaction_times(page: Page) -> None:
    player, names = page.locator("crbp-player"), ["small9_hgru_crbp_evidential", "small9_hgru_bptt"]
    before, maps = number(page), pictures(page, ".maps")
    page.get_by_role("button", name="Models").click()
    choose(page, "Left", names[0])
    page.locator("#make").click()
    traced(page, before)
    picture = made(**FIRST)
    wanted = [follow_one(load_recurrent(shipped()[name]), picture, steps=48) for name in names]
    assert player.locator(".maps figcaption strong").all_inner_texts() == names
    assert all(old != new for old, new in zip(maps, pictures(page, ".maps"), strict=True))  # they share their scale
    for seen, of in zip(brightness(page, ".maps"), wanted, strict=True):
        assert np.corrcoef(seen, of.reaction_time.flatten())[0, 1] > 0.97
    assert "small9_hgru_bptt: not known to be trained with an evidential loss" in player.locator(".maps").inner_text()
    player.get_by_role("button", name="Uncertainty ε").click()
    for t in (1, 48):
        go(page, t)
        for seen, of in zip(brightness(page, ".panels")[1:], wanted, strict=True):
            assert np.corrcoef(seen, of.uncertainty[t - 1].flatten())[0, 1] > 0.97


def test_settings_without_an_image_give_a_message(page: Page) -> None:
    page.locator("#distractors input[type=number]").fill("20")
    page.locator("#length input[type=number]").fill("25")
    page.locator("#make").click()
    told = message(page)
    assert f"do not fit into the picture of seed {FIRST['seed']}; choose fewer or shorter ones, or another seed" in told


def test_a_drawing_is_traced(page: Page) -> None:
    page.get_by_role("tab", name="Draw").click()
    page.locator("#draw").click()
    assert "the drawing is empty: draw a line" in message(page)
    before = number(page)
    canvas = page.locator("crbp-pad canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    for line in (
        [(0.15, 0.3), (0.3, 0.22), (0.5, 0.2), (0.7, 0.27), (0.82, 0.42)],
        [(0.2, 0.8), (0.5, 0.7), (0.6, 0.5)],
    ):
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in line]
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*point, steps=5)
        page.mouse.up()
    page.locator("#draw").click()
    traced(page, before)
    go(page, 48)
    shown = page.locator("crbp-player figcaption").nth(1).inner_text()
    assert float(re.findall(r"F1 ([\d.]+)", shown)[0]) > 0.8
    for close in page.locator(".toast-close").all():
        close.click()
    photograph(page, "app_draw")


def test_a_drawing_by_keys_alone(page: Page) -> None:
    page.get_by_role("tab", name="Draw").click()
    before = number(page)
    page.locator("crbp-pad canvas").focus()
    page.keyboard.press("Space")
    for _ in range(5):
        page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Space")
    (stroke,) = json.loads(page.eval_on_selector("crbp-pad", "pad => pad.json"))
    assert stroke[0] == [0.5, 0.5]
    assert stroke[-1] == pytest.approx([0.8, 0.5])
    page.locator("#draw").press("Enter")
    traced(page, before)


@pytest.mark.parametrize("page", [PHONE], indirect=True)
def test_a_finger_draws(page: Page) -> None:
    page.get_by_role("tab", name="Draw").click()
    before, (image, *_) = number(page), pictures(page)
    canvas = page.locator("crbp-pad canvas")
    canvas.scroll_into_view_if_needed()
    empty = canvas.evaluate("each => each.toDataURL()")
    at = page.evaluate("scrollY")
    # Downwards, which would scroll a page that did not keep the touch for drawing.
    wanted = [(0.2 + 0.05 * k, 0.15 + 0.06 * k) for k in range(12)]
    swipe(page, canvas, wanted)
    assert page.evaluate("scrollY") == at
    (stroke,) = json.loads(page.eval_on_selector("crbp-pad", "pad => pad.json"))
    assert stroke == [pytest.approx(point, abs=0.01) for point in wanted]
    assert canvas.evaluate("each => each.toDataURL()") != empty
    page.locator("#draw").tap()
    traced(page, before)
    assert pictures(page)[0] != image
    go(page, 48)
    shown = page.locator("crbp-player figcaption").nth(1).inner_text()
    assert float(re.findall(r"F1 ([\d.]+)", shown)[0]) > 0.8


def swipe(page: Page, where: Locator, points: list[tuple[float, float]]) -> None:
    """Draw one finger over an element, through points in shares of its size."""
    box = where.bounding_box()
    assert box is not None
    touch = page.context.new_cdp_session(page)
    for kind, (x, y) in zip(["touchStart", *["touchMove"] * (len(points) - 1)], points, strict=True):
        at = {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [at]})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    page.wait_for_timeout(600)  # as a hand needs; Chromium makes no click of a tap within .3 s of another touch


def test_a_bad_upload_gives_a_message_and_a_good_one_a_trace(page: Page, tmp_path: Path) -> None:
    from PIL import Image

    page.get_by_role("tab", name="Upload").click()
    page.locator("#upload").click()
    assert "there is no file yet: choose one" in message(page)
    (tmp_path / "broken.png").write_bytes(b"no picture at all")
    page.locator("#file input[type=file]").set_input_files(tmp_path / "broken.png")
    page.locator("#file").get_by_text("broken").first.wait_for()
    page.locator("#upload").click()
    page.get_by_text("broken.png: the image cannot be read; choose a PNG").wait_for()
    before = number(page)
    picture = made(**{**FIRST, "seed": 5})
    Image.fromarray((picture.image[0, 0] * 255).byte().numpy()).save(tmp_path / "good.png")
    page.get_by_label("Remove this file").or_(page.get_by_label("Clear")).first.click()
    page.locator("#file input[type=file]").set_input_files(tmp_path / "good.png")
    page.locator("#file").get_by_text("good").first.wait_for()
    page.locator("#upload").click()
    traced(page, before)
    assert page.get_by_text("good.png, shown to the models as 48 × 48 pixels.").is_visible()


@pytest.mark.parametrize("page", [PHONE], indirect=True)
def test_a_phone_has_no_horizontal_scroll(page: Page) -> None:
    for tab in ("Draw", "Upload", "Make", "Panoptic segmentation", "Contours"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(200)
        wide, inner = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= inner == PHONE["viewport"]["width"]
    before = number(page)
    page.locator("#another").click()
    traced(page, before)
    page.wait_for_function("Math.abs(document.querySelector('crbp-player').getBoundingClientRect().top) < 300")
    go(page, 10)
    photograph(page, "app_phone")


def test_the_panoptic_tab(page: Page) -> None:
    page.get_by_role("tab", name="Panoptic segmentation").click()
    assert page.get_by_text("It knows disc, square,").is_visible()
    page.locator("#segment").click()
    page.wait_for_selector("crbp-frames[data-ready]")
    bar, place = page.locator("crbp-frames input[type=range]"), page.locator("crbp-frames output")
    bar.press("Home")
    for step in range(1, 4):  # each of them
        assert place.inner_text() == f"t = {step} of 40"
        bar.press("ArrowRight")
    bar.press("End")
    assert place.inner_text() == "t = 40 of 40"
    assert page.locator("crbp-frames figcaption").inner_text().endswith("of stuff")
    photograph(page, "app_panoptic")


def test_the_panoptic_tab_segments_a_file_and_says_when_it_cannot_be_read(page: Page, tmp_path: Path) -> None:
    from PIL import Image

    page.get_by_role("tab", name="Panoptic segmentation").click()
    page.get_by_label("number input for Last step").fill("2")
    page.locator("#segment").click()
    page.wait_for_selector("crbp-frames[data-ready]")
    image = page.locator("crbp-frames img")
    validation = image.get_attribute("src")
    (tmp_path / "broken.png").write_bytes(b"no picture at all")
    page.locator("#panoptic-file input[type=file]").set_input_files(tmp_path / "broken.png")
    page.locator("#panoptic-file").get_by_text("broken").first.wait_for()
    page.locator("#segment").click()
    page.get_by_text("broken.png: the image cannot be read; choose a PNG").wait_for()
    assert image.get_attribute("src") == validation
    Image.new("RGB", (192, 96), (250, 40, 10)).save(tmp_path / "wide.png")
    page.locator("#panoptic-file").get_by_label("Remove this file").or_(page.get_by_label("Clear")).first.click()
    page.locator("#panoptic-file input[type=file]").set_input_files(tmp_path / "wide.png")
    page.locator("#panoptic-file").get_by_text("wide").first.wait_for()
    page.locator("#segment").click()
    page.wait_for_function("old => document.querySelector('crbp-frames img')?.src !== old", arg=validation)
    page.wait_for_function("document.querySelector('crbp-frames img').naturalWidth === 960")  # five times as large
    assert page.locator("crbp-frames output").inner_text() == "t = 1 of 2"


@pytest.mark.parametrize(
    ("command", "last", "views"),
    [
        (["analyze", "small5_hgru_crbp_long", "--steps", "10"], 10, 1),
        (["compare", "small5_hgru_crbp_long", "small5_hgru_bptt"], 32, 2),
    ],
)
def test_a_report_is_gone_through(command: list[str], last: int, views: int, browser: Browser, tmp_path: Path) -> None:
    assert main([*command, "--images", "2", "--out", str(tmp_path)]) == 0
    faults: list[str] = []
    context = browser.new_context()
    page = context.new_page()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda told: faults.append(told.text) if told.type in ("error", "warning") else None)
    page.on("requestfailed", lambda asked: faults.append(asked.url[:80]))
    page.goto((tmp_path / "report.html").as_uri())
    assert page.evaluate("[...document.images].every(each => each.complete && each.naturalWidth > 0)")
    slider, told, button = (page.locator(f"#scrubber {each}") for each in ("input", "output", "button"))
    assert told.inner_text() == (f"step 8 of {last}" if views == 2 else f"step 8 of {last} = N")
    shown = {}
    for key, step in (("Home", 1), ("ArrowRight", 2), ("End", last)):
        slider.press(key)
        assert told.inner_text() == f"step {step} of {last}" + (", beyond the steps trained for" if step > 8 else "")
        shown[step] = page.eval_on_selector_all("#scrubber .views img", "all => all.map(each => each.src)")
    for view in range(views):
        assert len({sources[view] for sources in shown.values()}) == 3
    assert len(set(shown[last])) == views
    button.click()  # at the end, it starts again
    assert button.inner_text() == "Pause"
    page.wait_for_function("document.querySelector('#scrubber output').textContent.startsWith('step 3 of')")
    assert page.eval_on_selector_all("#scrubber .views img", "all => all.map(each => each.src)") != shown[last]
    button.click()
    stopped = told.inner_text()
    page.wait_for_timeout(500)
    assert told.inner_text() == stopped
    context.close()
    assert not faults
