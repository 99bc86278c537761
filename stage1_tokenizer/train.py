"""Train a tokenizer: ``scq train tokenizer --config FILE``."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from safetensors.torch import load_model
from timm.utils import ModelEmaV3
from torch import nn

from scq.data.shards import MANIFEST
from scq.data.stream import Batch, ImageStream, iterate_once
from scq.engine.config import DataConfig, LoopConfig, OptimizerConfig
from scq.engine.dry_run import PROBED_IMAGES, estimate
from scq.engine.errors import UserError
from scq.engine.files import replaced_model
from scq.engine.loop import Trained, make_accelerator, train
from scq.engine.optimizers import create_optimizer, in_parts, mean_terms, micro_batches, optimizer_step
from scq.engine.pictures import picture_grid
from scq.engine.progress import say
from scq.engine.randomness import image_uniform
from scq.engine.tracking import RunFolder
from scq.stage1_tokenizer.autoencoder import ImageTokenizer, to_float, to_uint8
from scq.stage1_tokenizer.losses import LossConfig, TokenizerLoss
from scq.stage1_tokenizer.robustness import NeighbourSwap, RobustnessConfig, swapped_share


@dataclass
class ArchitectureConfig:
    """See ImageTokenizer."""

    image_size: int = 32
    channels: list[int] = field(default_factory=lambda: [64, 128])
    layers_per_block: int = 1
    patch_size: int = 2
    attention: bool = False
    latent_dim: int = 8
    neck_width: int = 192
    neck_depth: int = 0


@dataclass
class QuantizerConfig:
    name: str = "scq"
    codebook_size: int = 512
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class ScoreConfig:
    images: int = 0  # of data.validation, for the rFID of every checkpoint; the best is exported to best/. 0 for none
    inception_weights: str = ""  # as --inception-weights of scq evaluate


@dataclass
class TokenizerExperiment:
    """Everything that decides a tokenizer."""

    out: str = ""  # the run folder
    data: DataConfig = field(default_factory=DataConfig)
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    robustness: RobustnessConfig = field(default_factory=RobustnessConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: LoopConfig = field(default_factory=LoopConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)


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


class _Part(NamedTuple):
    """Images of one micro-batch, and each one's own randomness."""

    images: torch.Tensor  # (b, 3, H, W) in [-1, 1]
    quantizer: torch.Tensor  # (b,)
    augmentation: torch.Tensor  # (b, 7)
    swap: torch.Tensor  # (b, 2, h, w)


