"""Everything that is measured of one model: ``scq evaluate``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from scq.data.stream import Batch
from scq.engine.measurements import Measured, SampleScores
from scq.engine.processes import rank_and_world_size
from scq.evaluation.metrics.codebook import CodebookUsage, codebook_usage
from scq.evaluation.metrics.distances import fid
from scq.evaluation.metrics.features import FeatureSet
from scq.evaluation.metrics.networks import FeatureNetwork
from scq.evaluation.neighbours import FirstImages, nearest_images
from scq.evaluation.pictures import save_picture, stacked_rows
from scq.evaluation.reconstructions import evaluate_reconstructions
from scq.evaluation.reference import Progress, Reference, image_counter
from scq.evaluation.samples import describe, evaluate_samples, evaluate_with_second, sample_features
from scq.stage1_tokenizer.autoencoder import ImageTokenizer, to_float

Found = TypeVar("Found")


@dataclass
class Samples:
    """Generated images that are to be measured, and what is asked of them.

    Attributes:
        draw: ``draw(n)`` yields this process's share of n images (see metrics.features).
        count: how many to draw; 0 for as many as the reference holds.
        second: a further feature network, for a second Frechet distance.
        training: training images, to look for the nearest ones of samples.
        picture: PNG file for pairs of those.
    """

    draw: Callable[[int], Iterable[Any]]
    count: int = 0
    second: FeatureNetwork | None = None
    training: Reference | None = None
    picture: Path | None = None


@dataclass
class Clock:
    """Runs the parts of a measuring under a progress bar each, and keeps how long they took.

    Attributes:
        bar: opens a progress bar from the name of what runs; None for no bars.
        seconds: of each part, by name.
    """

    bar: Callable[[str], AbstractContextManager[Progress]] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, title: str, work: Callable[[Progress | None], Found]) -> Found:
        """What ``work`` returns; it is given the bar to report to."""
        started = time.monotonic()
        with nullcontext() if self.bar is None else self.bar(title) as report:
            found = work(report)
        self.seconds[title] = round(time.monotonic() - started, 2)
        return found


def evaluate(
    tokenizer: ImageTokenizer,
    reference: Reference,
    network: FeatureNetwork,
    samples: Samples | None = None,
    *,
    cache: Path | None = None,
    clock: Clock | None = None,
    **reconstructions: Any,
) -> Measured:
    """All numbers of one model against one reference, in one pass over real and one over generated images.

    Of several processes every one must call it, and every one gets the whole result.

    Args:
        samples: None where there is only a tokenizer.
        cache: file for the reference's features; those of a second network go to NAME_second beside it.
        clock: for bars and times; None for times alone.
        reconstructions: further arguments of `evaluate_reconstructions`.

    Raises:
        UserError: there are too few images for a metric, or ``cache`` holds other features.
    """
    clock = clock or Clock()
    real = clock.run("real images", lambda bar: reference.features(network, cache, bar))
    found = clock.run(
        "reconstructions",
        lambda bar: evaluate_reconstructions(tokenizer, reference, network, real, progress=bar, **reconstructions),
    )
    scores = None
    if samples is not None:
        scores = _evaluate_drawn(samples, reference, network, real, cache, tokenizer.device, clock)
    return Measured(
        reference=reference.description,
        network=describe(network),
        reconstruction=found.ways,
        codebook=None if found.codebook is None else found.codebook.summary(),
        samples=scores,
        seconds=clock.seconds,
    )


def _evaluate_drawn(
    samples: Samples,
    reference: Reference,
    network: FeatureNetwork,
    real: FeatureSet,
    cache: Path | None,
    device: torch.device,
    clock: Clock,
) -> SampleScores:
    """Every image is drawn once and goes through every network."""
    count, first = samples.count or reference.count, FirstImages()
    networks = [network] if samples.second is None else [network, samples.second]
    features, *others = clock.run(
        "samples", lambda bar: sample_features(first.passing(samples.draw(count)), count, networks, bar)
    )
    scores = evaluate_samples(features, real, device)
    if samples.second is not None:
        second = samples.second
        beside = None if cache is None else cache.with_name(f"{cache.stem}_second{cache.suffix}")
        known = clock.run("real images, second network", lambda bar: reference.features(second, beside, bar))
        scores = replace(scores, second_backbone=evaluate_with_second(others[0], known, second))
    if samples.training is not None:
        training = samples.training
        training_set = clock.run("training images", lambda bar: training.features(network, progress=bar))
        nearest = nearest_images(features, training_set, training, first.gather(), device)
        scores = replace(
            scores,
            nearest_training_distance=nearest.median_distance,
            nearest_training_among=training.count,
            fid_to_training=fid(training_set, features).value,
        )
        if samples.picture is not None and rank_and_world_size()[0] == 0:
            rows = [("samples", nearest.samples), ("nearest training images", nearest.neighbours)]
            save_picture(stacked_rows(rows), samples.picture)
    return scores


@torch.no_grad()
def evaluate_codebook(
    tokenizer: ImageTokenizer, batches: Iterable[Batch], progress: Progress | None = None, total: int = 0
) -> CodebookUsage:
    """Usage of the codebook over a whole set of images; of several processes, over all their shares.

    Args:
        batches: this process's share of the images.
        total: number of images over all processes, for the progress.
    """
    count = image_counter(progress, total, rank_and_world_size()[1])

    def indices() -> Iterator[Tensor]:
        for batch in batches:
            yield tokenizer.encode(to_float(batch.images.to(tokenizer.device))).indices
            count(len(batch.images))

    return codebook_usage(indices(), tokenizer.quantizer.codebook_size).gather()
