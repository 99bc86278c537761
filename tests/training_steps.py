"""One small training step of every stage, for tests of what a step asks of a device. No file is read.

Tests that take one use the fixture ``halfway``.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from test_prior import stripes_config, stripes_tokenizer, write_stripes
from torchvision.models.vgg import cfgs, make_layers

from scq.data.stream import Batch
from scq.data.tokens import TokenBatch, TokenDataset
from scq.engine.accelerators import make_accelerator
from scq.engine.config import load_config
from scq.engine.stage import Task, Terms
from scq.stage1_tokenizer.autoencoder import ImageTokenizer
from scq.stage1_tokenizer.quantizers.interface import (
    Quantized,
    Quantizer,
    flatten_latents,
    returned,
    unflatten_latents,
)
from scq.stage1_tokenizer.stage import TokenizerExperiment, TokenizerTask
from scq.stage2_prior.prior_stage import PriorTask
from scq.stage2_prior.refiner_stage import RefinerExperiment, RefinerTask
from scq.stage2_prior.transformer import MaskedTransformer

STAGES = ("tokenizer", "prior", "refiner", "refiner_flow")
# Every loss at once: LPIPS, GAN, adaptive weight, R1, LeCam, augmentation; in two micro-batches.
TOKENIZER = [
    "architecture.channels=[16,32]", "architecture.image_size=16", "architecture.latent_dim=4",
    "architecture.attention=true", "quantizer.codebook_size=16", "training.batch_size=8", "training.accumulate=2",
    "training.images_every=0", "loss.adversarial=0.5", "loss.adversarial_start=0", "loss.adversarial_ramp=0",
    "loss.discriminator_lead=0", "loss.discriminator_channels=16", "loss.discriminator_layers=1", "loss.r1=0.1",
    "loss.r1_every=1", "loss.lecam=0.1", "loss.augment=[colour,shift,cutout]", "optimizer.learning_rate=1e-3",
]  # fmt: skip


class Halfway(Quantizer):
    """Latents halfway to the nearest of some fixed codes; it asks for no value, and so stands for any quantizer."""

    def __init__(self, codebook_size: int, dim: int):
        super().__init__()
        self.codebook_size, self.dim = codebook_size, dim
        codes = torch.randn(codebook_size, dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("codes", codes)

    def forward(self, z: torch.Tensor, image_noise: torch.Tensor | None = None) -> Quantized:
        rows = flatten_latents(z)  # (N, F)
        index = torch.cdist(rows, self.codes).argmin(1)  # (N,)
        z_q = unflatten_latents((rows + self.codes[index]) / 2, z)
        loss = (rows - self.codes[index]).square().mean()
        return Quantized(returned(z_q, z), index.view(len(z), *z.shape[2:]), loss, {"error": loss.detach()})

    def lookup(self, indices: torch.Tensor) -> torch.Tensor:
        return self.codes[indices].permute(0, 3, 1, 2).contiguous()


def training(stage: str, folder: Path, *settings: str) -> tuple[Task, Callable[[int], Terms]]:
    """A task of that stage, and its step by number, with the update of the averages, as the loop takes it.

    Args:
        folder: for tokens and weights.
        settings: of the config.
    """
    task, batch = MAKERS[stage](folder, *settings)

    def step(number: int) -> Terms:
        terms = task.training_step(batch, number)
        task.average.update(task.modules["model"], step=number)
        return terms

    return task, step


def _images(count: int = 8, side: int = 16) -> Batch:
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0))
    return Batch(pixels.to(torch.uint8), torch.arange(count) % 2, torch.arange(count))


def _tokenizer(folder: Path, *settings: str) -> tuple[Task, Batch]:
    torch.manual_seed(0)
    state = make_layers(cfgs["D"], batch_norm=False).state_dict()
    torch.save({f"features.{name}": tensor for name, tensor in state.items()}, folder / "vgg16.pth")
    known = [f"loss.perceptual_weights={folder / 'vgg16.pth'}", "loss.perceptual=1.0", "quantizer.name=halfway"]
    config = load_config(TokenizerExperiment, None, [*TOKENIZER, *known, *settings])
    return TokenizerTask(config, make_accelerator(config.training), _images().images), _images()


def _prior(folder: Path, *settings: str) -> tuple[Task, TokenBatch]:
    options = ["architecture.class_conditional=true", "architecture.dropout=0.1", "masking.corrupted_share=0.2"]
    options += ["training.accumulate=2", "masking.label_smoothing=0.1", "masking.weighting=images"]
    tokens = TokenDataset(write_stripes(folder / "tokens", classes=2, names=("one", "two")))
    config = stripes_config(folder / "tokens", folder / "run", *options, *settings)
    task = PriorTask(config, make_accelerator(config.training), tokens, stripes_tokenizer().codes())
    codes = torch.randint(0, 16, (8, 4, 4), generator=torch.Generator().manual_seed(0))
    return task, TokenBatch(codes, torch.arange(8) % 2, torch.arange(8))


def _refiner(folder: Path, *settings: str) -> tuple[Task, Batch]:
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(16, (16, 32), latent_dim=4, codebook_size=16, quantizer_name="halfway")
    prior = MaskedTransformer(16, (4, 4), width=32, depth=1, heads=2, num_classes=2)
    options = ["architecture.width=16", "architecture.depth=1", "resampled_share=0.5", "training.batch_size=8"]
    config = load_config(RefinerExperiment, None, [*options, "pixel_weight=1.0", *settings])
    images = _images()
    accelerator = make_accelerator(config.training)
    return RefinerTask(config, accelerator, tokenizer, prior, images.images, images.images), images


def _flow(folder: Path, *settings: str) -> tuple[Task, Batch]:
    return _refiner(folder, "architecture.kind=flow", *settings)


MAKERS: dict[str, Callable[..., tuple[Task, Batch | TokenBatch]]] = {
    "tokenizer": _tokenizer,
    "prior": _prior,
    "refiner": _refiner,
    "refiner_flow": _flow,
}
