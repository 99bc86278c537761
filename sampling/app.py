"""The Gradio page, ``scq app --model DIR``: Generate draws new images, Inspect shows what the tokenizer keeps."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr
import torch
from PIL import Image, ImageOps

from engine.errors import UserError
from sampling.pipeline import SoftConvexPipeline
from stage1_tokenizer.autoencoder import to_float, to_uint8

LARGEST_COUNT = 64
SHOWN_SIDE = 128  # pixels; small images are enlarged to it, without smoothing, so that every pixel can be seen


def build_page(pipeline: SoftConvexPipeline) -> gr.Blocks:
    """The page around one pipeline."""
    defaults, prior = pipeline.sampling, pipeline.prior.config
    with gr.Blocks(title="scq", analytics_enabled=False) as page:
        gr.Markdown(
            f"# scq\nImages from {prior.grid[0]}x{prior.grid[1]} dominant codes out of {prior.codebook_size}, "
            f"{pipeline.tokenizer.config.image_size} pixels."
        )
        with gr.Tab("Generate"), gr.Row():
            with gr.Column(scale=1):
                seed = gr.Number(0, label="Seed", precision=0, info="Image i is drawn with seed + i.")
                count = gr.Slider(1, LARGEST_COUNT, 16, step=1, label="Images")
                steps = gr.Slider(1, pipeline.prior.length, defaults.steps, step=1, label="Steps")
                temperature = gr.Slider(0.1, 2.0, defaults.temperature, step=0.05, label="Temperature")
                choice = gr.Slider(
                    0.0, 20.0, defaults.choice_temperature, step=0.5, label="Choice temperature",
                    info="Noise on which places are revealed first; 0 always takes the surest.",
                )  # fmt: skip
                controls = [seed, count, steps, temperature, choice]
                if prior.num_classes:
                    label = gr.Slider(-1, prior.num_classes - 1, -1, step=1, label="Class", info="-1: no class.")
                    guidance = gr.Slider(0.0, 10.0, defaults.guidance_scale, step=0.1, label="Guidance scale")
                    controls += [label, guidance]
                generate = gr.Button("Generate", variant="primary")
            with gr.Column(scale=3):
                gallery = gr.Gallery(label="Images", columns=8, format="png", object_fit="contain", height=600)

        def draw(seed, count, steps, temperature, choice_temperature, label=-1, guidance_scale=None) -> Iterator[list]:
            if seed is None or not 0 <= seed < 2**53:
                raise gr.Error("The seed must be a whole number from 0 on.")
            count = int(min(max(1, count), LARGEST_COUNT))
            yield from _reveal(
                pipeline, int(seed), count, int(label), steps=int(steps), temperature=float(temperature),
                choice_temperature=float(choice_temperature), guidance_scale=guidance_scale,
            )  # fmt: skip

        generate.click(draw, controls, gallery, api_name="generate")

        with gr.Tab("Inspect"):
            gr.Markdown(
                "What the tokenizer keeps of an image: decoded from z_q, the convex combinations, and from the "
                "dominant codes alone, which is all that the prior can draw."
            )
            # RGBA: gradio's own conversion to RGB would show what lies behind transparent pixels.
            upload = gr.Image(type="pil", image_mode="RGBA", label="Image", sources=["upload", "clipboard"], height=300)
            inspect = gr.Button("Reconstruct", variant="primary")
            with gr.Row():
                shown = [
                    gr.Image(label=title, format="png", height=300, interactive=False)
                    for title in ("What the model sees", "From z_q", "From dominant codes")
                ]
        inspect.click(lambda image: _reconstruct(pipeline, image), upload, shown, api_name="reconstruct")
    return page


def serve(page: gr.Blocks, host: str, port: int | None, block: bool = True) -> str:
    """Serve the page; returns its address, at once or (``block``) when interrupted.

    Args:
        port: None for any free one.

    Raises:
        UserError: the port is taken.
    """
    try:
        _, address, _ = page.queue(default_concurrency_limit=1).launch(
            server_name=host, server_port=port, prevent_thread_lock=not block, quiet=not block
        )
    except OSError as error:
        raise UserError(f"port {port} of {host} is not free; choose another with --port") from error
    return address


def _reveal(
    pipeline: SoftConvexPipeline, seed: int, count: int, label: int, **settings: float | None
) -> Iterator[list[Image.Image]]:
    """The gallery after every batch, growing as images are finished."""
    finished: list[Image.Image] = []
    for start in range(0, count, 16):
        fresh = min(16, count - start)
        labels = [label] * fresh if label >= 0 else None
        try:
            images = pipeline(fresh, seed + start, class_labels=labels, **settings).images
        except ValueError as error:
            raise gr.Error(str(error)) from error
        finished += [_enlarge(image) for image in images]
        yield finished


@torch.no_grad()
def _reconstruct(pipeline: SoftConvexPipeline, image: Image.Image | None) -> list[Image.Image]:
    if image is None:
        raise gr.Error("Choose an image first.")
    tokenizer = pipeline.tokenizer
    side = tokenizer.config.image_size
    seen = ImageOps.fit(_on_white(image), (side, side), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(seen.tobytes()), dtype=torch.uint8).view(1, side, side, 3).permute(0, 3, 1, 2)
    encoding = tokenizer.encode(to_float(pixels.to(tokenizer.device)))
    decoded = [tokenizer.decode(encoding.z_q), tokenizer.decode_indices(encoding.indices)]
    pictures = [Image.fromarray(to_uint8(d)[0].permute(1, 2, 0).cpu().numpy()) for d in decoded]
    return [_enlarge(picture) for picture in (seen, *pictures)]


def _on_white(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _enlarge(image: Image.Image) -> Image.Image:
    zoom = max(1, -(-SHOWN_SIDE // image.width))
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
