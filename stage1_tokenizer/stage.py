"""The tokenizer as a stage: ``scq train tokenizer --config FILE``, or ``run(TokenizerStage(config))``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from scq.data.shards import MANIFEST
from scq.data.stream import Batch, ImageStream, iterate_once
from scq.engine.accelerators import place, send
from scq.engine.config import DataConfig, LoopConfig, OptimizerConfig, git_revision
from scq.engine.errors import UserError
from scq.engine.measurements import Measured, TrainedFor, TrainingFacts
from scq.engine.optimizers import create_optimizer
from scq.engine.pictures import picture_grid
from scq.engine.randomness import image_uniform
from scq.engine.references import shown
from scq.engine.stage import PROBED_IMAGES, Probe, Stage, Task, Terms
from scq.stage1_tokenizer.autoencoder import ArchitectureConfig, ImageTokenizer, QuantizerConfig, to_float, to_uint8
from scq.stage1_tokenizer.losses import LossConfig, Shown, TokenizerLoss
from scq.stage1_tokenizer.model_folder import save_network
from scq.stage1_tokenizer.robustness import NeighbourSwap, RobustnessConfig, swapped_share

PICTURED_IMAGES = 12  # images in each picture of a run


@dataclass
class ScoreConfig:
    """How checkpoints are scored; the one with the lowest rFID is exported to ``best/``."""

    images: int = 0  # images of data.validation to compute the rFID of every checkpoint on; 0 for no score
    inception_weights: str = ""  # as --inception-weights of scq evaluate


@dataclass
class TokenizerExperiment:
    """The config of a tokenizer's training run."""

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
    """The untrained tokenizer of a config.

    Raises:
        UserError: the config does not describe a tokenizer.
    """
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


class TokenizerTask(Task):
    """One training step of autoencoder and discriminator.

    Args:
        pictured: (n, 3, H, W) uint8 images for the run's pictures.
        measure: scores averaged weights, lower is better; None for no score.
    """

    score_name = "rfid"

    def __init__(
        self,
        config: TokenizerExperiment,
        accelerator: Accelerator,
        pictured: Tensor,
        measure: Callable[[ImageTokenizer], float] | None = None,
    ):
        swapped_share(0, config.robustness)  # refuses values out of range now, not at the first step
        super().__init__(config, accelerator, lambda: build_tokenizer(config))
        self.pictured, self.measure = pictured, measure
        tokenizer, parts = self.modules["model"], config.training.accumulate
        tokenizer.quantizer.parts_per_step = parts
        self.losses = place(TokenizerLoss(config.loss, parts, config.architecture.image_size), accelerator.device)
        self.modules |= self.losses.stateful
        self.frozen = {} if self.losses.perceptual is None else {"VGG16": self.losses.perceptual}
        discriminator = self.losses.discriminator
        self.optimizers = {"autoencoder": create_optimizer(tokenizer, config.optimizer, exclude=("quantizer",))}
        if discriminator is not None:
            self.optimizers["discriminator"] = create_optimizer(discriminator, _of_discriminator(config))
        self.tokenizer = accelerator.prepare(_compiled(tokenizer) if config.training.compile else tokenizer)
        if discriminator is not None and config.training.compile and config.loss.r1 == 0:
            discriminator.compile()  # but torch compiles no gradient of a gradient, which R1 needs
        self.discriminator = accelerator.prepare(discriminator) if discriminator is not None else None
        for name, optimizer in self.optimizers.items():
            self.optimizers[name] = accelerator.prepare(optimizer)

    def training_step(self, batch: Batch, step: int) -> Terms:
        parts, shown = self._parts(batch), []
        share, neighbours = swapped_share(step, self.config.robustness), self.config.robustness.neighbours

        def loss_of_autoencoder(part: _Part) -> tuple[Tensor, Terms]:
            swap = NeighbourSwap(share, neighbours, part.swap) if share > 0 else None
            reconstruction, quantized = self.tokenizer(part.images, part.quantizer, swap)
            last_layer = self.modules["model"].last_layer
            loss, terms, seen = self.losses.generator(part.images, reconstruction, last_layer, step, part.augmentation)
            shown.append(seen)
            loss = loss + quantized.loss
            return loss, {"loss": loss, **terms, "quantizer": quantized.loss, **quantized.stats}

        def loss_of_discriminator(pair: tuple[_Part, Shown]) -> tuple[Tensor, Terms]:
            part, seen = pair
            return self.losses.discriminate(self.discriminator, seen, step, part.augmentation)

        self.tokenizer.train()
        terms = self.optimize("autoencoder", self.tokenizer, parts, loss_of_autoencoder)
        if self.losses.trains_discriminator(step):
            pairs = list(zip(parts, shown, strict=True))
            found = self.optimize("discriminator", self.discriminator, pairs, loss_of_discriminator)
            terms = {**terms, **found, "gradient_norm": terms["gradient_norm"]}  # the autoencoder's is logged
        return terms

    def _parts(self, batch: Batch) -> list[_Part]:
        """A process's share of a batch, divided into micro-batches."""
        seed, device = self.config.training.seed, self.accelerator.device
        images, positions = send((batch.images, batch.positions), device)
        whole = _Part(
            to_float(images),
            image_uniform(positions, seed=seed, purpose="quantizer"),
            image_uniform(positions, 7, seed=seed, purpose="augmentation"),
            image_uniform(positions, 2, *self.modules["model"].grid, seed=seed, purpose="neighbour swap"),
        )
        return [_Part(*part) for part in self.in_parts(whole)]

    @torch.no_grad()
    def picture(self, averaged: ImageTokenizer) -> Image.Image:
        """Rows of originals, reconstructions from z_q, and reconstructions from the dominant codes alone."""
        rows = reconstruction_rows(averaged, self.pictured.to(averaged.device))
        return picture_grid(rows.cpu(), columns=len(self.pictured))

    def score(self, averaged: ImageTokenizer) -> dict[str, float] | None:
        return None if self.measure is None else {self.score_name: self.measure(averaged)}


