"""The prior as a stage: ``scq train prior --config FILE``, or ``run(PriorStage(config))``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from timm.models.eva import EvaBlock
from torch import Tensor, nn

from scq.data.manifest import Classes, refuse_other_classes
from scq.data.tokens import TokenBatch, TokenDataset, TokenStream
from scq.engine.accelerators import send
from scq.engine.config import LoopConfig, OptimizerConfig, git_revision
from scq.engine.errors import UserError
from scq.engine.measurements import Measured, TrainedFor
from scq.engine.optimizers import create_optimizer
from scq.engine.processes import rank_and_world_size, sum_across_processes
from scq.engine.randomness import image_uniform
from scq.engine.sharding import shard
from scq.engine.stage import PROBED_IMAGES, Probe, Stage, Task, Terms
from scq.stage1_tokenizer.autoencoder import ImageTokenizer
from scq.stage1_tokenizer.model_folder import load_tokenizer, tokenizer_measured
from scq.stage2_prior.likelihood import likelihood_bound
from scq.stage2_prior.masking import loss_weight, mask_share, mask_tokens, masked_count
from scq.stage2_prior.model import Model
from scq.stage2_prior.model_folder import save_model
from scq.stage2_prior.transformer import MaskedTransformer, PriorArchitectureConfig

SCORED_IMAGES = 2000  # held-out images that validation uses at most
Draw = Callable[[ImageTokenizer, MaskedTransformer], Image.Image]


@dataclass
class TokenDataConfig:
    """The tokens that a prior is trained and validated on."""

    train: str = "tokens/train"  # a folder that `scq tokenize` wrote
    validation: str = ""  # tokens of held-out images, to measure bits per token at every checkpoint; empty for none


@dataclass
class MaskingConfig:
    """How tokens are masked in training, and how the loss weights them."""

    schedule: str = "cosine"  # cosine | uniform | arccos | exp: how much of an image a training step masks
    weighting: str = (
        "tokens"  # tokens | images: what has the same weight in the loss, every masked token or every image
    )
    label_smoothing: float = 0.1
    corrupted_share: float = (
        0.0  # share of visible tokens replaced with random codes, as a prior's own mistakes would be
    )
    class_dropout: float = 0.1  # share of images trained without their class, for classifier-free guidance


@dataclass
class PriorExperiment:
    """The config of a prior's training run."""

    out: str = ""  # the run folder
    tokenizer: str = ""  # folder of the tokenizer that wrote the tokens; it is exported together with the prior
    shard: bool = False  # divide weights, gradients and optimizer state among the processes (FSDP2)
    data: TokenDataConfig = field(default_factory=TokenDataConfig)
    architecture: PriorArchitectureConfig = field(default_factory=PriorArchitectureConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: LoopConfig = field(default_factory=LoopConfig)


def build_prior(config: PriorExperiment, tokens: TokenDataset, codes: Tensor) -> MaskedTransformer:
    """The untrained prior for these tokens.

    Args:
        codes: (K, F), the tokenizer's; the prior gets them if ``architecture.code_features`` is true.

    Raises:
        UserError: the config does not describe a prior for these tokens.
    """
    architecture = config.architecture
    if architecture.class_conditional and not tokens.num_classes:
        raise UserError(f"architecture.class_conditional=true, but {config.data.train} has no classes")
    if architecture.heads > 0 and architecture.width % architecture.heads:  # else the transformer refuses them
        raise UserError(
            f"architecture.width={architecture.width} is not a multiple of architecture.heads={architecture.heads}"
        )
    named = ("class_conditional", "code_features")
    choices = {name: value for name, value in vars(architecture).items() if name not in named}
    try:
        prior = MaskedTransformer(
            codebook_size=tokens.codebook_size,
            grid=tokens.grid,
            num_classes=tokens.num_classes if architecture.class_conditional else 0,
            class_names=tokens.class_names if architecture.class_conditional else (),
            code_dim=codes.shape[1] if architecture.code_features else 0,
            tokenizer_fingerprint=tokens.fingerprint,
            **choices,
        )
    except ValueError as error:
        raise UserError(f"architecture: {error}") from error
    if architecture.code_features:
        prior.describe(codes)
    return prior


def _check_masking(masking: MaskingConfig) -> None:
    try:
        mask_share(torch.zeros(1), masking.schedule)
        loss_weight(torch.ones(1), 1, masking.weighting)
    except ValueError as error:
        raise UserError(f"masking: {error}") from error
    for name in ("corrupted_share", "label_smoothing", "class_dropout"):
        if not 0 <= getattr(masking, name) < 1:
            raise UserError(f"masking.{name} is {getattr(masking, name)}; it must be in [0, 1)")


class PriorTask(Task):
    """One training step of the prior.

    Args:
        tokens: the training set, which decides the prior's shape.
        codes: (K, F), the tokenizer's.
        draw: makes a picture of samples from the averaged prior; None for no picture.
        held_out: tokens for `score`; None for no score.
    """

    score_name = "bits_per_token"

    def __init__(
        self,
        config: PriorExperiment,
        accelerator: Accelerator,
        tokens: TokenDataset,
        codes: Tensor,
        draw: Callable[[MaskedTransformer], Image.Image] | None = None,
        held_out: TokenDataset | None = None,
    ):
        _check_masking(config.masking)
        super().__init__(config, accelerator, lambda: build_prior(config, tokens, codes))
        self.draw, self.held_out = draw, held_out
        prior = self.modules["model"]
        if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
            prior.attend_by_products()
        loss = _LossOfPrior(prior, config, compiled=config.training.compile)
        self.prior = shard(loss, EvaBlock) if config.shard else accelerator.prepare(loss)
        tables = ("token_embedding", "code_embedding", "position_embedding", "class_embedding")
        self.optimizers = {"prior": accelerator.prepare(create_optimizer(prior, config.optimizer, exclude=tables))}

    def training_step(self, batch: TokenBatch, step: int) -> Terms:
        codes = batch.indices.flatten(1)  # (B, L)
        # Counted on the host: it then knows, without asking a GPU, how large the tensors of masked tokens are.
        progress = image_uniform(batch.positions, seed=self.config.training.seed, purpose="mask progress")  # (B,)
        hidden = masked_count(progress, codes.shape[1], self.config.masking.schedule)  # (B,)
        totals = [int(each.sum()) for (each,) in self.in_parts((hidden,))]
        sent = send((codes, batch.labels, batch.positions, hidden), self.accelerator.device)
        parts = list(zip(self.in_parts(sent), totals, strict=True))
        share = self._share_of_weight(sent[-1], codes.shape[1]) / len(parts)

        def loss_of_part(part: tuple[tuple[Tensor, ...], int]) -> tuple[Tensor, Terms]:
            tensors, total = part
            loss, accuracy = self.prior(*tensors, total, share)
            return loss, {"loss": loss, "accuracy": accuracy}

        self.prior.train()
        return self.optimize("prior", self.prior, parts, loss_of_part)

    def _share_of_weight(self, hidden: torch.Tensor, length: int) -> torch.Tensor:
        """The total weight of all masked tokens of this step, divided by the number of processes.

        ``hidden`` (B,) are each image's masked tokens, of ``length``.

        The loss of each part of the batch is divided by a share of this total, not by the part's own weight: only then
        do the gradients of the parts add up to that of the whole batch.
        """
        weight = (hidden * loss_weight(hidden, length, self.config.masking.weighting)).sum()
        return sum_across_processes(weight) / rank_and_world_size()[1]

    def score(self, averaged: MaskedTransformer) -> dict[str, float] | None:
        """An upper bound on the bits that held-out tokens need, and its error (see `likelihood_bound`)."""
        if self.held_out is None:
            return None
        count = min(len(self.held_out), SCORED_IMAGES)
        images = np.arange(count)
        codes = self.held_out.read(images, np.zeros(count, np.int64)).flatten(1)  # (N, L)
        labels = torch.from_numpy(self.held_out.labels[images]) if averaged.config.num_classes else None
        bound = likelihood_bound(averaged, codes, averaged.mask_token, labels, device=self.accelerator.device)
        return {
            self.score_name: bound.bits_per_token,
            "bits_per_token_error": bound.error / codes.shape[1],
            "bits_per_image": bound.bits_per_image,
        }

    def picture(self, averaged: MaskedTransformer) -> Image.Image | None:
        return self.draw(averaged) if self.draw is not None else None


class _LossOfPrior(nn.Module):
    """Masking and loss in one forward pass, because that is what distributed training wraps."""

    def __init__(self, prior: MaskedTransformer, config: PriorExperiment, compiled: bool):
        super().__init__()
        self.prior, self.masking, self.seed = prior, config.masking, config.training.seed
        self.run = torch.compile(prior) if compiled else prior

    def forward(
        self,
        codes: torch.Tensor,
        labels: torch.Tensor,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        total: int,
        share: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        order = image_uniform(positions, codes.shape[1], seed=self.seed, purpose="mask order")  # (B, L)
        masked = mask_tokens(codes, self.prior.mask_token, hidden, order)
        shown = self._corrupt(masked.tokens, masked.mask, positions)
        num_classes = self.prior.config.num_classes
        if num_classes:
            dropped = image_uniform(positions, seed=self.seed, purpose="class dropout") < self.masking.class_dropout
            labels = torch.where(dropped, num_classes, labels)
        logits = self.run(shown, labels if num_classes else None)
        smoothing, weighting = self.masking.label_smoothing, self.masking.weighting
        return masked_cross_entropy(logits, masked.mask, codes, smoothing, weighting, share, total)

    def _corrupt(self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Replace a share of the visible tokens (B, L) with random codes."""
        if self.masking.corrupted_share == 0:
            return tokens
        chance, choice = image_uniform(positions, 2, tokens.shape[1], seed=self.seed, purpose="corruption").unbind(1)
        codes = (choice * self.prior.config.codebook_size).long()
        return torch.where(~mask & (chance < self.masking.corrupted_share), codes, tokens)


def masked_cross_entropy(
    logits: torch.Tensor,
    mask: torch.Tensor,
    codes: torch.Tensor,
    label_smoothing: float = 0.0,
    weighting: str = "tokens",
    total_weight: torch.Tensor | None = None,
    count: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy over the masked tokens, and the share of them that is predicted correctly.

    Args:
        logits: (B, L, K).
        mask: (B, L) bool, True where the code was masked.
        codes: (B, L) int64, the true codes.
        weighting: see stage2_prior.masking.loss_weight.
        total_weight: what the sum of losses is divided by; None for the total weight of the tokens masked here.
        count: how many tokens are masked; None to count them, for which a GPU is waited for.

    Returns:
        both 0-dim; the share carries no gradient.
    """
    count = int(mask.sum()) if count is None else count
    places = torch.nonzero_static(mask.flatten(), size=count).squeeze(1)  # (masked,), in row-major order
    hidden = logits.flatten(0, 1).index_select(0, places).float()  # (masked, K)
    wanted = codes.flatten()[places]  # (masked,)
    losses = nn.functional.cross_entropy(hidden, wanted, label_smoothing=label_smoothing, reduction="none")
    of_images = loss_weight(mask.sum(1), mask.shape[1], weighting)  # (B,)
    weights = of_images[places // mask.shape[1]]  # (masked,)
    total = weights.sum() if total_weight is None else total_weight
    return (losses * weights).sum() / total, (hidden.argmax(1) == wanted).float().mean().detach()


class PriorStage(Stage):
    """Trains a masked transformer over a tokenizer's dominant codes, and exports both as one model.

    Args:
        tokenizer: the one that wrote the tokens; None for the one in the folder ``config.tokenizer``.
        draw: makes a picture of samples for the run folder, as `sampling.pipeline.sample_sheet` does; None for no
            picture.

    Raises:
        UserError: no tokenizer is named, or it cannot be loaded.
    """

    name = "prior"

    def __init__(self, config: PriorExperiment, tokenizer: ImageTokenizer | None = None, draw: Draw | None = None):
        if tokenizer is None and not config.tokenizer:
            raise UserError("tokenizer is empty: name the tokenizer's folder, for example tokenizer=runs/tokenizer")
        self.config, self.draw = config, draw
        self.tokenizer = load_tokenizer(config.tokenizer) if tokenizer is None else tokenizer

    def open_stream(self, accelerator: Accelerator) -> TokenStream:
        config = self.config
        stream = TokenStream(
            config.data.train,
            batch_size=config.training.batch_size,
            seed=config.training.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        self._refuse_foreign_tokens(config.data.train, stream.dataset)
        held_out = self._held_out()
        if held_out is not None:
            self._refuse_foreign_tokens(config.data.validation, held_out)
            if config.architecture.class_conditional:
                refuse_other_classes(
                    Classes(config.data.train, stream.num_classes, stream.class_names),
                    Classes(config.data.validation, held_out.num_classes, held_out.class_names),
                    "pack both with the same class folders, or set architecture.class_conditional=false",
                )
        return stream

    def probe(self, accelerator: Accelerator) -> Probe:
        stream = self.open_stream(accelerator)
        return Probe(TokenBatch(*(field[:PROBED_IMAGES] for field in next(iter(stream)))), stream.num_images)

    def build(self, accelerator: Accelerator, probe: Probe | None = None) -> PriorTask:
        tokens, codes = TokenDataset(self.config.data.train), self.tokenizer.codes()
        if probe is not None:
            return PriorTask(self.config, accelerator, tokens, codes)
        draw = None if self.draw is None else (lambda prior: self.draw(self.tokenizer, prior))
        return PriorTask(self.config, accelerator, tokens, codes, draw, self._held_out())

    def export(self, averaged: MaskedTransformer, folder: Path, steps: int) -> None:
        trained = TrainedFor(steps, steps * self.config.training.batch_size)
        known = tokenizer_measured(self.config.tokenizer) if self.config.tokenizer else Measured()
        facts = dataclasses.replace(known.training, revision=git_revision(), prior=trained, refiner=None)
        save_model(Model(self.tokenizer, averaged), folder, Measured(training=facts, license=known.license))

    def _held_out(self) -> TokenDataset | None:
        return TokenDataset(self.config.data.validation) if self.config.data.validation else None

    def _refuse_foreign_tokens(self, path: str, tokens: TokenDataset) -> None:
        """Raise UserError unless this tokenizer wrote the tokens."""
        fingerprint = self.tokenizer.fingerprint()
        if tokens.fingerprint != fingerprint:
            raise UserError(
                f"{path} was written by tokenizer {tokens.fingerprint}, but {self.config.tokenizer} is tokenizer "
                f"{fingerprint}; run `scq tokenize` again with the latter"
            )
