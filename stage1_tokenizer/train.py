"""Train a tokenizer: ``scq train tokenizer --config FILE``."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from timm.utils import ModelEmaV3
from torch import nn

from data.stream import Batch, ImageStream, iterate_once
from engine.config import DataConfig, LoopConfig, OptimizerConfig
from engine.errors import UserError
from engine.loop import Trained, make_accelerator, train
from engine.optimizers import create_optimizer, optimizer_step
from engine.pictures import picture_grid
from engine.progress import say
from engine.randomness import image_uniform
from engine.tracking import RunFolder
from stage1_tokenizer.autoencoder import ImageTokenizer, to_float, to_uint8
from stage1_tokenizer.losses import LossConfig, TokenizerLoss


@dataclass
class ArchitectureConfig:
    """See ImageTokenizer."""

    image_size: int = 32
    channels: list[int] = field(default_factory=lambda: [64, 128])
    layers_per_block: int = 1
    patch_size: int = 2
    attention: bool = False
    latent_dim: int = 8


@dataclass
class QuantizerConfig:
    name: str = "scq"
    codebook_size: int = 512
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class TokenizerExperiment:
    """Everything that decides a tokenizer."""

    out: str = ""  # the run folder
    data: DataConfig = field(default_factory=DataConfig)
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: LoopConfig = field(default_factory=LoopConfig)


def build_tokenizer(config: TokenizerExperiment) -> ImageTokenizer:
    try:
        return ImageTokenizer(
            **vars(config.architecture),
            codebook_size=config.quantizer.codebook_size,
            quantizer_name=config.quantizer.name,
            quantizer_options=config.quantizer.options,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"the config does not describe a tokenizer: {error}") from error


class TokenizerTask:
    """One training step of autoencoder and discriminator (the loop is engine.loop.train)."""

    def __init__(self, config: TokenizerExperiment, accelerator: Accelerator, pictured: torch.Tensor):
        self.config, self.accelerator = config, accelerator
        torch.manual_seed(config.training.seed)  # the same initial weights in every process
        tokenizer = build_tokenizer(config).to(accelerator.device)
        self.average = ModelEmaV3(tokenizer, decay=config.training.ema_decay, use_warmup=True)
        self.losses = TokenizerLoss(config.loss).to(accelerator.device)
        discriminator = self.losses.discriminator
        self.modules: dict[str, nn.Module] = {"model": tokenizer}
        self.optimizers = {"autoencoder": create_optimizer(tokenizer, config.optimizer, exclude=("quantizer",))}
        if discriminator is not None:
            self.modules["discriminator"] = discriminator
            self.optimizers["discriminator"] = create_optimizer(discriminator, config.optimizer)
        self.tokenizer = accelerator.prepare(torch.compile(tokenizer) if config.training.compile else tokenizer)
        self.discriminator = accelerator.prepare(discriminator) if discriminator is not None else None
        for name, optimizer in self.optimizers.items():
            self.optimizers[name] = accelerator.prepare(optimizer)
        self.pictured = pictured

    def training_step(self, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        config, accelerator = self.config, self.accelerator
        images = to_float(batch.images.to(accelerator.device, non_blocking=True))
        positions = batch.positions.to(accelerator.device)
        noise = image_uniform(positions, seed=config.training.seed, purpose="quantizer")

        self.tokenizer.train()
        with accelerator.autocast():
            reconstruction, quantized = self.tokenizer(images, noise)
            loss, terms = self.losses.generator(images, reconstruction, self.modules["model"].last_layer, step)
        terms |= {"quantizer": quantized.loss, **quantized.stats}
        loss = loss + quantized.loss
        terms["gradient_norm"] = optimizer_step(
            loss, self.tokenizer, self.optimizers["autoencoder"], accelerator, config.optimizer.clip_norm
        )
        if self.losses.trains_discriminator(step):
            with accelerator.autocast():
                both = torch.cat([images, reconstruction.detach().float()])
                real_logits, fake_logits = self.discriminator(both).chunk(2)
                verdict = self.losses.discriminator_loss(real_logits, fake_logits)
            optimizer = self.optimizers["discriminator"]
            optimizer_step(verdict, self.discriminator, optimizer, accelerator, config.optimizer.clip_norm)
            terms["discriminator"] = verdict
        return {"loss": loss, **terms}

    @torch.no_grad()
    def picture(self, averaged: ImageTokenizer) -> Image.Image:
        """Rows of originals, reconstructions from z_q, and reconstructions from the dominant codes alone."""
        images = self.pictured.to(averaged.device)
        encoding = averaged.encode(to_float(images))
        soft, dominant = averaged.decode(encoding.z_q), averaged.decode_indices(encoding.indices)
        return picture_grid(torch.cat([images, to_uint8(soft), to_uint8(dominant)]).cpu(), columns=len(images))


def train_tokenizer(config: TokenizerExperiment) -> Trained:
    """Train, or go on with, the tokenizer of ``config`` and export it to ``out/model``.

    Raises:
        UserError, DataError: the config or the shards are unfit, or training diverged.
    """
    if not config.out:
        raise UserError("out is empty: say where the run goes, for example out=runs/tokenizer")
    accelerator = make_accelerator(config.training)
    stream = ImageStream(
        config.data.train,
        batch_size=config.training.batch_size,
        seed=config.training.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        workers=config.data.workers,
        flip=config.data.flip,
        cache=config.data.cache or None,
    )
    if stream.image_size != config.architecture.image_size:
        raise UserError(
            f"{config.data.train} holds images of {stream.image_size} pixels, architecture.image_size is "
            f"{config.architecture.image_size}; pack the images again with --size, or change the config"
        )
    pictured = next(iterate_once(config.data.validation or config.data.train, batch_size=12)).images
    task = TokenizerTask(config, accelerator, pictured)
    run = RunFolder(config.out, config, accelerator)
    if run.is_main:
        size = sum(p.numel() for p in task.modules["model"].parameters()) / 1e6
        say(f"tokenizer {config.quantizer.name}: {size:.1f}M parameters, {stream.num_images} images, {run.path}")
        say(stream.order_description)
    title = f"train tokenizer {config.quantizer.name}"
    trained = train(task, stream, config.training, config.optimizer, run, accelerator, title)
    if run.is_main:
        export(trained.averaged, run.model)
    accelerator.wait_for_everyone()
    return trained


def export(model: ImageTokenizer, folder: Path) -> None:
    """Save a diffusers model so that ``folder`` is never seen half-written."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def load_tokenizer(path: Path | str) -> ImageTokenizer:
    """The tokenizer in ``path``: an exported one, a pipeline's folder, or a run's.

    Raises:
        UserError: nothing there is a tokenizer.
    """
    path = Path(path)
    for folder in (path, path / "tokenizer", path / "model", path / "model" / "tokenizer"):
        if (folder / "diffusion_pytorch_model.safetensors").is_file():
            try:
                return ImageTokenizer.from_pretrained(folder, local_files_only=True).eval()
            except (OSError, ValueError, RuntimeError, TypeError) as error:
                raise UserError(f"{folder} cannot be loaded as a tokenizer: {str(error).splitlines()[0]}") from error
    raise UserError(f"no tokenizer in {path}: expected a folder that `scq train tokenizer` or `scq train prior` wrote")