def reconstruction_rows(tokenizer: ImageTokenizer, images: Tensor) -> Tensor:
    """Images (N, 3, H, W) uint8, then their reconstructions from z_q, and then those from the codes if there are any.

    Returns:
        (2 N, 3, H, W) or (3 N, 3, H, W) uint8.
    """
    encoding = tokenizer.encode(to_float(images))
    rows = [images, to_uint8(tokenizer.decode(encoding.z_q))]
    if tokenizer.quantizer.has_codes:
        rows.append(to_uint8(tokenizer.decode_indices(encoding.indices)))
    return torch.cat(rows)


def _of_discriminator(config: TokenizerExperiment) -> OptimizerConfig:
    """AdamW whatever trains the autoencoder: Muon's steps are large where a discriminator should be in no hurry."""
    optimizer, loss = config.optimizer, config.loss
    betas, rate = loss.discriminator_betas or optimizer.betas, loss.discriminator_rate * optimizer.learning_rate
    return replace(optimizer, name="adamw", betas=betas, learning_rate=rate)


def _compiled(tokenizer: ImageTokenizer) -> nn.Module:
    """``tokenizer`` with encoder and decoder compiled at their first use."""
    # A compiled backward pass may overwrite the tensors saved for it, and then refuses to run twice; VQGAN's adaptive
    # weight runs the decoder's three times a step. torch reads the setting at every compilation, so it must be global.
    torch._functorch.config.donated_buffer = False
    # Shapes and branches of quantizers and swaps depend on the data, which would split the graph into dozens that are
    # recompiled again and again. And on a CPU, SCQ's solver is compiled by numba, which torch's tracer cannot follow.
    tokenizer.quantize = torch.compiler.disable(tokenizer.quantize)
    return torch.compile(tokenizer)


class ImageStage(Stage):
    """A stage that trains on images of one size, those of ``config.data``."""

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of the images in pixels."""

    def open_stream(self, accelerator: Accelerator) -> ImageStream:
        data, training = self.config.data, self.config.training
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
            max_bad=data.max_bad,
        )
        if stream.image_size != self.image_size:
            raise UserError(
                f"{shown(data.train)} holds images of {stream.image_size} pixels, but architecture.image_size is "
                f"{self.image_size}; pack the images again with --size, or change the config"
            )
        return stream

    def probe(self, accelerator: Accelerator) -> Probe:
        """Read a few training images; noise stands in if the shards are not in a local folder."""
        if (Path(self.config.data.train) / MANIFEST).is_file():
            stream = self.open_stream(accelerator)
            return Probe(Batch(*(field[:PROBED_IMAGES] for field in next(iter(stream)))), stream.num_images)
        pixels = torch.randint(0, 256, (PROBED_IMAGES, 3, self.image_size, self.image_size), dtype=torch.uint8)
        return Probe(Batch(pixels, torch.zeros(PROBED_IMAGES, dtype=torch.int64), torch.arange(PROBED_IMAGES)), None)


class TokenizerStage(ImageStage):
    """Trains an autoencoder around a quantizer, and exports it.

    Args:
        score: scores the averaged weights at every checkpoint, in the main process. Lower is better, and the best
            checkpoint is exported as well. None for no score.
    """

    name = "tokenizer"

    def __init__(self, config: TokenizerExperiment, score: Callable[[ImageTokenizer], float] | None = None):
        self.config, self.score = config, score
        self.dataset: str | None = None  # its name, known once the stream is open

    @property
    def title(self) -> str:
        return f"tokenizer {self.config.quantizer.name}"

    @property
    def image_size(self) -> int:
        return self.config.architecture.image_size

    def open_stream(self, accelerator: Accelerator) -> ImageStream:
        stream = super().open_stream(accelerator)
        source = stream.manifest["source"]
        self.dataset = source.get("name") or source["format"]  # older packs have no name
        return stream

    def build(self, accelerator: Accelerator, probe: Probe | None = None) -> TokenizerTask:
        if probe is not None:
            return TokenizerTask(self.config, accelerator, probe.batch.images)
        data = self.config.data
        shown, max_bad = (data.validation, 0.0) if data.validation else (data.train, data.max_bad)
        pictured = next(iterate_once(shown, batch_size=PICTURED_IMAGES, max_bad=max_bad)).images
        return TokenizerTask(self.config, accelerator, pictured, self.score)

    def export(self, averaged: ImageTokenizer, folder: Path, steps: int) -> None:
        trained = TrainedFor(steps, steps * self.config.training.batch_size)
        facts = TrainingFacts(dataset=self.dataset, revision=git_revision(), tokenizer=trained)
        save_network(averaged, folder, Measured(training=facts))

    def heaviest_step(self) -> int:
        last, loss = super().heaviest_step(), self.config.loss
        return last - last % loss.r1_every if loss.r1 > 0 else last
