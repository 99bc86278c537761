"""The tab that redraws parts of an image, varies it, or continues it beyond its borders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gradio as gr
from PIL import Image

from scq.engine.checks import whole_number
from scq.engine.errors import UserError
from scq.sampling.images import to_mask
from scq.sampling.pipeline import ImageOutput, SoftConvexPipeline
from scq.sampling.studio.controls import Radio, Slider, WholeNumber
from scq.sampling.studio.steps import (
    BUTTONS,
    LARGEST_SEED,
    MODEL_QUEUE,
    SHOWN_SIDE,
    chosen_settings,
    drawn_gallery,
    labelled,
    sampler_controls,
    shown,
    step_by_step,
)
from scq.sampling.studio.uploads import UploadedDrawing

INPAINT, VARY, OUTPAINT = "Redraw what is painted", "Vary the whole image", "Continue beyond the borders"
MOST_ANSWERS = 8
SIDES = ("left", "right", "top", "bottom")


def edit_tab(pipeline: SoftConvexPipeline, drawn: gr.State, max_batch: int, model: dict[str, str]) -> None:
    """Build the tab.

    Args:
        drawn: holds the images of the Generate tab.
        max_batch: the most images that one request may draw.
        model: the pipeline's `fingerprints`.
    """
    most, side = min(MOST_ANSWERS, max_batch), pipeline.image_size
    with gr.Row():
        with gr.Column(scale=3):
            # PNG, because gradio's default format for a picture that it shows here is lossy.
            editor = UploadedDrawing(
                label="Image", sources=["upload", "clipboard"], height=420,
                brush=gr.Brush(default_size=40, colors=["#ff00ff"], color_mode="fixed"), transforms=[], layers=False,
                format="png", buttons=BUTTONS,
            )  # fmt: skip
            with gr.Row():
                number = WholeNumber(1, label="Generated image", precision=0, minimum=1)
                take = gr.Button("Take it from Generate")
            what = Radio([INPAINT, VARY, OUTPAINT], value=INPAINT, label="What to do")
            strength = Slider(0.0, 1.0, 0.5, step=0.05, label="Strength", info="Share of tokens that vary.")
            with gr.Row():
                # At most the image's own size on each side: time and memory grow with the canvas.
                borders = {
                    name: Slider(
                        0, side, side // 2, step=pipeline.tokenizer.factor, label=name.title(),
                        info=f"Pixels to add to the image's {side}.",
                    )
                    for name in SIDES
                }  # fmt: skip
        with gr.Column(scale=2):
            seed = WholeNumber(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED)
            count = Slider(1, most, min(4, most), step=1, label="Results")
            controls = sampler_controls(pipeline)
            redraw = gr.Button("Redraw", variant="primary")
            cancel = gr.Button("Cancel")
        with gr.Column(scale=3):
            gallery = drawn_gallery("Results", columns=2)

    def edit(
        edited: dict[str, Any] | None, what: str, strength: float, left: int, right: int, top: int,
        bottom: int, first: int, count: int, *values: Any,
    ) -> Iterator[list[Image.Image]]:  # fmt: skip
        borders = dict(zip(SIDES, (left, right, top, bottom), strict=True))
        call, about = _job(pipeline, edited, what, strength, borders)
        settings = chosen_settings(pipeline, list(controls), values)
        call = partial(call, seed=first, num_images=count, output_type="pt", **settings)
        for event in step_by_step(lambda on_step: call(callback_on_step_end=on_step)):
            if isinstance(event, ImageOutput):
                yield labelled(shown(event.images), event.seeds, {"edit": what, **about, **settings}, model)
            else:
                yield shown(pipeline.preview(event))

    editing = redraw.click(
        edit, [editor, what, strength, *borders.values(), seed, count, *controls.values()], gallery,
        api_name="edit", concurrency_id=MODEL_QUEUE, concurrency_limit=1,
    )  # fmt: skip
    cancel.click(None, cancels=[editing], queue=False, api_name="cancel_edit")
    take.click(_taken, [drawn, number], editor, api_name="take")


def _job(
    pipeline: SoftConvexPipeline, edited: dict[str, Any] | None, what: str, strength: float, borders: dict[str, int]
) -> tuple[Callable[..., ImageOutput], dict[str, float]]:
    """The pipeline call for what was chosen on the page, and the settings of that choice."""
    if edited is None:
        raise UserError("Choose an image first.")
    image, painted = edited["background"], edited["painted"]
    if what == VARY:
        return partial(pipeline, init_image=image, strength=strength), {"strength": strength}
    if what == OUTPAINT:
        if not any(borders.values()):
            raise UserError("Move a slider: as it is, the image does not grow on any side.")
        return partial(pipeline.outpaint, image, **borders), borders
    if not painted.any():
        raise UserError("Paint over the part that you want redrawn.")
    mask = to_mask(Image.fromarray(painted), pipeline.image_size)
    if not mask.any():
        raise UserError("Paint inside the central square: the model sees nothing else, and all your paint is outside.")
    return partial(pipeline.inpaint, image, mask), {}


def _taken(drawn: list[Image.Image], number: int) -> Image.Image:
    """A generated image, enlarged so that a brush can hit its pixels."""
    if not drawn:
        raise UserError("Generate images first.")
    chosen = drawn[whole_number("Generated image", number, 1, len(drawn)) - 1]
    zoom = max(1, 4 * SHOWN_SIDE // chosen.width)
    return chosen.resize((chosen.width * zoom, chosen.height * zoom), Image.Resampling.NEAREST)
