"""The page's functions through the queue, as a client calls them; test_app_browser.py clicks."""

import json
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from gradio.utils import SyncToAsyncIterator
from gradio_client import Client, handle_file
from PIL import Image
from studio_client import EDIT, GENERATE, drawing, edit, generate, pixels, serving

from scq.engine.config import CONFIG_ROOT
from scq.engine.fingerprint import fingerprint
from scq.sampling.app import build_page, serve
from scq.sampling.pipeline import ImageOutput, SoftConvexPipeline
from scq.sampling.studio.edit import INPAINT, OUTPAINT, VARY
from scq.sampling.studio.folder import private_folder, sweep
from scq.sampling.studio.steps import step_by_step, zipped
from scq.stage2_prior.scheduler import UnmaskingScheduler
from scq.stage2_prior.transformer import MaskedTransformer

pytestmark = pytest.mark.usefixtures("downloads")


@pytest.fixture(scope="module")
def pipeline(tiny_run: Path) -> SoftConvexPipeline:
    """The tiny run's model, with a refiner whose work can be seen: eight steps of training move pixels by a grey level
    here and there, and whether any depends on the order in which threads add."""
    pipeline = SoftConvexPipeline.from_pretrained(tiny_run / "model")
    with torch.no_grad():
        pipeline.refiner.network.leave.bias.fill_(1.0)  # one standard deviation, in every channel
    return pipeline


@pytest.fixture(scope="module")
def address(pipeline: SoftConvexPipeline, tiny_run: Path) -> Iterator[str]:
    page = build_page(pipeline, max_batch=40, results=[tiny_run])
    yield serve(page, "127.0.0.1", None, block=False)
    page.close()


@pytest.fixture(scope="module")
def client(address: str) -> Client:
    return Client(address, verbose=False)


