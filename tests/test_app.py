"""The page's functions through the queue, as a client calls them; test_app_browser.py clicks."""

import json
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from gradio_client import Client, handle_file
from PIL import Image

from sampling.app import build_page, serve
from sampling.pipeline import SoftConvexPipeline
from sampling.studio.edit import INPAINT, OUTPAINT, VARY
from stage2_prior.transformer import MaskedTransformer

GENERATE = {"seed": 0, "count": 3, "steps": 4, "sampler": "maskgit", "temperature": 1.0, "choice": 4.5, "top_p": 1.0}
GENERATE["refine"] = True
EDIT = {"what": INPAINT, "strength": 0.5, "left": 0, "right": 0, "top": 0, "bottom": 0, "seed": 0, "count": 2}
EDIT |= {name: GENERATE[name] for name in ("steps", "sampler", "temperature", "choice", "top_p", "refine")}


@pytest.fixture(scope="module")
def pipeline(tiny_run: Path) -> SoftConvexPipeline:
    return SoftConvexPipeline.from_pretrained(tiny_run / "model")


@pytest.fixture(scope="module")
def address(pipeline: SoftConvexPipeline, tiny_run: Path) -> Iterator[str]:
    page = build_page(pipeline, max_batch=40, results=[tiny_run])
    yield serve(page, "127.0.0.1", None, block=False)
    page.close()


@pytest.fixture(scope="module")
def client(address: str) -> Client:
    return Client(address, verbose=False)


def pixels(path: str) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def generate(client: Client, **changes: object) -> list[bytes]:
    gallery, _ = client.predict(*{**GENERATE, **changes}.values(), api_name="/generate")
    return [pixels(item["image"]) for item in gallery]


