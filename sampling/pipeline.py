"""Both stages as one diffusers pipeline: ``SoftConvexPipeline.from_pretrained(folder)(num_images=16)``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import nn

from scq.data.stream import Batch
from scq.engine.checks import finite_number, shown, whole_number
from scq.engine.errors import UserError
from scq.engine.files import real_path
from scq.engine.measurements import Measured
from scq.engine.network import as_dtype
from scq.engine.pictures import picture_grid
from scq.engine.processes import rank_and_world_size
from scq.sampling.arguments import (
    MOST_IMAGES,
    Generators,
    Labels,
    checked_latents,
    checked_tokens,
    codes_to_start_from,
    image_labels,
    image_seeds,
)
from scq.sampling.chunks import chunk_size, in_equal_chunks
from scq.sampling.editing import OnStep, fill
from scq.sampling.hub import local_folder, upload
from scq.sampling.images import Output, Pictures, as_output, check_output_type, to_mask, to_pixels
from scq.sampling.samplers import SAMPLERS, GuidedPrior, Step
from scq.stage1_tokenizer.autoencoder import ImageTokenizer, to_float, to_uint8
from scq.stage1_tokenizer.model_folder import read_measured
from scq.stage1_tokenizer.quantizers import Mixture
from scq.stage2_prior.model import Model
from scq.stage2_prior.model_folder import open_model, save_model
from scq.stage2_prior.refiner import ConvexRefiner
from scq.stage2_prior.scheduler import UnmaskingScheduler
from scq.stage2_prior.transformer import MaskedTransformer

EMBEDDED = Path(__file__).parent / "pretrained"  # the model that comes with the package

MOST_GROWTH = 32  # times its own size by which outpainting may extend an image on each side

StepCallback = Callable[["SoftConvexPipeline", int, int, dict[str, torch.Tensor]], Any]


@dataclass
class ImageOutput(BaseOutput):
    """Images, and what they were decoded and drawn from."""

    images: Output  # of the type that ``output_type`` asks for
    tokens: torch.Tensor  # (N, h, w) int64
    seeds: torch.Tensor  # (N,) int64, each of which draws its image again


class SoftConvexPipeline(DiffusionPipeline):
    """Draws images: the prior fills a grid of dominant codes, a refiner turns them into latents, the tokenizer decodes.

    Args:
        tokenizer: of stage 1.
        prior: of stage 2, trained on the codes of that very tokenizer.
        refiner: likewise; None to decode dominant codes as they are.
        scheduler: the default sampling settings; None for those of `UnmaskingScheduler`.

    Attributes:
        measured: how the model was trained and what `scq evaluate` found, for the model card.

    Raises:
        UserError: prior or refiner belongs to another tokenizer.
    """

    _optional_components = ["refiner", "scheduler"]  # noqa: RUF012, diffusers reads a list

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        prior: MaskedTransformer,
        refiner: ConvexRefiner | None = None,
        scheduler: UnmaskingScheduler | None = None,
    ):
        super().__init__()
        # Weights that were loaded in another dtype are rounded, and have another fingerprint.
        found = tokenizer.fingerprint() if tokenizer.dtype == torch.float32 else ""
        for name, part in (("prior", prior), ("refiner", refiner)):
            wanted = part.config.tokenizer_fingerprint if part is not None else ""
            if wanted and found and wanted != found:
                raise UserError(
                    f"the {name} was trained on tokens of tokenizer {wanted}, but this is tokenizer {found}"
                )
        self.measured = Measured()
        self.register_modules(
            tokenizer=tokenizer.eval(),
            prior=prior.eval(),
            refiner=None if refiner is None else refiner.eval(),
            scheduler=scheduler or UnmaskingScheduler(),
        )

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.tokenizer.config.image_size

    @torch.no_grad()
    def __call__(
        self,
        num_images: int = 16,
        class_labels: Labels | None = None,
        num_inference_steps: int | None = None,
        temperature: float | None = None,
        guidance_scale: float | None = None,
        generator: Generators | None = None,
        init_image: Pictures | None = None,
        mask_image: Pictures | None = None,
        strength: float = 0.5,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        *,
        seed: int | None = None,
        start: torch.Tensor | None = None,
        batch_size: int | None = None,
        **sampling: float | str | None,
    ) -> ImageOutput:
        """Draw images, or redraw parts of images.

        Args:
            num_images: how many, up to MOST_IMAGES.
            class_labels: one for each image, or one for all, for a class-conditional prior.
            num_inference_steps: steps of the sampler; here and below, None means the value of ``scheduler``.
            temperature: of the distribution of codes, above 0.
            guidance_scale: strength of the guidance towards the class; 0 for none.
            generator: draws each image's seed, or a list of one for each image; without it and ``seed``, torch's
                global generator does.
            init_image: the image to start from, or one for each; see `sampling.images.to_pixels` for what it may be.
            mask_image: one mask, or one for each (see `sampling.images.to_mask`); its light pixels are redrawn,
                rounded up to whole tokens. With ``init_image`` and no mask, a random share of the tokens is redrawn: a
                variation.
            strength: that share, in [0, 1].
            output_type: ``pil``, ``pt`` (uint8) or ``np`` (see `sampling.images.as_output`).
            callback_on_step_end: called as ``callback(pipeline, step, steps_left, {"tokens": (B, h, w)})`` after each
                step of each batch; on larger grids, the steps of all windows count together. The tokens are the mask
                token where nothing is revealed yet. Its result is ignored; an exception in it ends the drawing.
            seed: of the first image, instead of ``generator``. Image i has ``seed`` + i, so that any of them can be
                drawn again alone.
            start: (num_images, h, w) int64, instead of ``init_image``: codes to keep, and the prior's mask token where
                to draw. A grid larger than the prior's is drawn window after window.
            batch_size: images drawn together; it changes the time, never the images. None for `together`.
            sampling: further fields of UnmaskingScheduler, such as sampler or top_p.

        Returns:
            the images, their tokens and their seeds.

        Raises:
            UserError: a setting is unknown or out of range, or two of them contradict each other.
        """
        num_images = whole_number("num_images", num_images, 1, MOST_IMAGES)
        batch_size = self.together if batch_size is None else batch_size
        batch_size = min(num_images, whole_number("batch_size", batch_size, 1))
        strength = finite_number("strength", strength, 0, 1)
        check_output_type(output_type)
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise UserError(f"callback_on_step_end={shown(callback_on_step_end)} must be a function")
        sampling |= {"temperature": temperature, "guidance_scale": guidance_scale}
        if num_inference_steps is not None:
            sampling["steps"] = num_inference_steps
        labels = image_labels(class_labels, num_images, self.prior.config.num_classes)
        seeds = image_seeds(num_images, seed, generator)
        if init_image is not None:
            if start is not None:
                raise UserError("give init_image or start, not both")
            codes = self.encode(init_image).indices.cpu()  # (1 or num_images, h, w)
            mask = None if mask_image is None else to_mask(mask_image, self.image_size)
            start = codes_to_start_from(codes, mask, strength, seeds, self.prior.mask_token, self.tokenizer.factor)
        elif mask_image is not None:
            raise UserError("mask_image says which part of init_image to redraw, but no init_image was given")
        if start is not None:
            start = checked_tokens("start", start, self.prior.mask_token, num_images)
        images, grids = [], []
        for first in range(0, num_images, batch_size):
            part = slice(first, first + batch_size)
            tokens = self.draw_tokens(
                seeds[part],
                None if labels is None else labels[part],
                None if start is None else start[part],
                callback_on_step_end=callback_on_step_end,
                **sampling,
            )
            grids.append(tokens.cpu())
            images.append(self.decode_tokens(tokens, seeds[part], **sampling).cpu())
        return ImageOutput(as_output(torch.cat(images), output_type), torch.cat(grids), seeds)

    def inpaint(self, image: Pictures, mask: Pictures, num_images: int = 1, **settings: Any) -> ImageOutput:
        """Redraw the light part of ``mask``; every other pixel stays as it was.

        Args:
            image, mask: as ``init_image`` and ``mask_image`` of a call.
            num_images: how many results, if ``image`` is a single one; otherwise there is one for each image.
            settings: further arguments of a call.
        """
        kept, redrawn = to_pixels(image, self.image_size), to_mask(mask, self.image_size)
        num_images = num_images if len(kept) == 1 else len(kept)
        output_type = settings.pop("output_type", "pil")
        check_output_type(output_type)
        output = self(num_images, init_image=kept, mask_image=redrawn, output_type="pt", **settings)
        output.images = as_output(torch.where(redrawn[:, None], output.images, kept), output_type)
        return output

    def outpaint(
        self, image: Pictures, *, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0, **settings: Any
    ) -> ImageOutput:
        """Continue an image beyond its borders.

        Args:
            image: one image; it comes back as the tokenizer reconstructs it.
            left, right, top, bottom: pixels to add on each side, rounded up to whole tokens; an image can only grow,
                by up to MOST_GROWTH times its own size.
            settings: further arguments of a call, such as ``num_images`` (default 1).

        Raises:
            UserError: a number of pixels is out of range.
        """
        most = MOST_GROWTH * self.image_size
        sides = {"left": left, "right": right, "top": top, "bottom": bottom}
        left, right, top, bottom = (
            -(-whole_number(name, pixels, 0, most) // self.tokenizer.factor) for name, pixels in sides.items()
        )
        tokens = self.encode(image).indices[:1].cpu()  # (1, h, w)
        start = torch.nn.functional.pad(tokens, (left, right, top, bottom), value=self.prior.mask_token)
        num_images = whole_number("num_images", settings.pop("num_images", 1), 1, MOST_IMAGES)
        return self(num_images, start=start.expand(num_images, -1, -1), **settings)

    @torch.no_grad()
    def encode(self, images: Pictures) -> Mixture:
        """Images -> z_q, dominant codes, and which codes are mixed with which weights (see ImageTokenizer.encode)."""
        return self.tokenizer.encode(to_float(to_pixels(images, self.image_size).to(self.device)))

    @torch.no_grad()
    def decode(self, z_q: torch.Tensor, output_type: str = "pil") -> Output:
        """Latents (B, F, h, w) -> images of a type as in a call. For codes, use `decode_tokens`.

        Raises:
            UserError: the latents are misshapen, or the type of output is unknown.
            NotFiniteError: a latent is not finite.
        """
        check_output_type(output_type)
        z_q = checked_latents(z_q, self.tokenizer.config.latent_dim).to(self.device)
        return as_output(to_uint8(in_equal_chunks(self.tokenizer.decode, z_q)), output_type)

    def interpolate(self, first: Pictures, second: Pictures, num_images: int = 8, output_type: str = "pil") -> Output:
        """Images on the straight line between the convex latents of two images, both ends included.

        The codebook's hull is convex, so every point on the line is a convex combination of codes as well.

        Raises:
            UserError: ``num_images`` is below 2, for the two ends, or the type of output is unknown.
        """
        check_output_type(output_type)
        num_images = whole_number("num_images", num_images, 2, MOST_IMAGES)
        one, other = (self.encode(picture).z_q[:1] for picture in (first, second))
        weights = torch.linspace(0, 1, num_images, device=one.device)[:, None, None, None]
        return self.decode(torch.lerp(one, other, weights), output_type)

    def draw_tokens(
        self,
        seeds: torch.Tensor,
        labels: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
        *,
        callback_on_step_end: StepCallback | None = None,
        **sampling: float | str | None,
    ) -> torch.Tensor:
        """Draw grids of codes (B, h, w).

        Args:
            seeds: (B,) int64.
            labels: (B,) int64 classes.
            start, callback_on_step_end, sampling: as in a call.

        Raises:
            UserError: as in a call.
        """
        prior, settings = self.prior, self.scheduler.for_length(self.prior.length, **sampling)
        if settings.guidance_scale > 0 and not prior.config.num_classes:
            scale = settings.guidance_scale
            raise UserError(f"guidance_scale={scale}: this prior has no classes to be guided towards; leave it at 0")
        grid = tuple(prior.config.grid)
        if start is None:
            start = torch.full((len(seeds), *grid), prior.mask_token)
        predict = GuidedPrior(
            partial(in_equal_chunks, prior),
            prior.mask_token,
            None if labels is None else labels.to(self.device),
            prior.config.num_classes,
            settings.guidance_scale,
            settings.guidance_schedule,
        )

        def report(step: int, steps: int, tokens: torch.Tensor) -> None:
            if callback_on_step_end is not None:
                callback_on_step_end(self, step - 1, steps - step, {"tokens": tokens})

        def draw(window: torch.Tensor, window_seeds: torch.Tensor, on_step: OnStep) -> torch.Tensor:
            def callback(step: Step) -> None:
                on_step(step.step, step.steps, step.tokens)

            return SAMPLERS[settings.sampler](predict, window, window_seeds, settings, callback)

        return fill(draw, start.to(self.device), grid, prior.mask_token, seeds.to(self.device), report)

    @torch.no_grad()
    def decode_tokens(
        self, tokens: torch.Tensor, seeds: torch.Tensor | None = None, **sampling: float | str | None
    ) -> torch.Tensor:
        """Grids of codes (B, h, w) -> uint8 images (B, 3, H, W).

        Args:
            seeds: (B,) int64, for a refiner that is a flow; by default 0 .. B-1.
            sampling: as in a call.

        Raises:
            UserError: the tokens are misshapen or hold something that is no code, or a setting is out of range.
        """
        settings = self.scheduler.changed(**sampling)
        tokens = checked_tokens("tokens", tokens, self.prior.mask_token - 1).to(self.device)
        if self.refiner is None or not settings.refine:
            return to_uint8(in_equal_chunks(self.tokenizer.decode_indices, tokens))
        seeds = torch.arange(len(tokens)) if seeds is None else seeds

        def decode(part: torch.Tensor, part_seeds: torch.Tensor) -> torch.Tensor:
            return self.tokenizer.decode(self.refiner.refine(part, part_seeds, settings.refiner_steps))

        return to_uint8(in_equal_chunks(decode, tokens, seeds.to(self.device)))

    def preview(self, tokens: torch.Tensor) -> torch.Tensor:
        """Unfinished grids (B, h, w) -> uint8 images (B, 3, H, W), grey where nothing is revealed yet."""
        tokens = checked_tokens("tokens", tokens, self.prior.mask_token)
        hidden = tokens == self.prior.mask_token
        pixels = self.decode_tokens(tokens.masked_fill(hidden, 0), refine=False)
        cells = hidden[:, None].repeat_interleave(self.tokenizer.factor, 2).repeat_interleave(self.tokenizer.factor, 3)
        return pixels.masked_fill(cells.to(pixels.device), 128)

    @property
    def together(self) -> int:
        """How many images are best drawn together: 16, or as many as the device computes together anyway."""
        return max(16, chunk_size(torch.empty(0, *self.prior.config.grid, device=self.device)))

    def stream(self, num_images: int, seed: int = 0, batch_size: int | None = None) -> Iterator[Batch]:
        """Yield images in batches, drawn as they are consumed, for metrics. Classes take turns; image i has seed + i.

        Several processes take turns, too: each draws its own share of the batches.

        Args:
            batch_size: images drawn together; None for `together`.
        """
        classes = self.prior.config.num_classes
        rank, processes = rank_and_world_size()
        batch_size = min(batch_size or self.together, -(-num_images // processes))
        for start in range(rank * batch_size, num_images, processes * batch_size):
            positions = torch.arange(start, min(start + batch_size, num_images))
            labels = (positions % classes).tolist() if classes else None
            drawn = self(len(positions), labels, seed=seed + start, batch_size=batch_size, output_type="pt")
            yield Batch(drawn.images, torch.tensor(labels or [-1] * len(positions)), positions)

    def as_model(self) -> Model:
        """The components of the pipeline."""
        return Model(self.tokenizer, self.prior, self.refiner, self.scheduler)

    def save_pretrained(
        self,
        save_directory: str | Path,
        push_to_hub: bool = False,
        *,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
    ) -> None:
        """Write every component, model_index.json and a model card; the folder appears when it is complete.

        Args:
            push_to_hub: also upload it to ``repo_id`` (by default, the folder's name), see `push_to_hub`.
            safe_serialization: must be True, because weights are only written as safetensors.
            variant: must be None, because a folder holds one set of weights; `scq export` writes a copy in float16.

        Raises:
            UserError: the folder holds anything but a model, the weights were rounded by ``to(dtype)``,
                ``safe_serialization`` is False, or ``variant`` is given. Nothing has been touched by then.
        """
        folder, model = real_path(save_directory), self.as_model()
        if not safe_serialization:
            raise UserError("safe_serialization=False would write weights that can run code when read; leave it out")
        if variant is not None:
            raise UserError(
                f"variant={shown(variant)}: a model's folder holds one set of weights; leave it out, or use "
                "`scq export` for a copy in float16"
            )
        if any(network.dtype != torch.float32 for network in model.networks().values()):
            raise UserError(
                "these weights were rounded to another dtype; load the model in float32 to save it, or use "
                "`scq export` for a copy in float16"
            )
        if self.measured == Measured() and (origin := self.config.get("_name_or_path")):
            # diffusers' own loader does not read what was measured, and the card would lose its numbers and licence.
            self.measured = read_measured(Path(origin))
        save_model(model, folder, self.measured)
        if push_to_hub:
            upload(folder, repo_id or folder.name, private, token)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
        """Upload to the Hugging Face hub with this model's own card, and return the address of the commit.

        Args:
            repo_id: "you/model"; created if it does not exist.
            private: whether a new repository is private; None for the account's default.
            token: of the account; None for the one that is logged in.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder)
            return upload(folder, repo_id, private, token)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        use_safetensors: bool = True,
        **parts: Any,
    ) -> Self:
        """Load the pipeline in ``folder``.

        Args:
            folder: one that ``save_pretrained`` wrote, the run folder of a prior, or the name of a model on the Hugging
                Face hub, as "you/model".
            device: to move it to; None leaves it on the CPU.
            dtype: to compute in, or its name, such as "float16", see `to`; ``torch_dtype`` is its older name.
            token, revision, cache_dir, local_files_only: for a model on the hub: the access token, the version, the
                folder for downloaded copies, and whether to use only those.
            use_safetensors: must be True, because nothing else is read.
            parts: components to use instead of the saved ones, as ``scheduler=UnmaskingScheduler(steps=8)``.

        Raises:
            UserError: there is no pipeline, one of its components cannot be loaded, or ``parts`` names something that
                is not a component.
        """
        if not use_safetensors:
            raise UserError("use_safetensors=False would read files that can run code; leave it out")
        dtype = as_dtype(dtype if dtype is not None else torch_dtype)  # before anything is read
        known = [each.name for each in fields(Model)]
        if unknown := parts.keys() - set(known):
            raise UserError(f"a pipeline has no {', '.join(sorted(unknown))}; its components are {', '.join(known)}")
        access = {"token": token, "revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
        saved, measured = open_model(local_folder(folder, **access))
        model = replace(saved, **parts)
        pipeline = cls(model.tokenizer, model.prior, model.refiner, model.scheduler)
        pipeline.measured = measured
        return pipeline.to(device=device, dtype=dtype)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move to a device, and compute in a dtype, as in any diffusers pipeline: ``to("cuda", torch.bfloat16)``.

        The dtype applies to the prior and the tokenizer's networks, where the work is. Quantizer and refiner stay in
        float32: rounding would undo the convex detail that they exist for.
        """
        dtype = next((each for each in args if isinstance(each, torch.dtype)), kwargs.pop("dtype", None))
        super().to(*(each for each in args if not isinstance(each, torch.dtype)), **kwargs)
        if dtype is not None:
            for network in (self.prior, self.tokenizer):
                nn.Module.to(network, dtype)  # ModelMixin's own would warn of modules kept in float32, which is meant
        return self


# `DiffusionPipeline.from_pretrained(folder)` looks up in diffusers the class that the folder names.
diffusers.SoftConvexPipeline = SoftConvexPipeline


def sample_sheet(tokenizer: ImageTokenizer, prior: MaskedTransformer) -> Image.Image:
    """32 samples of a prior in training, always with the same seeds, classes in turn; for the pictures of its run."""
    # Not `stream`: it divides the images among processes, but only the main process draws these.
    pipeline, classes = SoftConvexPipeline(tokenizer, prior).to(prior.device), prior.config.num_classes
    labels = [i % classes for i in range(32)] if classes else None
    return picture_grid(pipeline(32, labels, seed=0, batch_size=32, output_type="pt").images, columns=8)
