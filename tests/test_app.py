"""The page in a real browser, and its functions through the queue as a client calls them."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from PIL import Image

from sampling.app import build_page, serve
from sampling.pipeline import SoftConvexPipeline

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Without these Chromium looks for its maker's hosts at every start.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def pipeline(tiny_run: Path) -> SoftConvexPipeline:
    return SoftConvexPipeline.from_pretrained(tiny_run / "model")


@pytest.fixture(scope="module")
def address(pipeline: SoftConvexPipeline) -> Iterator[str]:
    page = build_page(pipeline)
    yield serve(page, "127.0.0.1", None, block=False)
    page.close()


def pixels(path: str) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def generate(client: Client, **changes: object) -> list[bytes]:
    settings = {"seed": 0, "count": 3, "steps": 4, "temperature": 1.0, "choice_temperature": 4.5, **changes}
    gallery = client.predict(*settings.values(), api_name="/generate")
    return [pixels(item["image"]) for item in gallery]


def test_every_control_does_what_it_says(address: str) -> None:
    client = Client(address, verbose=False)
    usual = generate(client)
    assert len(usual) == 3
    assert generate(client) == usual
    assert generate(client, seed=1)[:2] == usual[1:], "image i is drawn with seed + i"
    assert len(generate(client, count=20)) == 20
    for change in ({"steps": 1}, {"temperature": 0.2}, {"choice_temperature": 0.0}):
        assert generate(client, **change) != usual, change


def test_generated_images_are_the_pipelines(address: str, pipeline: SoftConvexPipeline) -> None:
    drawn = generate(Client(address, verbose=False), seed=7)
    wanted = pipeline(num_images=3, seed=7, steps=4, temperature=1.0, choice_temperature=4.5).images
    for shown, image in zip(drawn, wanted, strict=True):
        assert shown == image.resize((128, 128), Image.Resampling.NEAREST).tobytes()


def test_uploads_of_any_kind_are_reconstructed(address: str, tmp_path: Path) -> None:
    client = Client(address, verbose=False)
    for mode, size in (("RGBA", (50, 90)), ("L", (10, 10)), ("P", (200, 40))):
        path = tmp_path / f"{mode}.png"
        Image.linear_gradient("L").resize(size).convert(mode).save(path)
        shown = client.predict(handle_file(str(path)), api_name="/reconstruct")
        seen, soft, dominant = map(pixels, shown)
        assert len({seen, soft, dominant}) == 3, "the soft quantizer's z_q is not its dominant codes"


def test_transparent_pixels_are_seen_as_white(address: str, tmp_path: Path) -> None:
    Image.new("RGBA", (64, 64), (10, 200, 10, 0)).save(tmp_path / "clear.png")
    shown = Client(address, verbose=False).predict(handle_file(str(tmp_path / "clear.png")), api_name="/reconstruct")
    assert set(pixels(shown[0])) == {255}


def test_a_mistake_gets_a_message(address: str) -> None:
    client = Client(address, verbose=False)
    with pytest.raises(Exception, match="seed"):
        generate(client, seed=-1)
    with pytest.raises(Exception, match="image"):
        client.predict(None, api_name="/reconstruct")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; Debian's package chromium is enough")
def test_a_click_on_generate_shows_new_images(address: str, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(address)
        page.get_by_role("button", name="Generate").wait_for(timeout=60_000)
        images = page.locator(".grid-container img, .thumbnail-item img")
        assert images.count() == 0
        page.get_by_role("button", name="Generate").click()
        images.nth(15).wait_for(timeout=60_000)
        first = images.nth(0).get_attribute("src")
        page.get_by_label("Seed").fill("1000")
        page.get_by_role("button", name="Generate").click()
        page.wait_for_function(
            "old => document.querySelector('.grid-container img, .thumbnail-item img').src !== old", arg=first,
            timeout=60_000,
        )  # fmt: skip
        page.screenshot(path=tmp_path / "generate.png")
        browser.close()
    with Image.open(tmp_path / "generate.png") as screenshot:
        assert len(screenshot.convert("RGB").getcolors(maxcolors=2**24)) > 100
