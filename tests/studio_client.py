"""What the tests of the page share: its controls' usual values, and calls through the queue as a client makes them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio_client import Client, handle_file
from PIL import Image

from scq.sampling.app import serve
from scq.sampling.studio.edit import INPAINT

GENERATE = {"seed": 0, "count": 3, "steps": 4, "sampler": "maskgit", "temperature": 1.0, "choice": 4.5, "top_p": 1.0}
GENERATE["refine"] = True
EDIT = {"what": INPAINT, "strength": 0.5, "left": 0, "right": 0, "top": 0, "bottom": 0, "seed": 0, "count": 2}
EDIT |= {name: GENERATE[name] for name in ("steps", "sampler", "temperature", "choice", "top_p", "refine")}


@contextmanager
def serving(page: gr.Blocks) -> Iterator[Client]:
    """A client of a page that is served meanwhile."""
    address = serve(page, "127.0.0.1", None, block=False)
    try:
        yield Client(address, verbose=False)
    finally:
        page.close()


def pixels(path: str) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def generate(client: Client, **changes: object) -> list[bytes]:
    gallery, _ = client.predict(*{**GENERATE, **changes}.values(), api_name="/generate")
    return [pixels(item["image"]) for item in gallery]


def edit(client: Client, image: dict[str, Any] | None, **changes: object) -> list[bytes]:
    gallery = client.predict(image, *{**EDIT, **changes}.values(), api_name="/edit")
    return [pixels(item["image"]) for item in gallery]


def drawing(background: Path, *layers: Path) -> dict[str, Any]:
    """What the editor sends."""
    return {
        "background": handle_file(str(background)),
        "layers": [handle_file(str(layer)) for layer in layers],
        "composite": None,
    }
