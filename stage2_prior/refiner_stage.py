"""The refiner as a stage: ``scq train refiner --config FILE``, or ``run(RefinerStage(config))``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from scq.data.manifest import Classes, refuse_other_classes
from scq.data.stream import Batch, ImageStream
from scq.engine.accelerators import place, send
from scq.engine.config import DataConfig, LoopConfig, OptimizerConfig, git_revision
from scq.engine.errors import UserError
from scq.engine.measurements import Measured, TrainedFor
from scq.engine.optimizers import create_optimizer
from scq.engine.pictures import picture_grid
from scq.engine.randomness import image_gumbel, image_uniform, standard_normal
from scq.engine.references import shown
from scq.engine.stage import Probe, Task, Terms
from scq.stage1_tokenizer.autoencoder import ImageTokenizer, to_float, to_uint8
from scq.stage1_tokenizer.model_folder import load_tokenizer, save_network
from scq.stage1_tokenizer.stage import PICTURED_IMAGES, ImageStage
from scq.stage2_prior.model import Model
from scq.stage2_prior.model_folder import open_model, save_model
from scq.stage2_prior.refiner import ConvexRefiner, RefinerArchitectureConfig
from scq.stage2_prior.transformer import MaskedTransformer

MEASURED_IMAGES = 512  # on which the spread of latents around their codes is measured, and on which a refiner is scored


@dataclass
class RefinerExperiment:
    """The config of a refiner's training run."""

    out: str = ""  # the run folder
    tokenizer: str = ""  # folder of the tokenizer, which is not trained
    prior: str = ""  # folder of a model with that tokenizer and a prior, which resamples codes; the refiner joins it
    resampled_share: float = 0.0  # the prior resamples up to this share of an image's codes
    # Weight of the squared error of the decoded images, which is added to that of the latents. It is for a regression,
    # whose only aim is the image; a flow must match the distribution of latents, and is trained on latents alone.
    pixel_weight: float = 0.0
    data: DataConfig = field(default_factory=DataConfig)
    architecture: RefinerArchitectureConfig = field(default_factory=RefinerArchitectureConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: LoopConfig = field(default_factory=LoopConfig)


class RefinerTask(Task):
    """One training step of the refiner.

    Args:
        tokenizer: frozen.
        prior: resamples codes (see RefinerExperiment.resampled_share), frozen; None for real codes only.
        measured: (n, 3, H, W) uint8 images on which the spread of latents around their codes is measured.
        held_out: (n, 3, H, W) uint8 images for pictures and `score`.
    """

    def __init__(
        self,
        config: RefinerExperiment,
        accelerator: Accelerator,
        tokenizer: ImageTokenizer,
        prior: MaskedTransformer | None,
        measured: Tensor,
        held_out: Tensor,
    ):
        frozen = {"tokenizer": tokenizer} | ({} if prior is None else {"prior": prior})
        for network in frozen.values():
            place(network, accelerator.device).eval().requires_grad_(False)
        self.tokenizer, self.prior, self.held_out = tokenizer, prior, held_out

        def make() -> ConvexRefiner:
            refiner = build_refiner(config, tokenizer).to(accelerator.device)
            refiner.describe(tokenizer.codes(), self._spread(measured, accelerator.device))
            return refiner

        super().__init__(config, accelerator, make)
        self.frozen = frozen
        pixels = config.architecture.kind == "regression" and config.pixel_weight > 0
        self.score_name = "held_out_mse" if pixels else "unexplained_share"  # what the loss minimises
        refiner = self.modules["model"]
        self.refiner = accelerator.prepare(_LossOfRefiner(refiner, config, tokenizer.decode))
        optimizer = create_optimizer(refiner, config.optimizer, exclude=("embedding",))
        self.optimizers = {"refiner": accelerator.prepare(optimizer)}

    def training_step(self, batch: Batch, step: int) -> Terms:
        def loss_of_part(part: tuple[Tensor, ...]) -> tuple[Tensor, Terms]:
            loss, terms = self.refiner(*part)
            return loss, {"loss": loss, **terms}

        parts = self.in_parts(self._pairs(batch))
        self.refiner.train()
        return self.optimize("refiner", self.refiner, parts, loss_of_part)

    @torch.no_grad()
    def score(self, averaged: ConvexRefiner) -> dict[str, float]:
        """Two errors on held-out images with their real codes: ``unexplained_share``, the squared error of refined
        latents as a share of that of the codes alone, and ``held_out_mse``, the mean squared error of the decoded
        images, with pixels in [0, 1]."""
        error = of_codes = of_images = 0.0
        for number, images in enumerate(self.held_out.split(64)):
            wanted = to_float(images.to(self.accelerator.device))
            found = self.tokenizer.encode(wanted)
            seeds = torch.arange(len(images), device=images.device) + 64 * number
            refined = averaged.refine(found.indices, seeds.to(found.indices.device))
            error += float((refined - found.z_q).square().sum())
            of_codes += float((self.tokenizer.quantizer.lookup(found.indices) - found.z_q).square().sum())
            of_images += float((self.tokenizer.decode(refined) - wanted).square().sum()) / 4  # pixels of range 2 -> 1
        return {
            "unexplained_share": error / max(of_codes, 1e-12),
            "held_out_mse": of_images / self.held_out.numel(),
        }

    @torch.no_grad()
    def picture(self, averaged: ConvexRefiner) -> Image.Image:
        """Rows of originals, and of images decoded from dominant codes, refined codes and z_q."""
        images = self.held_out[:PICTURED_IMAGES].to(self.accelerator.device)
        found = self.tokenizer.encode(to_float(images))
        refined = averaged.refine(found.indices, torch.arange(len(images), device=images.device))
        decoded = [self.tokenizer.decode_indices(found.indices)]
        decoded += [self.tokenizer.decode(latents) for latents in (refined, found.z_q)]
        return picture_grid(torch.cat([images, *map(to_uint8, decoded)]).cpu(), columns=len(images))

    @torch.no_grad()
    def _pairs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes (B, h, w) as a prior might draw them, latents (B, F, h, w), images (B, 3, H, W) in [-1, 1], and
        positions (B,)."""
        device, seed = self.accelerator.device, self.config.training.seed
        pixels, labels, positions = send((batch.images, batch.labels, batch.positions), device)
        images = to_float(pixels)
        found = self.tokenizer.encode(images)
        if self.prior is None or self.config.resampled_share == 0:
            return found.indices, found.z_q, images, positions
        codes = found.indices.flatten(1)  # (B, L)
        share = self.config.resampled_share * image_uniform(positions, seed=seed, purpose="resampled share")
        hidden = image_uniform(positions, codes.shape[1], seed=seed, purpose="resampled places") < share[:, None]
        given = labels if self.prior.config.num_classes else None
        logits = self.prior(torch.where(hidden, self.prior.mask_token, codes), given).float()  # (B, L, K)
        drawn = (logits + image_gumbel(positions, *logits.shape[1:], seed=seed, purpose="resampled codes")).argmax(-1)
        return torch.where(hidden, drawn, codes).view_as(found.indices), found.z_q, images, positions

    @torch.no_grad()
    def _spread(self, images: Tensor, device: torch.device) -> Tensor:
        """The standard deviation (F,) of latents around their codes."""
        differences = []
        for part in images.split(64):
            found = self.tokenizer.encode(to_float(part.to(device)))
            differences.append(found.z_q - self.tokenizer.quantizer.lookup(found.indices))
        spread = torch.cat(differences).square().mean((0, 2, 3)).sqrt()
        if not bool((spread > 0).all()):
            raise UserError(
                "this tokenizer decodes codes alone, not convex combinations, so there is nothing to refine; train one "
                "with quantizer.name=scq"
            )
        return spread


class _LossOfRefiner(nn.Module):
    """Noise and loss in one forward pass, because that is what distributed training wraps.

    Args:
        decode: the frozen tokenizer's, latents to images.
    """

    def __init__(self, refiner: ConvexRefiner, config: RefinerExperiment, decode: Callable[[Tensor], Tensor]):
        super().__init__()
        self.refiner, self.seed = refiner, config.training.seed
        self.pixel_weight, self.decode = config.pixel_weight, decode
        if config.training.compile:
            self.refiner.compile()

    def forward(
        self, indices: Tensor, latents: Tensor, images: Tensor, positions: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.refiner.config.kind == "flow":
            noise = standard_normal(positions, *latents.shape[1:], seed=self.seed, purpose="refiner noise")
            time = image_uniform(positions, seed=self.seed, purpose="refiner time")
            return self.refiner.flow_loss(indices, latents, noise, time), {}
        refined = self.refiner.mean(indices)
        loss = self.refiner.regression_loss(refined, indices, latents)
        if self.pixel_weight == 0:
            return loss, {}
        pixels = F.mse_loss(self.decode(refined), images)
        return loss + self.pixel_weight * pixels, {"latents": loss, "pixels": pixels}


def build_refiner(config: RefinerExperiment, tokenizer: ImageTokenizer) -> ConvexRefiner:
    """The untrained refiner of a config.

    Raises:
        UserError: the config does not describe a refiner.
    """
    try:
        return ConvexRefiner(
            codebook_size=tokenizer.config.codebook_size,
            latent_dim=tokenizer.config.latent_dim,
            **vars(config.architecture),
            tokenizer_fingerprint=tokenizer.fingerprint(),
        )
    except ValueError as error:
        raise UserError(f"architecture: {error}") from error


class RefinerStage(ImageStage):
    """Trains a refiner for a frozen tokenizer, and exports it with the model that it refines.

    Without such a model, the refiner is exported alone.

    Args:
        tokenizer: None for the one in the folder ``config.tokenizer``.
        model: the tokenizer with its prior; None for the one in the folder ``config.prior``, if that is set.

    Raises:
        UserError: no tokenizer is named, the tokenizer or the model cannot be loaded, or a setting is out of range.
    """

    name = "refiner"

    def __init__(self, config: RefinerExperiment, tokenizer: ImageTokenizer | None = None, model: Model | None = None):
        if tokenizer is None and not config.tokenizer:
            raise UserError("tokenizer is empty: name the tokenizer's folder, for example tokenizer=runs/tokenizer")
        self.config, self.known = config, Measured()
        self.tokenizer = load_tokenizer(config.tokenizer) if tokenizer is None else tokenizer
        self.model = model
        if model is None and config.prior:
            self.model, self.known = open_model(config.prior)
        if not 0 <= config.resampled_share <= 1:
            raise UserError(f"resampled_share is {config.resampled_share}; it must be in [0, 1]")
        if config.resampled_share > 0 and self.model is None:
            raise UserError("resampled_share needs a prior: set prior= to the folder that `scq train prior` wrote")
        if config.pixel_weight < 0:
            raise UserError(f"pixel_weight is {config.pixel_weight}; it must be at least 0")

    @property
    def title(self) -> str:
        return f"refiner {self.config.architecture.kind}"

    @property
    def image_size(self) -> int:
        return self.tokenizer.config.image_size

    @property
    def prior(self) -> MaskedTransformer | None:
        """The prior that resamples codes; None if ``resampled_share`` is 0, when no prior affects training."""
        return self.model.prior if self.model is not None and self.config.resampled_share > 0 else None

    def open_stream(self, accelerator: Accelerator) -> ImageStream:
        stream = super().open_stream(accelerator)
        if self.prior is not None and self.prior.config.num_classes:
            refuse_other_classes(
                self.prior.classes(f"the prior {self.config.prior}".strip()),
                Classes(shown(self.config.data.train), stream.num_classes, stream.class_names),
                "train on the data of the prior, or set resampled_share=0",
            )
        return stream

    def build(self, accelerator: Accelerator, probe: Probe | None = None) -> RefinerTask:
        if probe is not None:
            images = probe.batch.images
            return RefinerTask(self.config, accelerator, self.tokenizer, self.prior, images, images)
        data = self.config.data
        measured = _images(data.train, data.max_bad)
        held_out = _images(data.validation) if data.validation else measured
        return RefinerTask(self.config, accelerator, self.tokenizer, self.prior, measured, held_out)

    def export(self, averaged: ConvexRefiner, folder: Path, steps: int) -> None:
        if self.model is None:
            save_network(averaged, folder)
            return
        trained = TrainedFor(steps, steps * self.config.training.batch_size)
        facts = dataclasses.replace(self.known.training, revision=git_revision(), refiner=trained)
        refined = dataclasses.replace(self.model, tokenizer=self.tokenizer, refiner=averaged)
        save_model(refined, folder, Measured(training=facts, license=self.known.license))


def _images(shards: str, max_bad: float = 0.0) -> Tensor:
    """Up to MEASURED_IMAGES images (n, 3, H, W) uint8, always the same ones."""
    stream = ImageStream(shards, batch_size=64, max_bad=max_bad)
    count = min(MEASURED_IMAGES, stream.num_images)
    batches = islice(stream.iterate(), -(-count // 64))
    return torch.cat([batch.images for batch in batches])[:count]
