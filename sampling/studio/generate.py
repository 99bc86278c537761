"""The tab that draws new images."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from scq.sampling.images import to_pictures
from scq.sampling.pipeline import ImageOutput, SoftConvexPipeline
from scq.sampling.studio.controls import Slider, WholeNumber
from scq.sampling.studio.steps import (
    BATCH,
    LARGEST_SEED,
    MODEL_QUEUE,
    chosen_settings,
    drawn_gallery,
    labelled,
    sampler_controls,
    shown,
    step_by_step,
    zipped,
)


def generate_tab(pipeline: SoftConvexPipeline, max_batch: int, model: dict[str, str]) -> gr.State:
    """Build the tab and return the state that holds the labelled images drawn last, for the other tabs.

    Args:
        max_batch: the most images that one request may draw.
        model: the pipeline's `fingerprints`.
    """
    drawn = gr.State([])
    with gr.Row():
        with gr.Column(scale=1):
            seed = WholeNumber(
                0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED, info="Image i is drawn with seed + i."
            )
            count = Slider(1, max_batch, min(16, max_batch), step=1, label="Images")
            controls = sampler_controls(pipeline)
            generate = gr.Button("Generate", variant="primary")
            cancel = gr.Button("Cancel")
        with gr.Column(scale=3):
            gallery = drawn_gallery("Images", columns=8)
            download = gr.File(label="PNG files and their settings", interactive=False)

    def draw(first: int, count: int, *values: Any) -> Iterator[tuple[list[Image.Image], str | None, list]]:
        settings = chosen_settings(pipeline, list(controls), values)
        finished: list[Image.Image] = []
        pictures: list[Image.Image] = []
        for start in range(0, count, BATCH):
            call = partial(
                pipeline, min(BATCH, count - start), seed=first + start, output_type="pt", **settings
            )  # fmt: skip
            for event in step_by_step(lambda on_step, call=call: call(callback_on_step_end=on_step)):
                if isinstance(event, ImageOutput):
                    finished += labelled(to_pictures(event.images), event.seeds, settings, model)
                    pictures += labelled(shown(event.images), event.seeds, settings, model)
                    yield pictures, None, finished
                else:
                    yield pictures + shown(pipeline.preview(event)), None, finished
        about = {"seed": first, "num_images": count, **settings, "model": model}
        # In gradio's cache of this component, from which old files are deleted.
        yield pictures, zipped(finished, about, Path(download.GRADIO_CACHE)), finished

    drawing = generate.click(
        draw, [seed, count, *controls.values()], [gallery, download, drawn],
        api_name="generate", concurrency_id=MODEL_QUEUE, concurrency_limit=1,
    )  # fmt: skip
    cancel.click(None, cancels=[drawing], queue=False, api_name="cancel_generate")
    return drawn
