"""Train a refiner for a frozen tokenizer: ``scq train refiner --config FILE``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from scq.data.stream import Batch, ImageStream
from scq.engine.config import DataConfig, LoopConfig, OptimizerConfig
from scq.engine.dry_run import estimate
from scq.engine.errors import UserError
from scq.engine.fingerprint import fingerprint
from scq.engine.loop import Trained, make_accelerator, train
from scq.engine.optimizers import create_optimizer, in_parts, mean_terms, micro_batches, optimizer_step
from scq.engine.pictures import picture_grid
from scq.engine.progress import say
from scq.engine.randomness import image_gumbel, image_uniform, standard_normal
from scq.engine.tracking import RunFolder
from scq.stage1_tokenizer.autoencoder import ImageTokenizer, to_float, to_uint8
from scq.stage1_tokenizer.train import open_stream, probe_images
from scq.stage2_prior.refiner import ConvexRefiner
from scq.stage2_prior.transformer import MaskedTransformer

MEASURED_IMAGES = 512  # from which the spread of latents around their codes is taken, and on which a refiner is scored


@dataclass
class RefinerArchitectureConfig:
    """See ConvexRefiner."""

    kind: str = "regression"  # regression | flow
    width: int = 192
    depth: int = 8


@dataclass
class RefinerExperiment:
    """Everything that decides a refiner."""

    out: str = ""  # the run folder
    tokenizer: str = ""  # stays as it is
    prior: str = ""  # with resampled_share: draws the codes that stand for a prior's choices
    resampled_share: float = (
        0.0  # of an image's codes, at most, replaced by the prior's guesses; each image its own share
    )
    # Of the squared error of what the decoder makes of refined latents, beside that of the latents. A regression has no
    # other aim than the image; a flow must match the latents' distribution, and is trained on latents alone.
    pixel_weight: float = 0.0
    data: DataConfig = field(default_factory=DataConfig)
    architecture: RefinerArchitectureConfig = field(default_factory=RefinerArchitectureConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: LoopConfig = field(default_factory=LoopConfig)


class RefinerTask:
    """One training step of the refiner (the loop is engine.loop.train).

    Args:
        tokenizer: frozen.
        prior: see RefinerExperiment.resampled_share; None for real codes only.
        held_out: real images, for pictures and `score`.
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
        self.config, self.accelerator = config, accelerator
        pixels = config.architecture.kind == "regression" and config.pixel_weight > 0
        self.score_name = "held_out_mse" if pixels else "unexplained_share"  # as the loss has it
        self.tokenizer = tokenizer.to(accelerator.device).eval().requires_grad_(False)
        self.prior = None if prior is None else prior.to(accelerator.device).eval().requires_grad_(False)
        self.held_out = held_out
        torch.manual_seed(config.training.seed)  # the same initial weights in every process
        refiner = build_refiner(config, tokenizer).to(accelerator.device)
        refiner.describe(*self._around_codes(measured))
        self.average = ModelEmaV3(refiner, decay=config.training.ema_decay, use_warmup=True)
        self.modules: dict[str, nn.Module] = {"model": refiner}
        loss = _LossOfRefiner(refiner, config, self.tokenizer.decode)
        self.refiner = accelerator.prepare(loss)
        self.optimizers = {
            "refiner": accelerator.prepare(create_optimizer(refiner, config.optimizer, exclude=("embedding",)))
        }

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        terms = []
        parts = in_parts(self._pairs(batch), self.config.training)
        self.refiner.train()
        for part in micro_batches(self.accelerator, self.refiner, parts):
            with self.accelerator.autocast():
                loss, found = self.refiner(*part)
            self.accelerator.backward(loss / len(parts))
            terms.append({"loss": loss, **found})
        norm = optimizer_step(
            self.refiner, self.optimizers["refiner"], self.accelerator, self.config.optimizer.clip_norm
        )
        return {**mean_terms(terms), "gradient_norm": norm}

    @torch.no_grad()
    def score(self, averaged: ConvexRefiner) -> dict[str, float]:
        """Of held-out images and their real codes: the squared error of refined latents, as a share of that of the
        codes, and the mean squared error of the images decoded from them, in units of [0, 1]."""
        error = of_codes = of_images = 0.0
        for number, images in enumerate(self.held_out.split(64)):
            wanted = to_float(images.to(self.accelerator.device))
            found = self.tokenizer.encode(wanted)
            seeds = torch.arange(len(images), device=images.device) + 64 * number
            refined = averaged.refine(found.indices, seeds.to(found.indices.device))
            error += float((refined - found.z_q).square().sum())
            of_codes += float((self.tokenizer.quantizer.lookup(found.indices) - found.z_q).square().sum())
            of_images += float((self.tokenizer.decode(refined) - wanted).square().sum()) / 4  # a range of 2 is one of 1
        return {
            "unexplained_share": error / max(of_codes, 1e-12),
            "held_out_mse": of_images / self.held_out.numel(),
        }

    @torch.no_grad()
    def picture(self, averaged: ConvexRefiner) -> Image.Image:
        """Rows of originals, and what is decoded from dominant codes, refined codes, and z_q."""
        images = self.held_out[:12].to(self.accelerator.device)
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
        positions = batch.positions.to(device)
        images = to_float(batch.images.to(device, non_blocking=True))
        found = self.tokenizer.encode(images)
        if self.prior is None or self.config.resampled_share == 0:
            return found.indices, found.z_q, images, positions
        codes = found.indices.flatten(1)  # (B, L)
        share = self.config.resampled_share * image_uniform(positions, seed=seed, purpose="resampled share")
        hidden = image_uniform(positions, codes.shape[1], seed=seed, purpose="resampled places") < share[:, None]
        labels = batch.labels.to(device) if self.prior.config.num_classes else None
        logits = self.prior(torch.where(hidden, self.prior.mask_token, codes), labels).float()  # (B, L, K)
        drawn = (logits + image_gumbel(positions, *logits.shape[1:], seed=seed, purpose="resampled codes")).argmax(-1)
        return torch.where(hidden, drawn, codes).view_as(found.indices), found.z_q, images, positions

    @torch.no_grad()
    def _around_codes(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The tokenizer's codes (K, F), and the standard deviation (F,) of latents around them."""
        quantizer, device = self.tokenizer.quantizer, self.accelerator.device
        codes, differences = self.tokenizer.codes(), []
        for part in images.split(64):
            found = self.tokenizer.encode(to_float(part.to(device)))
            differences.append(found.z_q - quantizer.lookup(found.indices))
        spread = torch.cat(differences).square().mean((0, 2, 3)).sqrt()
        if not bool((spread > 0).all()):
            raise UserError(f"{self.config.tokenizer} decodes its codes alone: there is nothing to refine")
        return codes, spread


class _LossOfRefiner(nn.Module):
    """Noise and loss as one forward pass, which is what distributed training has to wrap.

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
    try:
        return ConvexRefiner(
            codebook_size=tokenizer.config.codebook_size,
            latent_dim=tokenizer.config.latent_dim,
            **vars(config.architecture),
            tokenizer_fingerprint=tokenizer.fingerprint(),
        )
    except ValueError as error:
        raise UserError(f"architecture: {error}") from error


def train_refiner(
    config: RefinerExperiment, tokenizer: ImageTokenizer, prior: MaskedTransformer | None = None
) -> Trained:
    """Train, or go on with, the refiner of ``config``. The caller exports it together with tokenizer and prior.

    Raises:
        UserError, DataError: the config or the shards are unfit, the tokenizer has nothing to refine, the run was
            begun with another tokenizer or prior, or training diverged.
    """
    if not config.out:
        raise UserError("out is empty: say where the run goes, for example out=runs/refiner")
    _check(config, prior)
    accelerator = make_accelerator(config.training)
    stream = open_stream(config.data, config.training, tokenizer.config.image_size, accelerator)
    if config.resampled_share > 0 and prior.config.num_classes not in (0, stream.num_classes):
        raise UserError(
            f"the prior {config.prior} knows {prior.config.num_classes} classes, but {config.data.train} holds "
            f"{stream.num_classes}"
        )
    measured = _images(config.data.train)
    held_out = _images(config.data.validation or config.data.train)
    task = RefinerTask(config, accelerator, tokenizer, prior, measured, held_out)
    run = RunFolder(config.out, config, accelerator)
    if run.is_main:
        size = sum(p.numel() for p in task.modules["model"].parameters()) / 1e6
        say(f"refiner {config.architecture.kind}: {size:.1f}M parameters, {stream.num_images} images, {run.path}")
    title = f"train refiner {config.architecture.kind}"
    frozen = {"tokenizer": tokenizer.fingerprint()}
    if config.resampled_share > 0:  # else the prior has no say in what the refiner learns
        frozen["prior"] = fingerprint(prior)
    return train(task, stream, config.training, config.optimizer, run, accelerator, title, frozen)


def _check(config: RefinerExperiment, prior: MaskedTransformer | None) -> None:
    if not 0 <= config.resampled_share <= 1:
        raise UserError(f"resampled_share is {config.resampled_share}; it must be in [0, 1]")
    if config.resampled_share > 0 and prior is None:
        raise UserError("resampled_share needs a prior: set prior= to the folder that `scq train prior` wrote")
    if config.pixel_weight < 0:
        raise UserError(f"pixel_weight is {config.pixel_weight}; it must be at least 0")


def estimate_refiner(
    config: RefinerExperiment, tokenizer: ImageTokenizer, prior: MaskedTransformer | None = None
) -> list[str]:
    """What `train_refiner` would take, see `engine.dry_run.estimate`; writes nothing, and needs no shards."""
    _check(config, prior)
    accelerator = make_accelerator(config.training)
    probe, images = probe_images(config.data, config.training, tokenizer.config.image_size, accelerator)
    single = dataclasses.replace(config, training=dataclasses.replace(config.training, accumulate=1))
    used = prior if config.resampled_share > 0 else None
    task = RefinerTask(single, accelerator, tokenizer, used, probe.images, probe.images)
    frozen = {"tokenizer": tokenizer} | ({} if used is None else {"prior": used})
    return estimate(task, probe, len(probe.images), images, config.training, accelerator, frozen)


def _images(shards: str) -> Tensor:
    """Up to MEASURED_IMAGES images (n, 3, H, W) uint8, always the same ones."""
    stream = ImageStream(shards, batch_size=64)
    count = min(MEASURED_IMAGES, stream.num_images)
    batches = islice(stream.iterate(), -(-count // 64))
    return torch.cat([batch.images for batch in batches])[:count]