@pytest.fixture(scope="module")
def conditional(pipeline: SoftConvexPipeline) -> Iterator[Client]:
    """A page of a prior with three classes."""
    torch.manual_seed(0)
    config = pipeline.tokenizer.config
    prior = MaskedTransformer(config.codebook_size, pipeline.tokenizer.grid, 32, 1, 2, num_classes=3)
    for embedding in (prior.class_embedding, prior.token_embedding):
        torch.nn.init.normal_(embedding.weight)
    with serving(build_page(SoftConvexPipeline(pipeline.tokenizer, prior))) as client:
        yield client


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the editor sends: an image, and a layer with paint on its upper half."""
    folder = tmp_path_factory.mktemp("painted")
    Image.linear_gradient("L").resize((96, 96)).convert("RGB").save(folder / "image.png")
    layer = Image.new("RGBA", (96, 96))
    layer.paste((255, 0, 255, 255), (0, 0, 96, 40))
    layer.save(folder / "layer.png")
    return drawing(folder / "image.png", folder / "layer.png")


def test_every_control_of_generate_does_what_it_says(client: Client) -> None:
    usual = generate(client)
    assert len(usual) == 3
    assert generate(client) == usual
    assert generate(client, seed=1)[:2] == usual[1:], "image i is drawn with seed + i"
    assert len(generate(client, count=20)) == 20
    changes = [{"steps": 1}, {"sampler": "halton"}, {"temperature": 0.2}, {"choice": 0.0}, {"top_p": 0.05}]
    for change in [*changes, {"refine": False}]:
        assert generate(client, **change) != usual, change


CLASSES = ((-1, 0.0), (1, 0.0), (2, 0.0), (1, 8.0))  # class and guidance


def test_class_and_guidance_of_a_conditional_prior_do_what_they_say(conditional: Client) -> None:
    drawn = {}
    for label, guidance in CLASSES:
        settings = [GENERATE[name] for name in GENERATE if name != "refine"]
        gallery, _ = conditional.predict(*settings, label, guidance, api_name="/generate")
        drawn[label, guidance] = tuple(pixels(item["image"]) for item in gallery)
    assert len(set(drawn.values())) == 4


def test_class_and_guidance_do_what_they_say_when_editing(conditional: Client, painted: dict[str, Any]) -> None:
    drawn = set()
    for label, guidance in CLASSES:
        settings = {**{name: EDIT[name] for name in EDIT if name != "refine"}, "what": VARY, "strength": 1.0}
        gallery = conditional.predict(painted, *settings.values(), label, guidance, api_name="/edit")
        drawn.add(tuple(pixels(item["image"]) for item in gallery))
        with Image.open(gallery[0]["image"]) as answer:
            about = json.loads(answer.info["scq"])
        assert about.get("class_labels", -1) == label
        assert about["guidance_scale"] == guidance
    assert len(drawn) == 4


def test_a_request_draws_no_more_than_the_server_allows(client: Client) -> None:
    assert len(generate(client, count=40, steps=1)) == 40
    with pytest.raises(Exception, match="Images=41 must be a whole number, at least 1 and at most 40"):
        generate(client, count=41, steps=1)


def test_the_servers_limit_holds_for_answers_too(pipeline: SoftConvexPipeline, painted: dict[str, Any]) -> None:
    with serving(build_page(pipeline, max_batch=3)) as client:
        assert len(edit(client, painted, count=3, steps=1)) == 3
        with pytest.raises(Exception, match="Results=4 must be a whole number, at least 1 and at most 3"):
            edit(client, painted, count=4, steps=1)


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
        settings = json.loads(files.read("settings.json"))
        assert settings["num_inference_steps"] == 4
        assert settings["schedule"] == pipeline.scheduler.schedule, "a setting without a control"
        assert settings["model"] == {
            "tokenizer": pipeline.tokenizer.fingerprint(),
            "prior": fingerprint(pipeline.prior),
            "refiner": fingerprint(pipeline.refiner),
        }
        with files.open("000008.png") as file, Image.open(file) as image:
            assert image.tobytes() == wanted[1].tobytes()
            about = json.loads(image.info["scq"])
            assert json.loads(image.info["scq_model"]) == settings["model"]
    assert about.keys() >= {field.name for field in fields(UnmaskingScheduler)} - {"steps"}
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


def test_answers_say_how_they_were_drawn(client: Client, pipeline: SoftConvexPipeline, painted: dict[str, Any]) -> None:
    sides = {"left": 8, "right": 0, "top": 3, "bottom": 0}
    for changes, told in (
        ({"what": INPAINT}, {}),
        ({"what": VARY, "strength": 0.25}, {"strength": 0.25}),
        ({"what": OUTPAINT, **sides}, sides),
    ):
        gallery = client.predict(painted, *{**EDIT, **changes, "seed": 5}.values(), api_name="/edit")
        with Image.open(gallery[1]["image"]) as answer:
            about = json.loads(answer.info["scq"])
            assert json.loads(answer.info["scq_model"])["prior"] == fingerprint(pipeline.prior)
        assert about["seed"] == 6
        assert about["edit"] == changes["what"]
        assert about["final_temperature"] == pipeline.scheduler.final_temperature, "a setting without a control"
        assert {name: about[name] for name in ("strength", *sides) if name in about} == told


def test_the_number_says_which_generated_image_is_taken(client: Client) -> None:
    drawn = generate(client, seed=3)
    for number in (1, 3):
        with Image.open(client.predict(number, api_name="/take")["background"]) as taken:
            assert taken.convert("RGB").resize((128, 128), Image.Resampling.NEAREST).tobytes() == drawn[number - 1]
    with pytest.raises(Exception, match="Generated image=4 must be a whole number, at least 1 and at most 3"):
        client.predict(4, api_name="/take")


def test_outpainting_grows_on_the_side_that_was_asked_for(client: Client, painted: dict[str, Any]) -> None:
    for sides, size in (({"right": 8}, (40, 32)), ({"left": 3, "bottom": 17}, (40, 56)), ({"top": 32}, (32, 64))):
        gallery = client.predict(painted, *{**EDIT, "what": OUTPAINT, **sides}.values(), api_name="/edit")
        with Image.open(gallery[0]["image"]) as picture:
            assert picture.width * size[1] == picture.height * size[0], sides


def test_inspect_shows_reconstructions_errors_codes_and_weights(client: Client, tmp_path: Path) -> None:
    # Of low contrast: the barely trained model's errors of black and white are all off the scale of the maps.
    Image.linear_gradient("L").point(lambda v: 96 + v // 4).convert("RGB").save(tmp_path / "soft.png")
    image = handle_file(str(tmp_path / "soft.png"))
    *pictures, usage = client.predict(image, api_name="/reconstruct")
    assert len(pictures) == 8, "the image, three reconstructions, the codes, three error maps"
    assert len({pixels(picture) for picture in pictures}) == 8
    assert "plot" in usage
    rows = client.predict(1, 2, api_name="/patch")["data"]
    assert sum(weight for _, weight in rows) == pytest.approx(1, abs=1e-3)
    assert [weight for _, weight in rows] == sorted((weight for _, weight in rows), reverse=True)
    assert client.predict(3, 3, api_name="/patch")["data"] != rows
    assert client.predict(1, 3, api_name="/patch")["data"] != rows, "the column alone"
    assert client.predict(3, 2, api_name="/patch")["data"] != rows, "the row alone"
    *again, _ = client.predict(image, api_name="/reconstruct")
    assert [pixels(picture) for picture in again] == [pixels(picture) for picture in pictures], "colours stay"


def test_the_report_of_a_run_is_shown(client: Client) -> None:
    text, pictures = client.predict("run", api_name="/report")
    assert "KID leads" in text
    assert "![" not in text
    assert len(pictures) == 6
    with pytest.raises(Exception, match=r"Report='../../etc' must be one of run"):
        client.predict("../../etc", api_name="/report")


def test_a_mistake_gets_a_message(client: Client, painted: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("not an image")
    for mistake, words in (
        (lambda: generate(client, seed=-1), "Seed=-1 must be"),
        (lambda: generate(client, sampler="dice"), "dice"),
        (lambda: client.predict(None, api_name="/reconstruct"), "image"),
        (lambda: client.predict(handle_file(str(tmp_path / "bad.png")), api_name="/reconstruct"), "image"),
        (lambda: edit(client, None), "^Choose an image first"),
        (lambda: edit(client, {**painted, "layers": []}), "Paint"),
        (lambda: edit(client, painted, what=OUTPAINT), "slider"),
    ):
        with pytest.raises(Exception, match=words):
            mistake()
    assert len(generate(client)) == 3, "the page works on"


def test_no_parameter_of_any_endpoint_lets_nonsense_through(
    client: Client, address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert {"/generate", "/edit", "/take", "/reconstruct", "/patch", "/report"} <= set(endpoints)
    http = httpx.Client(base_url=f"{address}gradio_api/call", timeout=60)
    for name, endpoint in endpoints.items():
        sound = [
            1 if each["label"] in ("Images", "Results") else each["parameter_default"]
            for each in endpoint["parameters"]
        ]
        for place, parameter in enumerate(endpoint["parameters"]):
            for value in (float("nan"), "x" * 10_000, [], {"id": ["x"]}):
                values = [*sound[:place], value, *sound[place + 1 :]]
                body = json.dumps({"data": values})
                call = http.post(name, content=body, headers={"Content-Type": "application/json"})
                answer = http.get(f"{name}/{call.json()['event_id']}").text
                assert "event: error" in answer, (name, parameter["label"], value)
                assert '"error": null' not in answer, (name, parameter["label"], value)
                assert len(answer) < 1000, "the value is not sent back"
    assert "Traceback" not in capfd.readouterr().err


def test_a_cancelled_drawing_stops(pipeline: SoftConvexPipeline, client: Client) -> None:
    job = client.submit(*{**GENERATE, "count": 40, "steps": 16}.values(), api_name="/generate")
    while not job.outputs():
        time.sleep(0.01)
    job.cancel()
    seen = len(job.outputs())
    assert generate(client, count=1, steps=1), "the line is free again"
    assert seen < 3 * 16
    assert not [t for t in threading.enumerate() if t.name == "scq drawing"]


def test_no_step_begins_once_nobody_looks(pipeline: SoftConvexPipeline) -> None:
    begun = []

    def draw(look: Callable[..., None]) -> ImageOutput:
        for step in range(9):
            begun.append(step)
            look(pipeline, step, 8 - step, {"tokens": torch.zeros(1)})
        raise AssertionError("it was not ended")

    grids = step_by_step(draw)
    for seen in range(1, 4):
        next(grids)
        assert len(begun) == seen, "nothing is drawn ahead"
    grids.close()
    assert len(begun) == 3
    assert not [t for t in threading.enumerate() if t.name == "scq drawing"]


def test_a_cancel_stops_within_the_step(
    pipeline: SoftConvexPipeline, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fifth step is held until the server has heard of the cancel; it must be the last."""
    steps, heard, fifth = [], threading.Event(), threading.Event()
    close = SyncToAsyncIterator.aclose

    async def noted(iterator: SyncToAsyncIterator, *arguments: float) -> None:
        heard.set()
        await close(iterator, *arguments)

    def held(*_: object) -> None:
        steps.append(1)
        if len(steps) == 5:
            fifth.set()
            assert heard.wait(60)

    monkeypatch.setattr(SyncToAsyncIterator, "aclose", noted)
    hook = pipeline.prior.register_forward_pre_hook(held)
    try:
        job = client.submit(*{**GENERATE, "count": 8, "steps": 16}.values(), api_name="/generate")
        assert fifth.wait(60)
        job.cancel()
        for thread in threading.enumerate():
            if thread.name == "scq drawing":
                thread.join(60)
        assert len(steps) == 5
    finally:
        hook.remove()
    assert len(generate(client, count=1, steps=1)) == 1, "the line is free again"


