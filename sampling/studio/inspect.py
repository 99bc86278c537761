"""The tab that shows what the tokenizer makes of an image."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from scq.engine.errors import UserError
from scq.sampling.images import enlarge, to_pictures, to_pixels
from scq.sampling.pipeline import SoftConvexPipeline
from scq.sampling.studio.controls import Slider
from scq.sampling.studio.steps import BUTTONS, MODEL_QUEUE, SHOWN_SIDE
from scq.sampling.studio.uploads import UploadedImage
from scq.stage1_tokenizer.quantizers import Mixture

ERROR_GAIN = 4  # factor of the error maps; the same for every image, so that maps can be compared


class Inspected(NamedTuple):
    """What a session keeps of the image that is inspected."""

    indices: torch.Tensor  # (h, w)
    support: torch.Tensor  # (h, w, S)
    weights: torch.Tensor  # (h, w, S)
    cell: int  # side of a token on the page, in pixels


def inspect_tab(pipeline: SoftConvexPipeline) -> None:
    """Build the tab."""
    gr.Markdown(
        "What the tokenizer keeps of an image: decoded from **z_q**, the convex combinations of codes, and from the "
        "**dominant codes** alone, which are all that the prior can draw"
        + (", and from those codes as the **refiner** completes them." if pipeline.refiner is not None else ".")
    )
    found = gr.State()
    picture = partial(gr.Image, None, format="png", interactive=False, buttons=BUTTONS)
    with gr.Row():
        with gr.Column(scale=1):
            upload = UploadedImage(label="Image", sources=["upload", "clipboard"], height=300, buttons=BUTTONS)
            inspect = gr.Button("Reconstruct", variant="primary")
        with gr.Column(scale=3):
            titles = ["From z_q", "From dominant codes"] + (["Refined"] if pipeline.refiner is not None else [])
            with gr.Row():
                seen = picture(label="What the model sees: click a patch")
                pictures = [picture(label=title) for title in titles]
            with gr.Row():
                grid = picture(label="Dominant codes: click a patch")
                errors = [picture(label=f"{title}: error x{ERROR_GAIN}") for title in titles]
    with gr.Row():
        with gr.Column(scale=1):
            height, width = pipeline.prior.config.grid
            row = Slider(0, height - 1, 0, step=1, label="Row of the patch")
            column = Slider(0, width - 1, 0, step=1, label="Column of the patch")
            patch = gr.Dataframe(headers=["code", "weight"], label="Codes that the patch mixes", interactive=False)
        with gr.Column(scale=2):
            usage = gr.Plot(label="Codebook usage")

    shown = inspect.click(
        lambda image: _inspect(pipeline, image), upload, [seen, *pictures, grid, *errors, usage, found],
        api_name="reconstruct", concurrency_id=MODEL_QUEUE, concurrency_limit=1,
    )  # fmt: skip
    shown.then(_mixed, [found, row, column], patch, api_name=False)
    for slider in (row, column):
        slider.change(_mixed, [found, row, column], patch, api_name="patch" if slider is row else False)
    for clickable in (seen, grid):
        clickable.select(_clicked, found, [row, column], api_name=False)


@torch.no_grad()
def _inspect(pipeline: SoftConvexPipeline, image: Image.Image | None) -> list[Any]:
    if image is None:
        raise UserError("Choose an image first.")
    pixels = to_pixels(image, pipeline.image_size)  # (1, 3, H, W)
    encoding = pipeline.encode(pixels)
    decoded = [pipeline.decode(encoding.z_q, "pt"), pipeline.decode_tokens(encoding.indices, refine=False)]
    if pipeline.refiner is not None:
        decoded.append(pipeline.decode_tokens(encoding.indices, refine=True))
    differences = [(each.cpu().int() - pixels.int()).abs().float().mean(1, keepdim=True) for each in decoded]
    errors = [(ERROR_GAIN * error).clamp(max=255).to(torch.uint8).expand(-1, 3, -1, -1) for error in differences]
    pictures = [_large(each) for each in (pixels, *decoded, _coloured(pipeline, encoding), *errors)]
    kept = Inspected(
        *(each[0].cpu() for each in (encoding.indices, encoding.support, encoding.weights)),
        cell=pictures[0].width // encoding.indices.shape[2],
    )
    return [*pictures, _usage(pipeline, kept.indices), kept]


def _large(pixels: torch.Tensor) -> Image.Image:
    return enlarge(to_pictures(pixels)[0], 2 * SHOWN_SIDE)


def _coloured(pipeline: SoftConvexPipeline, encoding: Mixture) -> torch.Tensor:
    """The dominant codes as colours (1, 3, H, W): the codebook's first three principal components, so that codes that
    are close together look alike."""
    tokenizer = pipeline.tokenizer
    codes = tokenizer.codes().cpu()  # (K, F)
    # Exact, not by random projections, so that a code keeps its colour from one image to the next.
    components = torch.linalg.svd(codes - codes.mean(0), full_matrices=False).U[:, :3]  # (K, 3), orthonormal
    low, high = components.amin(0), components.amax(0)
    colours = (255 * (components - low) / (high - low).clamp_min(1e-12)).to(torch.uint8)
    colours = torch.nn.functional.pad(colours, (0, 3 - colours.shape[1]))
    grid = colours[encoding.indices.cpu()].permute(0, 3, 1, 2)  # (1, 3, h, w)
    return grid.repeat_interleave(tokenizer.factor, 2).repeat_interleave(tokenizer.factor, 3)


def _usage(pipeline: SoftConvexPipeline, indices: torch.Tensor) -> Figure:
    """How often each code is dominant: recently in training, if the quantizer counted that, and in this image."""
    here = torch.bincount(indices.flatten(), minlength=pipeline.tokenizer.quantizer.codebook_size)
    trained = pipeline.tokenizer.quantizer.usage_counts()
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axis = figure.add_subplot()
    counts, title = (here, "in this image") if trained is None else (trained.cpu(), "in recent training")
    order = counts.argsort(descending=True)
    axis.bar(np.arange(len(counts)), counts[order] / counts.sum(), width=1.0, color="#7a9cc6")
    marked = here[order].nonzero().flatten().numpy()
    axis.plot(marked, np.zeros(len(marked)), "|", color="#c0392b", markersize=12, label="in this image")
    axis.set_xlabel("codes, the most frequent first")
    axis.set_ylabel("share")
    axis.set_title(
        f"{int((counts > 0).sum())} of {len(counts)} codes are dominant {title}; {len(marked)} in this image",
        fontsize=9,
    )
    axis.legend(loc="upper right")
    return figure


def _mixed(found: Inspected | None, row: int, column: int) -> list[list[float]]:
    """The codes of one patch with their weights, the heaviest first."""
    if found is None:
        return []
    weights, order = found.weights[row, column].sort(descending=True)
    codes = found.support[row, column][order]
    return [[int(code), round(float(weight), 4)] for code, weight in zip(codes, weights, strict=True) if weight > 0]


def _clicked(found: Inspected | None, event: gr.SelectData) -> tuple[int, int]:
    if found is None:
        raise UserError("Reconstruct an image first.")
    x, y = event.index
    height, width = found.indices.shape
    return min(y // found.cell, height - 1), min(x // found.cell, width - 1)
