"""From a model's folder to what is measured of it: opens networks and images, and writes the card."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from scq.engine.errors import UserError
from scq.engine.measurements import Measured
from scq.engine.processes import join_processes, rank_and_world_size
from scq.engine.progress import progress_bar, say
from scq.evaluation.evaluate import Clock, Samples, evaluate
from scq.evaluation.metrics.dinov2 import load_transformer
from scq.evaluation.metrics.inception import load_inception
from scq.evaluation.reference import Reference
from scq.sampling.hub import is_hub_name, local_folder
from scq.sampling.pipeline import SoftConvexPipeline
from scq.stage1_tokenizer.model_folder import load_tokenizer
from scq.stage1_tokenizer.perceptual import PerceptualLoss
from scq.stage2_prior.model_folder import model_root, write_card


@dataclass
class Evaluation:
    """What is to be measured of a model; the fields are the options of ``scq evaluate``."""

    model: Path | str  # folder of a pipeline or of a tokenizer, or a model on the hub
    data: str  # shards of held-out images
    num_real: int = 0  # held-out images; 0 for all
    num_samples: int = 0  # 0 for as many as real ones
    inception_weights: str | None = None  # file; None for the first one found
    lpips_weights: str | None = None  # file of VGG16's weights; None leaves LPIPS out
    second_backbone: str | None = None  # a vision transformer of timm
    second_weights: str | None = None  # file of its weights; None for timm's cache or download
    train: str | None = None  # shards of training images, to look for the nearest ones of samples
    neighbours: int = 0  # training images to look through; 0 for all
    weight_bits: list[int] = field(default_factory=list)  # of rounded weights of soft latents
    cache: Path | None = None  # file that keeps the real images' features
    picture: Path | None = None  # file for samples and their nearest training images
    card: bool = False  # write the numbers into the model's card, too


def evaluate_model(asked: Evaluation) -> Measured:
    """Measure a model; under ``accelerate launch`` the processes share the work, and each returns the numbers of all.

    Raises:
        UserError: there is no model or no such images, two options contradict each other, or weights are missing.
    """
    if asked.second_weights and not asked.second_backbone:
        raise UserError("--second-weights needs --second-backbone, the name of the network that they are of")
    if asked.card and is_hub_name(str(asked.model)):
        raise UserError(f"--card writes into a model's folder, and {asked.model} is on the hub; download it first")
    device = join_processes()
    rank, processes = rank_and_world_size()
    reference = Reference(asked.data, asked.num_real)
    folder = local_folder(asked.model)
    root = model_root(folder)
    if root is None and asked.card:
        raise UserError(f"--card needs a model with both stages; {folder} holds none, and a tokenizer has no card")
    if root is None and (asked.train or asked.second_backbone):
        raise UserError(f"--train and --second-backbone are about samples, and {asked.model} is a tokenizer alone")
    pipeline = None if root is None else SoftConvexPipeline.from_pretrained(root, device)
    tokenizer = load_tokenizer(folder).to(device) if pipeline is None else pipeline.tokenizer
    network = load_inception(asked.inception_weights, device)
    samples = None
    if pipeline is not None:
        samples = Samples(pipeline.stream, asked.num_samples, picture=asked.picture)
        if asked.second_backbone:
            samples.second = load_transformer(asked.second_backbone, asked.second_weights, device)
        if asked.train:
            samples.training = Reference(asked.train, asked.neighbours)
    if rank == 0:
        say(f"Inception: {network.description}")
        if samples is not None and samples.second is not None:
            say(f"second backbone: {samples.second.description}")
        if processes > 1:
            say(f"{processes} processes share the work")
    ways: dict[str, Any] = {"weight_bits": asked.weight_bits}
    if asked.lpips_weights:
        ways["perceptual"] = PerceptualLoss(asked.lpips_weights).to(device)
    if pipeline is not None and pipeline.refiner is not None:
        ways |= {"refiners": {"refined": pipeline.refiner}, "refiner_steps": pipeline.scheduler.refiner_steps}
    clock = Clock(partial(progress_bar, quiet=rank > 0))
    found = evaluate(tokenizer, reference, network, samples, cache=asked.cache, clock=clock, **ways)
    if asked.card and rank == 0 and root is not None and pipeline is not None:
        write_card(pipeline.as_model(), root, pipeline.measured.with_numbers(found))
    return found