def test_a_zip_is_deleted_with_the_pages_other_files(client: Client, address: str) -> None:
    folder = private_folder()
    before = set(folder.rglob("*"))
    other = {**GENERATE, "seed": 342}.values()  # pictures that no other test has drawn, which would be there already
    Client(address, verbose=False, download_files=False).predict(*other, api_name="/generate")
    new = {path.suffix for path in set(folder.rglob("*")) - before}
    assert new == {"", ".zip", ".png"}
    sweep(folder, {path for path in before if path.is_file()}, seconds=0)
    assert not [path for path in set(folder.rglob("*")) - before if path.is_file()]


def test_many_at_once_each_get_their_own_images(address: str) -> None:
    alone = {seed: generate(Client(address, verbose=False), seed=seed, count=1) for seed in range(20)}
    with ThreadPoolExecutor(20) as pool:
        together = pool.map(lambda seed: generate(Client(address, verbose=False), seed=seed, count=1), alone)
        found = dict(zip(alone, together, strict=True))
    assert found == alone
    assert len({pictures[0] for pictures in alone.values()}) > 10


def test_no_file_of_the_server_can_be_read(address: str) -> None:
    picture = CONFIG_ROOT.parent / "docs" / "pictures" / "edit.png"  # one that could be opened
    assert picture.is_file()
    for path in (Path("README.md").resolve(), Path("/etc/passwd"), Path(__file__), picture):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}gradio_api/file={path}")
        assert refused.value.code in (403, 404)
        bare = {"path": str(path)}
        for file in (bare, {**bare, "meta": {"_type": "gradio.FileData"}}):
            for name, given in (("reconstruct", file), ("edit", {"background": file, "layers": [], "composite": None})):
                values = [given] if name == "reconstruct" else [given, *{**EDIT, "what": VARY}.values()]
                call = httpx.post(f"{address}gradio_api/call/{name}", json={"data": values})
                answer = call.text
                if call.is_success:
                    answer = httpx.get(f"{address}gradio_api/call/{name}/{call.json()['event_id']}", timeout=60).text
                    assert "event: error" in answer
                assert "complete" not in answer
                assert "root:" not in answer


def test_a_password_keeps_others_out(pipeline: SoftConvexPipeline) -> None:
    page = build_page(pipeline)
    address = serve(page, "127.0.0.1", None, block=False, auth=("ada", "secret"))
    try:
        with pytest.raises(Exception, match="credentials"):
            Client(address, verbose=False)
        assert len(generate(Client(address, auth=("ada", "secret"), verbose=False))) == 3
    finally:
        page.close()


def test_a_clock_before_1980_can_be_zipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "localtime", lambda *_: time.gmtime(0))
    with zipfile.ZipFile(zipped([], {"steps": 4}, tmp_path)) as files:
        assert json.loads(files.read("settings.json")) == {"steps": 4}
