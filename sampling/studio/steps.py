"""What the page's tabs share: controls of the sampler, drawing step by step, and files of what was drawn."""

from __future__ import annotations

import json
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import gradio as gr
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from scq.engine.fingerprint import fingerprint
from scq.sampling.images import enlarge, to_pictures
from scq.sampling.pipeline import ImageOutput, SoftConvexPipeline
from scq.sampling.studio.controls import Checkbox, Dropdown, Slider
from scq.stage2_prior.scheduler import SAMPLERS

MODEL_QUEUE = "model"  # everything that runs the networks waits in one queue; studio/line.py says in which order
BATCH = 16  # images drawn together; a cancelled drawing stops within a step of one batch
SHOWN_SIDE = 128  # pixels; smaller images are enlarged to it
LARGEST_SEED = 2**31 - 1
GALLERY_CLASS = "drawn"  # CSS class of a `drawn_gallery`
# Of pictures; gradio's own list also has one that uploads them to a public site.
BUTTONS: list[gr.Button | Literal["share", "download", "download_all", "fullscreen"]] = ["download", "fullscreen"]


class Cancelled(Exception):
    """The drawing was cancelled."""


def drawn_gallery(label: str, columns: int) -> gr.Gallery:
    """A gallery of drawn images, as high as they are."""
    return gr.Gallery(
        label=label, columns=columns, format="png", object_fit="contain", height="auto", buttons=BUTTONS,
        elem_classes=GALLERY_CLASS,
    )  # fmt: skip


def sampler_controls(pipeline: SoftConvexPipeline) -> dict[str, gr.components.Component]:
    """The controls for the settings of a drawing, by the names of the pipeline's arguments."""
    defaults, prior = pipeline.scheduler, pipeline.prior.config
    controls = {
        "num_inference_steps": Slider(
            1, pipeline.prior.length, min(defaults.steps, pipeline.prior.length), step=1, label="Steps"
        ),
        "sampler": Dropdown(list(SAMPLERS), value=defaults.sampler, label="Sampler"),
        "temperature": Slider(0.1, 2.0, defaults.temperature, step=0.05, label="Temperature"),
        "choice_temperature": Slider(
            0.0, 20.0, defaults.choice_temperature, step=0.5, label="Choice temperature",
            info="maskgit: noise in the order of revealing; 0 always reveals the most confident tokens.",
        ),
        "top_p": Slider(0.05, 1.0, defaults.top_p, step=0.05, label="Top p", info="1 draws among all codes."),
    }  # fmt: skip
    if prior.num_classes:
        controls["class_labels"] = Slider(-1, prior.num_classes - 1, -1, step=1, label="Class", info="-1: no class.")
        controls["guidance_scale"] = Slider(
            0.0,
            10.0,
            defaults.guidance_scale,
            step=0.1,
            label="Guidance scale",
            info="Strength of the guidance towards the class, if one is chosen.",
        )
    if pipeline.refiner is not None:
        controls["refine"] = Checkbox(defaults.refine, label="Refiner", info="Restore the convex detail.")
    return controls


def chosen_settings(pipeline: SoftConvexPipeline, names: list[str], values: tuple[Any, ...]) -> dict[str, Any]:
    """All settings of a drawing as arguments of the pipeline. Those without a control are the model's own."""
    chosen = dict(zip(names, values, strict=True))
    label = chosen.pop("class_labels", -1)
    settings = asdict(pipeline.scheduler.changed(steps=chosen.pop("num_inference_steps"), **chosen))
    settings["num_inference_steps"] = settings.pop("steps")
    return settings if label < 0 else {"class_labels": label, **settings}


def fingerprints(pipeline: SoftConvexPipeline) -> dict[str, str]:
    """The fingerprints of the pipeline's networks, by name."""
    return {name: fingerprint(network) for name, network in pipeline.as_model().networks().items()}


def step_by_step(draw: Callable[[Callable[..., None]], ImageOutput]) -> Iterator[torch.Tensor | ImageOutput]:
    """The grids (B, h, w) after every step of a drawing, then what it returned.

    Args:
        draw: takes the pipeline's ``callback_on_step_end``; it runs in a thread, which waits after each step until the
            next grid is asked for. So nothing is drawn ahead, and no step begins after the iterator is closed.
    """
    events: SimpleQueue[torch.Tensor | ImageOutput | BaseException] = SimpleQueue()  # never holds more than one
    cancelled, wanted = threading.Event(), threading.Semaphore(0)

    def on_step(pipeline: SoftConvexPipeline, step: int, left: int, found: dict[str, torch.Tensor]) -> None:
        events.put(found["tokens"].clone())
        wanted.acquire()
        if cancelled.is_set():
            raise Cancelled

    def work() -> None:
        try:
            events.put(draw(on_step))
        except BaseException as error:  # passed on to the reader of the events
            events.put(error)

    thread = threading.Thread(target=work, name="scq drawing", daemon=True)
    thread.start()
    try:
        while True:
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            if isinstance(event, ImageOutput):
                return
            wanted.release()
    finally:
        cancelled.set()
        wanted.release()
        thread.join()


def shown(pixels: torch.Tensor) -> list[Image.Image]:
    """uint8 (N, 3, H, W) -> pictures large enough to see."""
    return [enlarge(picture, SHOWN_SIDE) for picture in to_pictures(pixels)]


def labelled(
    pictures: list[Image.Image], seeds: torch.Tensor, settings: dict[str, Any], model: dict[str, str]
) -> list[Image.Image]:
    """Add to pictures what they were drawn with. It becomes PNG metadata: the seed and the settings under ``scq``, the
    fingerprints of the networks under ``scq_model``, both as JSON."""
    for picture, seed in zip(pictures, seeds.tolist(), strict=True):
        picture.info["scq"] = json.dumps({"seed": seed, **settings})
        picture.info["scq_model"] = json.dumps(model)
    return pictures


def zipped(pictures: list[Image.Image], settings: dict[str, Any], folder: Path) -> str:
    """Write a zip of labelled pictures (PNG) and settings.json to a new folder in ``folder``, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(dir=folder)) / "samples.zip"
    with zipfile.ZipFile(path, "w") as archive:
        # An entry without a date: the clock may stand before 1980, where a zip's begins.
        archive.writestr(zipfile.ZipInfo("settings.json"), json.dumps(settings, indent=2) + "\n")
        for picture in pictures:
            about = PngInfo()
            for name in ("scq", "scq_model"):
                about.add_text(name, picture.info[name])
            with archive.open(f"{json.loads(picture.info['scq'])['seed']:06d}.png", "w") as file:
                picture.save(file, format="PNG", pnginfo=about)
    return str(path)
