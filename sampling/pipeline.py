"""Both stages as one diffusers pipeline: ``SoftConvexPipeline.from_pretrained(folder)(num_images=16)``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image

from engine.config import write_atomically
from engine.errors import UserError
from sampling.samplers import SAMPLERS, SamplerSettings, Step, guided
from stage1_tokenizer.autoencoder import ImageTokenizer, to_uint8
from stage1_tokenizer.train import load_tokenizer
from stage2_prior.refiner import ConvexRefiner
from stage2_prior.transformer import MaskedTransformer

# Images computed together: enough to keep the device busy, few enough that filling up the last chunk costs little.
CHUNK = {"cpu": 8, "cuda": 64}


@dataclass
class SamplingConfig(SamplerSettings):
    """How images are drawn; saved with the model as its defaults."""

    sampler: str = "maskgit"  # one of sampling.samplers.SAMPLERS
    guidance_scale: float = 0.0  # for a class-conditional prior; 0 is the plain conditional
    guidance_schedule: str = "constant"  # constant | linear
    refine: bool = True  # give the convex detail back, where the model has a refiner
    refiner_steps: int = 8  # of a flow; >= 1


@dataclass
class ImageOutput(BaseOutput):
    """images: PIL images or a uint8 tensor (N, 3, H, W); tokens: (N, h, w) int64."""

    images: list[Image.Image] | torch.Tensor
    tokens: torch.Tensor


class SoftConvexPipeline(DiffusionPipeline):
    """Draws images: the prior fills a grid of dominant codes, a refiner turns them into latents, the tokenizer decodes.

    Args:
        tokenizer: of stage 1.
        prior: of stage 2, trained on the codes of that very tokenizer.
        refiner: likewise, or None: dominant codes are decoded as they are.

    Raises:
        UserError: prior or refiner belongs to another tokenizer.
    """

    _optional_components = ["refiner"]  # noqa: RUF012, diffusers reads a list

    def __init__(self, tokenizer: ImageTokenizer, prior: MaskedTransformer, refiner: ConvexRefiner | None = None):
        super().__init__()
        found = tokenizer.fingerprint()
        for name, part in (("prior", prior), ("refiner", refiner)):
            wanted = part.config.tokenizer_fingerprint if part is not None else ""
            if wanted and wanted != found:
                raise UserError(
                    f"the {name} was trained on tokens of tokenizer {wanted}, but this is tokenizer {found}"
                )
        self.register_modules(
            tokenizer=tokenizer.eval(), prior=prior.eval(), refiner=None if refiner is None else refiner.eval()
        )
        self.sampling = SamplingConfig()

    @torch.no_grad()
    def __call__(
        self,
        num_images: int = 16,
        seed: int = 0,
        class_labels: list[int] | None = None,
        start: torch.Tensor | None = None,
        batch_size: int = 16,
        output_type: str = "pil",
        callback: Callable[[Step], None] | None = None,
        **sampling: float | str | None,
    ) -> ImageOutput:
        """Draw images.

        Args:
            num_images: how many.
            seed: of the first image; image i has seed + i, so any of them can be drawn again alone.
            class_labels: one for each image, for a class-conditional prior.
            start: (num_images, h, w) int64, codes to keep, and the prior's mask token where to draw; None: draw all.
            batch_size: images drawn together; changes the time, never the images.
            output_type: ``pil`` or ``pt`` (uint8).
            callback: called after each step of each batch.
            sampling: fields of SamplingConfig, such as steps or temperature; those left out, or None, are the model's.

        Raises:
            ValueError: a setting is unknown or out of range.
        """
        if num_images < 1 or batch_size < 1:
            raise ValueError(f"num_images={num_images} and batch_size={batch_size} must be at least 1")
        labels = self._labels(class_labels, num_images)
        images, grids = [], []
        if start is not None and start.shape != (num_images, *self.prior.config.grid):
            wanted = (num_images, *self.prior.config.grid)
            raise ValueError(f"start must be {wanted}, a grid for each image, not {tuple(start.shape)}")
        for first in range(0, num_images, batch_size):
            stop = min(first + batch_size, num_images)
            seeds = torch.arange(seed + first, seed + stop)
            tokens = self.draw_tokens(
                seeds,
                None if labels is None else labels[first:stop],
                None if start is None else start[first:stop],
                callback=callback,
                **sampling,
            )
            grids.append(tokens.cpu())
            images.append(self.decode_tokens(tokens, seeds, **sampling).cpu())
        pixels = torch.cat(images)
        shown = pixels if output_type == "pt" else [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
        return ImageOutput(images=shown, tokens=torch.cat(grids))

    def draw_tokens(
        self,
        seeds: torch.Tensor,
        labels: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
        *,
        callback: Callable[[Step], None] | None = None,
        **sampling: float | str | None,
    ) -> torch.Tensor:
        """Grids of codes (B, h, w) for these seeds (B,); labels (B,), start (B, h, w) and sampling as in a call."""
        prior, settings = self.prior, self._settings(sampling)
        if start is None:
            start = torch.full((len(seeds), prior.length), prior.mask_token)
        predict = guided(
            partial(in_equal_chunks, prior),
            None if labels is None else labels.to(self.device),
            settings.guidance_scale,
            prior.config.num_classes,
            settings.guidance_schedule,
        )
        tokens = SAMPLERS[settings.sampler](
            predict,
            start.flatten(1).to(self.device),
            seeds.to(self.device),
            prior.mask_token,
            tuple(prior.config.grid),
            settings,
            callback,
        )
        return tokens.view(-1, *prior.config.grid)

    def _settings(self, overrides: dict[str, float | str | None]) -> SamplingConfig:
        known = [field.name for field in fields(SamplingConfig)]
        unknown = sorted(set(overrides) - set(known))
        if unknown:
            raise ValueError(f"sampling has no setting {unknown[0]!r}; it has: {', '.join(known)}")
        settings = SamplingConfig(**{**asdict(self.sampling), **{k: v for k, v in overrides.items() if v is not None}})
        if settings.refiner_steps < 1:
            raise ValueError(f"refiner_steps={settings.refiner_steps} must be at least 1")
        if settings.sampler not in SAMPLERS:
            raise ValueError(f"sampler {settings.sampler!r} does not exist; choose {', '.join(SAMPLERS)}")
        return settings

    @torch.no_grad()
    def decode_tokens(
        self, tokens: torch.Tensor, seeds: torch.Tensor | None = None, **sampling: float | str | None
    ) -> torch.Tensor:
        """Grids of codes (B, h, w) -> uint8 images (B, 3, H, W); seeds (B,) are a flow's, by default 0 .. B-1."""
        settings, tokens = self._settings(sampling), tokens.to(self.device)
        if self.refiner is None or not settings.refine:
            return to_uint8(in_equal_chunks(self.tokenizer.decode_indices, tokens))
        seeds = torch.arange(len(tokens)) if seeds is None else seeds

        def decode(part: torch.Tensor, part_seeds: torch.Tensor) -> torch.Tensor:
            return self.tokenizer.decode(self.refiner.refine(part, part_seeds, settings.refiner_steps))

        return to_uint8(in_equal_chunks(decode, tokens, seeds.to(self.device)))

    def stream(self, num_images: int, seed: int = 0, batch_size: int = 16) -> Iterator[torch.Tensor]:
        """Images as uint8 batches (b, 3, H, W), drawn as they are consumed: what metrics want. Classes take turns."""
        classes = self.prior.config.num_classes
        for start in range(0, num_images, batch_size):
            count = min(batch_size, num_images - start)
            labels = [i % classes for i in range(start, start + count)] if classes else None
            yield self(count, seed + start, class_labels=labels, batch_size=batch_size, output_type="pt").images

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Write every component, model_index.json and sampling.json; the folder appears when it is complete."""
        folder = Path(save_directory)
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        super().save_pretrained(temporary, **kwargs)
        write_atomically(temporary / "sampling.json", json.dumps(asdict(self.sampling), indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device | None = None) -> SoftConvexPipeline:
        """The pipeline in ``folder``: one that ``save_pretrained`` wrote, or a run folder of a prior.

        Raises:
            UserError: nothing there is a pipeline, or a part of it cannot be loaded.
        """
        root = _root(Path(folder))
        if root is None:
            raise UserError(
                f"no model in {folder}: expected a folder that `scq train prior` or `scq quickstart` wrote "
                "(with model_index.json)"
            )
        tokenizer = load_tokenizer(root / "tokenizer")
        try:
            prior = MaskedTransformer.from_pretrained(root / "prior", local_files_only=True)
            refined = (root / "refiner").is_dir()
            refiner = ConvexRefiner.from_pretrained(root / "refiner", local_files_only=True) if refined else None
            saved = json.loads((root / "sampling.json").read_text())
            sampling = SamplingConfig(**saved)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(f"{root} cannot be loaded: {str(error).splitlines()[0]}") from error
        pipeline = cls(tokenizer, prior, refiner)
        pipeline.sampling = sampling
        return pipeline.to(device) if device is not None else pipeline

    def _labels(self, class_labels: list[int] | None, num_images: int) -> torch.Tensor | None:
        classes = self.prior.config.num_classes
        if class_labels is None:
            return None
        if not classes:
            raise ValueError("class_labels were given, but this prior was trained without classes")
        if len(class_labels) != num_images:
            raise ValueError(f"{len(class_labels)} class_labels for {num_images} images; give one for each")
        bad = [label for label in class_labels if not 0 <= label < classes]
        if bad:
            raise ValueError(f"class label {bad[0]} is not one of the {classes} classes 0 .. {classes - 1}")
        return torch.tensor(class_labels)


def in_equal_chunks(
    network: Callable[..., torch.Tensor], inputs: torch.Tensor, others: torch.Tensor | None = None
) -> torch.Tensor:
    """``network(inputs)`` or ``network(inputs, others)``, computed for a fixed number of images at a time.

    Matrix products of different sizes add in different orders. With chunks of one size, the last one filled up, an
    image's pixels are the same to the last bit whatever was asked for together with it.
    """
    chunk = CHUNK.get(inputs.device.type, CHUNK["cuda"])
    outputs = []
    for start in range(0, len(inputs), chunk):
        given = [x[start : start + chunk] for x in (inputs, others) if x is not None]
        count = len(given[0])
        filled = [torch.cat([x, x[-1:].expand(chunk - count, *x.shape[1:])]) for x in given]
        outputs.append(network(*filled)[:count])
    return torch.cat(outputs)


def is_pipeline(folder: str | Path) -> bool:
    """Whether ``folder`` holds both stages, rather than a tokenizer alone."""
    return _root(Path(folder)) is not None


def _root(folder: Path) -> Path | None:
    return next((root for root in (folder, folder / "model") if (root / "model_index.json").is_file()), None)
