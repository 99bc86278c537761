"""What the page's tabs share: controls of the sampler, drawing step by step, and answers to mistakes."""

from __future__ import annotations

import json
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import gradio as gr
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from scq.engine.fingerprint import fingerprint
from scq.sampling.images import enlarge, to_pictures
from scq.sampling.pipeline import ImageOutput, SoftConvexPipeline
from scq.stage2_prior.scheduler import SAMPLERS

MODEL_QUEUE = "model"  # everything that runs the network waits in one line, first come, first served
BATCH = 16  # images drawn together; a cancelled drawing stops within a step of one batch
SHOWN_SIDE = 128  # pixels; smaller images are enlarged to it
LARGEST_SEED = 2**31
BUTTONS = ["download", "fullscreen"]  # of pictures; gradio's own list also has one that uploads them to a public place


class Cancelled(Exception):
    """Nobody waits for the drawing any more."""


def sampler_controls(pipeline: SoftConvexPipeline) -> dict[str, gr.components.Component]:
    """The settings of a drawing as controls, by the names that the pipeline has for them."""
    defaults, prior = pipeline.scheduler, pipeline.prior.config
    controls = {
        "num_inference_steps": gr.Slider(
            1, pipeline.prior.length, min(defaults.steps, pipeline.prior.length), step=1, label="Steps"
        ),
        "sampler": gr.Dropdown(list(SAMPLERS), value=defaults.sampler, label="Sampler"),
        "temperature": gr.Slider(0.1, 2.0, defaults.temperature, step=0.05, label="Temperature"),
        "choice_temperature": gr.Slider(
            0.0, 20.0, defaults.choice_temperature, step=0.5, label="Choice temperature",
            info="maskgit: noise on which places are revealed first; 0 always takes the surest.",
        ),
        "top_p": gr.Slider(0.05, 1.0, defaults.top_p, step=0.05, label="Top p", info="1 draws among all codes."),
    }  # fmt: skip
    if prior.num_classes:
        controls["class_labels"] = gr.Slider(-1, prior.num_classes - 1, -1, step=1, label="Class", info="-1: no class.")
        controls["guidance_scale"] = gr.Slider(
            0.0,
            10.0,
            defaults.guidance_scale,
            step=0.1,
            label="Guidance scale",
            info="Towards the class, if any.",
        )
    if pipeline.refiner is not None:
        controls["refine"] = gr.Checkbox(defaults.refine, label="Refiner", info="Give the convex detail back.")
    return controls


def chosen_settings(pipeline: SoftConvexPipeline, names: list[str], values: tuple[Any, ...]) -> dict[str, Any]:
    """All settings of a drawing as arguments of the pipeline: the controls' values, and the model's own for the rest.

    Raises:
        ValueError: a value is out of its range.
    """
    chosen = dict(zip(names, values, strict=True))
    label = int(chosen.pop("class_labels", -1))
    settings = asdict(pipeline.scheduler.changed(steps=int(chosen.pop("num_inference_steps")), **chosen))
    settings["num_inference_steps"] = settings.pop("steps")
    return settings if label < 0 else {"class_labels": label, **settings}


def fingerprints(pipeline: SoftConvexPipeline) -> dict[str, str]:
    """Which weights draw here, by the names of the pipeline's networks."""
    return {name: fingerprint(network) for name, network in pipeline.as_model().networks().items()}


def checked_seed(seed: float | None) -> int:
    if seed is None or not 0 <= seed < LARGEST_SEED:
        raise gr.Error(f"The seed must be a whole number from 0 to {LARGEST_SEED - 1}.")
    return int(seed)


@contextmanager
def mistakes_shown() -> Iterator[None]:
    """What a user did wrong appears on the page in words."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error)) from error


def step_by_step(draw: Callable[[Callable[..., None]], ImageOutput]) -> Iterator[torch.Tensor | ImageOutput]:
    """The grids (B, h, w) after every step of a drawing, then what it returned.

    Args:
        draw: takes the pipeline's ``callback_on_step_end``; runs in a thread, which waits after each step until the
            next grid is asked for. So nothing is drawn ahead, and no step begins after the iterator is closed.
    """
    events: SimpleQueue[torch.Tensor | ImageOutput | BaseException] = SimpleQueue()  # never holds more than one
    cancelled, wanted = threading.Event(), threading.Semaphore(0)

    def look(pipeline: SoftConvexPipeline, step: int, left: int, found: dict[str, torch.Tensor]) -> None:
        events.put(found["tokens"].clone())
        wanted.acquire()
        if cancelled.is_set():
            raise Cancelled

    def work() -> None:
        try:
            events.put(draw(look))
        except BaseException as error:  # handed on to whoever reads the events
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
    """Pictures that carry what they were drawn with; it becomes PNG metadata: under ``scq`` the seed and the settings,
    under ``scq_model`` the networks' fingerprints, both as JSON."""
    for picture, seed in zip(pictures, seeds.tolist(), strict=True):
        picture.info["scq"] = json.dumps({"seed": seed, **settings})
        picture.info["scq_model"] = json.dumps(model)
    return pictures


def zipped(pictures: list[Image.Image], settings: dict[str, Any], folder: Path) -> str:
    """A zip, somewhere in ``folder``, of labelled pictures as PNG files, and settings.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(dir=folder)) / "samples.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("settings.json", json.dumps(settings, indent=2) + "\n")
        for picture in pictures:
            about = PngInfo()
            for name in ("scq", "scq_model"):
                about.add_text(name, picture.info[name])
            with archive.open(f"{json.loads(picture.info['scq'])['seed']:06d}.png", "w") as file:
                picture.save(file, format="PNG", pnginfo=about)
    return str(path)