class TokenizerTask:
    """One training step of autoencoder and discriminator (the loop is engine.loop.train).

    Args:
        pictured: (n, 3, H, W) uint8 images for the run's pictures.
        measure: rFID of averaged weights; None for no score.
    """

    score_name = "rfid"

    def __init__(
        self,
        config: TokenizerExperiment,
        accelerator: Accelerator,
        pictured: torch.Tensor,
        measure: Callable[[ImageTokenizer], float] | None = None,
    ):
        self.config, self.accelerator, self.pictured, self.measure = config, accelerator, pictured, measure
        swapped_share(0, config.robustness)  # refuses what is out of range now rather than at the first step
        torch.manual_seed(config.training.seed)  # the same initial weights in every process
        tokenizer = build_tokenizer(config).to(accelerator.device)
        if config.training.gradient_checkpointing:
            tokenizer.enable_gradient_checkpointing()
        self.average = ModelEmaV3(tokenizer, decay=config.training.ema_decay, use_warmup=True)
        parts = config.training.accumulate
        self.losses = TokenizerLoss(config.loss, parts, config.architecture.image_size).to(accelerator.device)
        discriminator = self.losses.discriminator
        self.modules: dict[str, nn.Module] = {"model": tokenizer, **self.losses.stateful}
        tokenizer.quantizer.parts_per_step = parts
        self.optimizers = {"autoencoder": create_optimizer(tokenizer, config.optimizer, exclude=("quantizer",))}
        if discriminator is not None:
            self.optimizers["discriminator"] = create_optimizer(discriminator, config.optimizer)
        self.tokenizer = accelerator.prepare(_compiled(tokenizer) if config.training.compile else tokenizer)
        self.discriminator = accelerator.prepare(discriminator) if discriminator is not None else None
        for name, optimizer in self.optimizers.items():
            self.optimizers[name] = accelerator.prepare(optimizer)

    def training_step(self, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        config, accelerator = self.config, self.accelerator
        parts, reconstructions, terms = self._parts(batch), [], []
        share, neighbours = swapped_share(step, config.robustness), config.robustness.neighbours

        self.tokenizer.train()
        for part in micro_batches(accelerator, self.tokenizer, parts):
            with accelerator.autocast():
                swap = NeighbourSwap(share, neighbours, part.swap) if share > 0 else None
                reconstruction, quantized = self.tokenizer(part.images, part.quantizer, swap)
                loss, found = self.losses.generator(
                    part.images, reconstruction, self.modules["model"].last_layer, step, part.augmentation
                )
            loss = loss + quantized.loss
            accelerator.backward(loss / len(parts))
            reconstructions.append(reconstruction.detach())
            terms.append({"loss": loss, **found, "quantizer": quantized.loss, **quantized.stats})
        logged = mean_terms(terms)
        logged["gradient_norm"] = optimizer_step(
            self.tokenizer, self.optimizers["autoencoder"], accelerator, config.optimizer.clip_norm
        )
        if self.losses.trains_discriminator(step):
            logged |= self._discriminator_step(parts, reconstructions, step)
        return logged

    def _discriminator_step(
        self, parts: list[_Part], reconstructions: list[torch.Tensor], step: int
    ) -> dict[str, torch.Tensor]:
        accelerator, terms = self.accelerator, []
        pairs = list(zip(parts, reconstructions, strict=True))
        for part, reconstruction in micro_batches(accelerator, self.discriminator, pairs):
            with accelerator.autocast():
                loss, found = self.losses.discriminate(
                    self.discriminator, part.images, reconstruction, step, part.augmentation
                )
            accelerator.backward(loss / len(parts))
            terms.append(found)
        optimizer_step(
            self.discriminator, self.optimizers["discriminator"], accelerator, self.config.optimizer.clip_norm
        )
        return mean_terms(terms)

    def _parts(self, batch: Batch) -> list[_Part]:
        """A process's share of a batch, divided into micro-batches."""
        seed, device = self.config.training.seed, self.accelerator.device
        positions = batch.positions.to(device)
        grid = self.modules["model"].grid
        whole = _Part(
            to_float(batch.images.to(device, non_blocking=True)),
            image_uniform(positions, seed=seed, purpose="quantizer"),
            image_uniform(positions, 7, seed=seed, purpose="augmentation"),
            image_uniform(positions, 2, *grid, seed=seed, purpose="neighbour swap"),
        )
        return [_Part(*part) for part in in_parts(whole, self.config.training)]

    @torch.no_grad()
    def picture(self, averaged: ImageTokenizer) -> Image.Image:
        """Rows of originals, reconstructions from z_q, and reconstructions from the dominant codes alone."""
        images = self.pictured.to(averaged.device)
        encoding = averaged.encode(to_float(images))
        rows = [images, to_uint8(averaged.decode(encoding.z_q))]
        if averaged.quantizer.has_codes:
            rows.append(to_uint8(averaged.decode_indices(encoding.indices)))
        return picture_grid(torch.cat(rows).cpu(), columns=len(images))

    def score(self, averaged: ImageTokenizer) -> dict[str, float] | None:
        return None if self.measure is None else {self.score_name: self.measure(averaged)}


def _compiled(tokenizer: ImageTokenizer) -> nn.Module:
    """``tokenizer`` with encoder and decoder compiled at their first use."""
    # A compiled backward pass may overwrite what was saved for it, and refuses to be run twice; VQGAN's adaptive weight
    # runs the decoder's three times a step. The setting is read whenever something is compiled, hence global.
    torch._functorch.config.donated_buffer = False
    # Quantizers and swaps choose shapes and branches by the data, which splits a graph into dozens that are compiled
    # again and again; and SCQ's solver on a CPU is numba's, which torch's tracer trips over.
    tokenizer.quantize = torch.compiler.disable(tokenizer.quantize)
    return torch.compile(tokenizer)


def train_tokenizer(config: TokenizerExperiment, measure: Callable[[ImageTokenizer], float] | None = None) -> Trained:
    """Train, or go on with, the tokenizer of ``config`` and export it to ``out/model``.

    Args:
        measure: scores the averaged weights at every checkpoint, the lower the better; the best ones are exported to
            ``out/best``.

    Raises:
        UserError, DataError: the config or the shards are unfit, or training diverged.
    """
    if not config.out:
        raise UserError("out is empty: say where the run goes, for example out=runs/tokenizer")
    accelerator = make_accelerator(config.training)
    stream = open_stream(config.data, config.training, config.architecture.image_size, accelerator)
    pictured = next(iterate_once(config.data.validation or config.data.train, batch_size=12)).images
    task = TokenizerTask(config, accelerator, pictured, measure)
    run = RunFolder(config.out, config, accelerator)
    if run.is_main:
        size = sum(p.numel() for p in task.modules["model"].parameters()) / 1e6
        say(f"tokenizer {config.quantizer.name}: {size:.1f}M parameters, {stream.num_images} images, {run.path}")
        say(stream.order_description)
    title = f"train tokenizer {config.quantizer.name}"
    trained = train(task, stream, config.training, config.optimizer, run, accelerator, title)
    if run.is_main:
        export(trained.averaged, run.model)
        if trained.best is not None:
            best = copy.deepcopy(trained.averaged)
            load_model(best, str(trained.best / "ema.safetensors"))
            export(best, run.path / "best")
    accelerator.wait_for_everyone()
    return trained


def estimate_tokenizer(config: TokenizerExperiment) -> list[str]:
    """What `train_tokenizer` would take, see `engine.dry_run.estimate`; writes nothing, and needs no shards."""
    accelerator = make_accelerator(config.training)
    probe, images = probe_images(config.data, config.training, config.architecture.image_size, accelerator)
    single = dataclasses.replace(config, training=dataclasses.replace(config.training, accumulate=1))
    task = TokenizerTask(single, accelerator, probe.images)
    perceptual = task.losses.perceptual
    frozen = {} if perceptual is None else {"VGG16": perceptual}
    last = config.training.steps - 1
    heaviest = last - last % config.loss.r1_every if config.loss.r1 > 0 else last
    return estimate(task, probe, len(probe.images), images, config.training, accelerator, frozen, heaviest)


def probe_images(
    data: DataConfig, training: LoopConfig, image_size: int, accelerator: Accelerator
) -> tuple[Batch, int | None]:
    """A few training images and how many there are; where the shards are not at hand, noise and None."""
    if (Path(data.train) / MANIFEST).is_file():
        stream = open_stream(data, training, image_size, accelerator)
        return Batch(*(field[:PROBED_IMAGES] for field in next(iter(stream)))), stream.num_images
    pixels = torch.randint(0, 256, (PROBED_IMAGES, 3, image_size, image_size), dtype=torch.uint8)
    return Batch(pixels, torch.zeros(PROBED_IMAGES, dtype=torch.int64), torch.arange(PROBED_IMAGES)), None


def open_stream(data: DataConfig, training: LoopConfig, image_size: int, accelerator: Accelerator) -> ImageStream:
    """This process's share of the training images; UserError if they are not of ``image_size`` pixels."""
    stream = ImageStream(
        data.train,
        batch_size=training.batch_size,
        seed=training.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        workers=data.workers,
        flip=data.flip,
        shuffle="blocks" if data.shuffle == "blocks" else True,
        cache=data.cache or None,
    )
    if stream.image_size != image_size:
        raise UserError(
            f"{data.train} holds images of {stream.image_size} pixels, architecture.image_size is "
            f"{image_size}; pack the images again with --size, or change the config"
        )
    return stream


def export(model: ModelMixin, folder: Path) -> None:
    """Save a diffusers model so that ``folder`` is never seen half-written.

    Raises:
        UserError: ``folder`` holds anything but a model.
    """
    # A refiner's run ends in a pipeline where it was told of a prior, and in a refiner alone where not.
    with replaced_model(folder, {type(model).__name__, "SoftConvexPipeline"}) as fresh:
        model.save_pretrained(fresh)


def load_tokenizer(path: Path | str) -> ImageTokenizer:
    """The tokenizer in ``path``: an exported one, a pipeline's folder, or a run's.

    Raises:
        UserError: nothing there is a tokenizer.
    """
    path = Path(path)
    for folder in (path, path / "tokenizer", path / "model", path / "model" / "tokenizer"):
        if (folder / "diffusion_pytorch_model.safetensors").is_file():
            try:
                return ImageTokenizer.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
            except (OSError, ValueError, RuntimeError, TypeError) as error:
                raise UserError(f"{folder} cannot be loaded as a tokenizer: {str(error).splitlines()[0]}") from error
    raise UserError(f"no tokenizer in {path}: expected a folder that `scq train tokenizer` or `scq train prior` wrote")