def edit(client: Client, image: dict[str, Any] | None, **changes: object) -> list[bytes]:
    gallery = client.predict(image, *{**EDIT, **changes}.values(), api_name="/edit")
    return [pixels(item["image"]) for item in gallery]


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the editor sends: an image, and a layer with paint on its upper half."""
    folder = tmp_path_factory.mktemp("painted")
    Image.linear_gradient("L").resize((96, 96)).convert("RGB").save(folder / "image.png")
    layer = Image.new("RGBA", (96, 96))
    layer.paste((255, 0, 255, 255), (0, 0, 96, 40))
    layer.save(folder / "layer.png")
    return {
        "background": handle_file(str(folder / "image.png")),
        "layers": [handle_file(str(folder / "layer.png"))],
        "composite": None,
    }


def test_every_control_of_generate_does_what_it_says(client: Client) -> None:
    usual = generate(client)
    assert len(usual) == 3
    assert generate(client) == usual
    assert generate(client, seed=1)[:2] == usual[1:], "image i is drawn with seed + i"
    assert len(generate(client, count=20)) == 20
    changes = [{"steps": 1}, {"sampler": "halton"}, {"temperature": 0.2}, {"choice": 0.0}, {"top_p": 0.05}]
    for change in [*changes, {"refine": False}]:
        assert generate(client, **change) != usual, change


def test_class_and_guidance_of_a_conditional_prior_do_what_they_say(pipeline: SoftConvexPipeline) -> None:
    torch.manual_seed(0)
    config = pipeline.tokenizer.config
    prior = MaskedTransformer(config.codebook_size, pipeline.tokenizer.grid, 32, 1, 2, num_classes=3)
    for embedding in (prior.class_embedding, prior.token_embedding):
        torch.nn.init.normal_(embedding.weight)
    page = build_page(SoftConvexPipeline(pipeline.tokenizer, prior))
    client = Client(serve(page, "127.0.0.1", None, block=False), verbose=False)
    try:
        drawn = {}
        for label, guidance in ((-1, 0.0), (1, 0.0), (2, 0.0), (1, 8.0)):
            settings = [GENERATE[name] for name in GENERATE if name != "refine"]
            gallery, _ = client.predict(*settings, label, guidance, api_name="/generate")
            drawn[label, guidance] = tuple(pixels(item["image"]) for item in gallery)
        assert len(set(drawn.values())) == 4
    finally:
        page.close()


def test_a_request_draws_no_more_than_the_server_allows(client: Client) -> None:
    assert len(generate(client, count=40, steps=1)) == 40
    with pytest.raises(Exception, match="maximum value 40"):
        generate(client, count=41, steps=1)


def test_the_grid_fills_in_step_by_step(client: Client) -> None:
    job = client.submit(*GENERATE.values(), api_name="/generate")
    final = job.result()
    grids = [[pixels(item["image"]) for item in gallery] for gallery, _ in job.outputs()]
    assert len(grids) >= 4
    grey = [sum(picture.count(b"\x80\x80\x80") for picture in grid) for grid in grids[:4]]
    assert grey[0] > grey[1] > grey[2] > grey[3]
    assert [pixels(item["image"]) for item in final[0]] == grids[-1]


def test_generated_images_are_the_pipelines_and_say_how_they_were_drawn(
    client: Client, pipeline: SoftConvexPipeline
) -> None:
    gallery, archive = client.predict(*{**GENERATE, "seed": 7}.values(), api_name="/generate")
    wanted = pipeline(3, seed=7, num_inference_steps=4, temperature=1.0, choice_temperature=4.5).images
    for item, image in zip(gallery, wanted, strict=True):
        assert pixels(item["image"]) == image.resize((128, 128), Image.Resampling.NEAREST).tobytes()
    with Image.open(gallery[1]["image"]) as shown:
        assert json.loads(shown.info["scq"])["seed"] == 8
    with zipfile.ZipFile(archive) as files:
        assert sorted(files.namelist()) == ["000007.png", "000008.png", "000009.png", "settings.json"]
        assert json.loads(files.read("settings.json"))["num_inference_steps"] == 4
        with files.open("000008.png") as file, Image.open(file) as image:
            assert image.tobytes() == wanted[1].tobytes()
            about = json.loads(image.info["scq"])
    again = pipeline(1, **about).images[0]
    assert again.tobytes() == wanted[1].tobytes(), "the metadata draws the image again"


def test_every_control_of_edit_does_what_it_says(client: Client, painted: dict[str, Any]) -> None:
    usual = edit(client, painted)
    assert len(usual) == 2
    assert usual[0] != usual[1]
    assert edit(client, painted) == usual
    below = [picture[60 * 128 * 3 :] for picture in usual]
    assert below[0] == below[1], "nothing is painted there"
    changes = [{"steps": 1}, {"sampler": "halton"}, {"temperature": 0.2}, {"choice": 0.0}, {"top_p": 0.05}]
    for change in [*changes, {"refine": False}, {"seed": 5}, {"what": VARY}, {"what": OUTPAINT, "right": 8}]:
        assert edit(client, painted, **change) != usual, change
    assert len(edit(client, painted, count=3)) == 3
    weak, strong = (edit(client, painted, what=VARY, strength=strength) for strength in (0.0, 1.0))
    assert weak[0] == weak[1]
    assert strong[0] != strong[1]


def test_outpainting_grows_on_the_side_that_was_asked_for(client: Client, painted: dict[str, Any]) -> None:
    for sides, size in (({"right": 8}, (40, 32)), ({"left": 3, "bottom": 17}, (40, 56)), ({"top": 32}, (32, 64))):
        gallery = client.predict(painted, *{**EDIT, "what": OUTPAINT, **sides}.values(), api_name="/edit")
        with Image.open(gallery[0]["image"]) as picture:
            assert picture.width * size[1] == picture.height * size[0], sides


def test_inspect_shows_reconstructions_errors_codes_and_weights(client: Client, painted: dict[str, Any]) -> None:
    *pictures, usage = client.predict(painted["background"], api_name="/reconstruct")
    assert len(pictures) == 8, "the image, three reconstructions, the codes, three error maps"
    assert len({pixels(picture) for picture in pictures}) == 8
    assert "plot" in usage
    rows = client.predict(1, 2, api_name="/patch")["data"]
    assert sum(weight for _, weight in rows) == pytest.approx(1, abs=1e-3)
    assert [weight for _, weight in rows] == sorted((weight for _, weight in rows), reverse=True)
    assert client.predict(3, 3, api_name="/patch")["data"] != rows


def test_the_report_of_a_run_is_shown(client: Client) -> None:
    text, pictures = client.predict("run", api_name="/report")
    assert "KID leads" in text
    assert "![" not in text
    assert len(pictures) == 6
    with pytest.raises(Exception, match=r"report|choices"):
        client.predict("../../etc", api_name="/report")


def test_uploads_of_any_kind_are_reconstructed(client: Client, tmp_path: Path) -> None:
    for mode, size in (("RGBA", (50, 90)), ("L", (10, 10)), ("P", (200, 40))):
        path = tmp_path / f"{mode}.png"
        Image.linear_gradient("L").resize(size).convert(mode).save(path)
        seen, soft, dominant = map(pixels, client.predict(handle_file(str(path)), api_name="/reconstruct")[:3])
        assert len({seen, soft, dominant}) == 3, "the soft quantizer's z_q is not its dominant codes"


def test_transparent_pixels_are_seen_as_white(client: Client, tmp_path: Path) -> None:
    Image.new("RGBA", (64, 64), (10, 200, 10, 0)).save(tmp_path / "clear.png")
    shown = client.predict(handle_file(str(tmp_path / "clear.png")), api_name="/reconstruct")
    assert set(pixels(shown[0])) == {255}


def test_a_mistake_gets_a_message(client: Client, painted: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("not an image")
    for mistake, words in (
        (lambda: generate(client, seed=-1), "seed"),
        (lambda: generate(client, sampler="dice"), "dice"),
        (lambda: client.predict(None, api_name="/reconstruct"), "image"),
        (lambda: client.predict(handle_file(str(tmp_path / "bad.png")), api_name="/reconstruct"), "image"),
        (lambda: edit(client, None), "image"),
        (lambda: edit(client, {**painted, "layers": []}), "Paint"),
        (lambda: edit(client, painted, what=OUTPAINT), "slider"),
    ):
        with pytest.raises(Exception, match=words):
            mistake()
    assert len(generate(client)) == 3, "the page works on"


def test_a_cancelled_drawing_stops(pipeline: SoftConvexPipeline, client: Client) -> None:
    job = client.submit(*{**GENERATE, "count": 40, "steps": 16}.values(), api_name="/generate")
    while not job.outputs():
        time.sleep(0.01)
    job.cancel()
    seen = len(job.outputs())
    assert generate(client, count=1, steps=1), "the line is free again"
    assert seen < 3 * 16
    assert not [t for t in threading.enumerate() if t.name == "scq drawing"]


def test_many_at_once_each_get_their_own_images(address: str) -> None:
    alone = {seed: generate(Client(address, verbose=False), seed=seed, count=1) for seed in range(20)}
    with ThreadPoolExecutor(20) as pool:
        together = pool.map(lambda seed: generate(Client(address, verbose=False), seed=seed, count=1), alone)
        found = dict(zip(alone, together, strict=True))
    assert found == alone
    assert len({pictures[0] for pictures in alone.values()}) > 10


def test_no_file_of_the_server_can_be_read(address: str) -> None:
    for path in (Path("README.md").resolve(), Path("/etc/passwd"), Path(__file__)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}gradio_api/file={path}")
        assert refused.value.code in (403, 404)


def test_a_password_keeps_others_out(pipeline: SoftConvexPipeline) -> None:
    page = build_page(pipeline)
    address = serve(page, "127.0.0.1", None, block=False, auth=("ada", "secret"))
    try:
        with pytest.raises(Exception, match="credentials"):
            Client(address, verbose=False)
        assert len(generate(Client(address, auth=("ada", "secret"), verbose=False))) == 3
    finally:
        page.close()
