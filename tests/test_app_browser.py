"""The page in a real browser, on the model that comes with the package: generate, edit, inspect, read results.

SCQ_SCREENSHOTS=FOLDER keeps what it looked like.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright

from scq.data.stream import iterate_once
from scq.engine.config import CONFIG_ROOT
from scq.sampling.app import build_page, serve
from scq.sampling.images import enlarge, to_pictures
from scq.sampling.pipeline import EMBEDDED, SoftConvexPipeline

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Without these Chromium looks for its maker's hosts at every start.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
PATIENCE = 60_000  # milliseconds, on a busy machine

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; Debian's package chromium is enough")


@pytest.fixture(scope="module")
def pipeline() -> SoftConvexPipeline:
    return SoftConvexPipeline.from_pretrained(EMBEDDED)


@pytest.fixture(scope="module")
def address(pipeline: SoftConvexPipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    own = tmp_path_factory.mktemp("results") / "own"
    own.mkdir()
    (own / "report.md").write_text("# A run of my own\n")
    page = build_page(pipeline, results=[CONFIG_ROOT.parent / "docs" / "results", own])
    yield serve(page, "127.0.0.1", None, block=False)
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def page(browser: object, address: str) -> Iterator[Page]:
    opened = browser.new_page(viewport={"width": 1400, "height": 1000})
    opened.set_default_timeout(PATIENCE)
    opened.goto(address)
    yield opened
    opened.close()


def keep(page: Page, folder: Path, name: str) -> None:
    """A screenshot, checked to be of more than an empty page."""
    folder = Path(os.environ.get("SCQ_SCREENSHOTS", folder))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png")
    with Image.open(folder / f"{name}.png") as picture:
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 300


def tab(page: Page, name: str) -> Locator:
    page.get_by_role("tab", name=name).click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    expect(panel).to_be_visible(timeout=PATIENCE)
    return panel


def until(page: Page, condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE / 1000
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        page.wait_for_timeout(100)


def until_drawn(page: Page) -> None:
    drawing = [thread for thread in threading.enumerate() if thread.name == "scq drawing"]
    until(page, lambda: not any(thread.is_alive() for thread in drawing), "the end of the drawing")


def seen_pixels(page: Page, image: Locator) -> np.ndarray:
    """A picture of the page, (H, W, 3) uint8."""
    answer = page.request.get(image.get_attribute("src"))
    return np.asarray(Image.open(BytesIO(answer.body())).convert("RGB"))


def generate(page: Page) -> Locator:
    panel = tab(page, "Generate")
    panel.get_by_role("button", name="Generate").click()
    images = panel.locator(".thumbnail-item img")
    panel.get_by_test_id("download-link").wait_for()  # of the zip, the last thing that appears
    expect(images).to_have_count(16, timeout=PATIENCE)
    return images


def test_generate_draws_other_images_for_another_seed(page: Page, tmp_path: Path) -> None:
    images = generate(page)
    first = images.first.get_attribute("src")
    keep(page, tmp_path, "generate")
    page.get_by_role("tabpanel").filter(visible=True).get_by_label("Seed").fill("1000")
    generate(page)
    expect(images.first).not_to_have_attribute("src", first, timeout=PATIENCE)


@pytest.mark.parametrize("width", [400, 1280])
def test_pictures_and_tables_have_the_room_that_they_need(page: Page, width: int, tmp_path: Path) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    generate(page)
    box, seen, used = page.evaluate(
        """() => {
            const grid = document.querySelector(".drawn .grid-container")
            const box = grid.closest(".grid-wrap")
            return [box.scrollHeight, box.clientHeight, grid.offsetHeight]
        }"""
    )
    assert box == seen, "no picture needs scrolling inside the gallery"
    assert box - used < 40, "nothing is empty below the pictures"
    keep(page, tmp_path, f"generate_{width}")
    tab(page, "Benchmark").get_by_text("KID leads").first.wait_for()
    page.wait_for_timeout(500)
    words = page.locator(".report th", has_text="precision").first
    assert words.bounding_box()["height"] < 120, "its word is not broken into letters"
    assert page.evaluate("document.documentElement.scrollWidth") == width
    expect(page.get_by_role("button", name="Runs")).to_have_count(0)
    keep(page, tmp_path, f"benchmark_{width}")


@contextmanager
def watched(pipeline: SoftConvexPipeline, delay: float = 0.0) -> Iterator[list[int]]:
    """The list gets an entry for every look of the prior, which takes ``delay`` seconds longer."""
    looks: list[int] = []

    def slow(*_: object) -> None:
        looks.append(1)
        time.sleep(delay)

    hook = pipeline.prior.register_forward_pre_hook(slow)
    try:
        yield looks
    finally:
        hook.remove()


def cancel(page: Page, panel: Locator, looks: list[int]) -> None:
    """Click Cancel while images appear, and see that the drawing ends."""
    panel.locator(".thumbnail-item img").first.wait_for()
    panel.get_by_role("button", name="Cancel").click()
    until_drawn(page)
    drawn = len(looks)
    page.wait_for_timeout(1500)
    assert len(looks) == drawn, "no further step begins"


def test_cancel_stops_the_drawing(page: Page, pipeline: SoftConvexPipeline) -> None:
    panel = tab(page, "Generate")
    panel.get_by_label("number input for Images").fill("64")
    with watched(pipeline, delay=0.2) as looks:
        panel.get_by_role("button", name="Generate").click()
        cancel(page, panel, looks)
    assert len(looks) < 2 * pipeline.scheduler.steps * 64 // 16, "two chunks in each step of four batches"
    expect(panel.get_by_test_id("download-link")).to_have_count(0)
    panel.get_by_label("number input for Images").fill("16")
    generate(page)  # the line is free again


def test_cancel_stops_an_edit(page: Page, pipeline: SoftConvexPipeline) -> None:
    generate(page)
    panel = tab(page, "Edit")
    panel.get_by_role("button", name="Take it from Generate").click()
    panel.locator("canvas").first.wait_for()
    panel.get_by_label("Continue beyond the borders").check()
    with watched(pipeline, delay=0.2) as looks:
        panel.get_by_role("button", name="Redraw").click()
        cancel(page, panel, looks)
        cancelled = len(looks)
    with watched(pipeline) as looks:
        panel.get_by_role("button", name="Redraw").click()
        until(page, lambda: len(looks) > cancelled, "an edit that takes more steps than the one that was cancelled")
        until_drawn(page)


def test_a_generated_image_can_be_painted_and_redrawn(page: Page, tmp_path: Path) -> None:
    taken = seen_pixels(page, generate(page).first)
    panel = tab(page, "Edit")
    panel.get_by_role("button", name="Take it from Generate").click()
    canvas = panel.locator("canvas").first
    canvas.wait_for()
    page.wait_for_timeout(1500)  # the editor lays its image out
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.4 * box["height"])
    page.mouse.down()
    for share in (0.45, 0.5, 0.55, 0.6):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + 0.5 * box["height"], steps=4)
    page.mouse.up()
    panel.get_by_role("button", name="Redraw").click()
    answers = panel.locator(".thumbnail-item img")
    expect(answers).to_have_count(4, timeout=PATIENCE)

    def finished() -> bool:
        """Nothing is painted in the upper and the left quarter; before the last step these are only decoded."""
        redrawn = [seen_pixels(page, answer) for answer in answers.all()]
        same = [(each[:32] == taken[:32]).all() and (each[:, :32] == taken[:, :32]).all() for each in redrawn]
        return all(same) and len({each.tobytes() for each in redrawn}) == 4

    until_drawn(page)
    until(page, finished, "answers that keep what is not painted")
    keep(page, tmp_path, "edit")


def test_inspect_shows_what_a_patch_mixes(
    page: Page, pipeline: SoftConvexPipeline, emoji: dict[str, Path], tmp_path: Path
) -> None:
    images = next(iterate_once(emoji["test"], batch_size=64)).images
    varied = max(images, key=lambda image: len(pipeline.encode(image[None]).indices.unique()))
    enlarge(to_pictures(varied[None])[0], 256).save(tmp_path / "emoji.png")
    panel = tab(page, "Inspect")
    panel.locator("input[type=file]").first.set_input_files(tmp_path / "emoji.png")
    panel.locator("img").first.wait_for()
    panel.get_by_role("button", name="Reconstruct").click()
    panel.get_by_role("gridcell").first.wait_for()
    for label in ("What the model sees", "From z_q: error", "From dominant codes: error", "Dominant codes: click"):
        expect(panel.get_by_text(label)).to_be_visible()
    keep(page, tmp_path, "inspect")
    row = panel.get_by_label("number input for Row of the patch")
    expect(row).to_have_value("0")
    seen = panel.locator("img").nth(1)
    seen.click(position={"x": 100, "y": int(0.9 * seen.bounding_box()["height"])})
    expect(row).to_have_value("3", timeout=PATIENCE)
    mixed = panel.get_by_role("gridcell")
    for label, value in (("Row of the patch", "1"), ("Column of the patch", "3")):
        before = mixed.all_inner_texts()
        panel.get_by_label(f"number input for {label}").fill(value)
        panel.get_by_label(f"number input for {label}").press("Enter")
        until(page, lambda before=before: mixed.all_inner_texts() != before, f"another mixture for {label}")


def test_results_are_shown(page: Page, tmp_path: Path) -> None:
    panel = tab(page, "Benchmark")
    panel.get_by_text("KID leads").first.wait_for()
    keep(page, tmp_path, "benchmark")
    panel.get_by_label("Report").click()
    page.get_by_role("option", name="own").click()
    panel.get_by_text("A run of my own").wait_for()
    expect(panel.get_by_text("KID leads")).to_have_count(0)
