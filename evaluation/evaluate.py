"""Everything that is measured of one model: ``scq evaluate``."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scq.data.stream import Batch
from scq.engine.processes import rank_and_world_size, sum_across_processes
from scq.evaluation.benchmark.plots import stacked_rows
from scq.evaluation.metrics.features import FeatureSet, extract_features, extract_with_each
from scq.evaluation.metrics.fid_infinity import fid_infinity
from scq.evaluation.metrics.mixture_rate import round_mixture
from scq.evaluation.metrics.networks import FeatureNetwork
from scq.evaluation.metrics.scores import (
    CodebookUsage,
    CodeCounter,
    ReconstructionMetrics,
    codebook_usage,
    fid,
    kid,
    measuring_device,
    precision_recall,
)
from scq.evaluation.neighbours import FirstImages, nearest_images
from scq.evaluation.reference import Progress, Reference, image_counter
from scq.sampling.chunks import in_equal_chunks
from scq.stage1_tokenizer.autoencoder import ImageTokenizer, to_float, to_uint8
from scq.stage1_tokenizer.quantizers import Mixture
from scq.stage2_prior.refiner import ConvexRefiner


class Reconstructions(NamedTuple):
    """What one pass over a reference finds.

    Attributes:
        ways: ``z_q`` and, where the quantizer has codes, ``dominant``, the refiners' names, and ``z_q_4_bits`` and
            such; each with mse, psnr, ssim, lpips, rfid, rkid, and the rounded ones with bits_per_image.
        codebook: None where the quantizer has no codes.
    """

    ways: dict[str, dict[str, Any]]
    codebook: CodebookUsage | None


@torch.no_grad()
def evaluate_reconstructions(
    tokenizer: ImageTokenizer,
    reference: Reference,
    network: FeatureNetwork | None,
    real: FeatureSet | None,
    progress: Progress | None = None,
    perceptual: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    refiners: dict[str, ConvexRefiner] | None = None,
    weight_bits: Sequence[int] = (),
    only: Collection[str] | None = None,
    refiner_steps: int = 8,
) -> Reconstructions:
    """Reconstructions from z_q and from the dominant codes alone, against the originals, and usage of the codebook.

    Args:
        network, real: for the FID; without them it is left out.
        perceptual: for LPIPS, on the tokenizer's device; without it it is left out.
        refiners: by name; each decodes what it makes of the dominant codes, at their rate.
        weight_bits: for a soft quantizer, each decodes z_q with its weights rounded to so many bits, and says its cost.
        only: measure no other ways than these.
        refiner_steps: of refiners that are flows.
    """
    tokenizer.eval()
    pixels: dict[str, ReconstructionMetrics] = {}
    parts: dict[str, list[FeatureSet]] = {}
    bits: dict[str, list[torch.Tensor]] = {}
    count = image_counter(progress, reference.count, reference.processes)
    shared = reference.processes > 1
    codes = CodeCounter(tokenizer.quantizer.codebook_size) if tokenizer.quantizer.has_codes else None
    for batch in reference.batches():
        # In chunks of one size, so that no image's last bit depends on how many are measured together.
        images = to_float(batch.images.to(tokenizer.device))
        encoding = tokenizer.quantizer.mix(in_equal_chunks(tokenizer.latents, images))
        if codes is not None:
            codes.update(encoding.indices)
        latents = _latents(tokenizer, encoding, batch.positions, refiners or {}, refiner_steps, weight_bits, bits)
        done: list[tuple[torch.Tensor, FeatureSet | None]] = []
        for name, z_q in latents.items():
            if only is not None and name not in only:
                continue
            images = to_uint8(in_equal_chunks(tokenizer.decode, z_q)).cpu()
            metrics = pixels.setdefault(name, ReconstructionMetrics(tokenizer.device, shared, perceptual))
            metrics.update(batch.images, images)
            features = next((known for same, known in done if torch.equal(same, images)), None)
            if network is not None and features is None:  # a hard quantizer decodes one and the same thing twice
                part = Batch(images, batch.labels, batch.positions)
                features = extract_features([part], network, name=f"reconstructions from {name}")
            done.append((images, features))
            parts.setdefault(name, []).append(features)
        count(len(batch.images))
    results = {name: metrics.compute()._asdict() for name, metrics in pixels.items()}
    for name, found in results.items():
        if network is not None:
            features = reference.whole(FeatureSet.merge(parts[name]))
            kernel = kid(real, features)
            found |= {"rfid": fid(real, features).value, "rkid": kernel.value, "rkid_error": kernel.error}
        if name in bits:
            spent = torch.cat(bits[name]).sum()[None]
            found["bits_per_image"] = float(sum_across_processes(spent) if shared else spent) / found["count"]
    if codes is None:
        return Reconstructions(results, None)
    return Reconstructions(results, codes.usage.gather() if shared else codes.usage)


def _latents(
    tokenizer: ImageTokenizer,
    encoding: Mixture,
    positions: torch.Tensor,
    refiners: dict[str, ConvexRefiner],
    refiner_steps: int,
    weight_bits: Sequence[int],
    bits: dict[str, list[torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """What a decoder can be given for a batch, (B, F, h, w) each; ``bits`` collects what rounded weights cost."""
    latents = {"z_q": encoding.z_q}
    if tokenizer.quantizer.has_codes:
        latents["dominant"] = tokenizer.quantizer.lookup(encoding.indices).to(encoding.z_q.dtype)
    for name, refiner in refiners.items():
        latents[name] = refiner.refine(encoding.indices, positions.to(encoding.indices.device), refiner_steps)
    if encoding.support.shape[-1] > 1:
        for width in weight_bits:
            rounded = round_mixture(tokenizer.quantizer, encoding, width)
            latents[f"z_q_{width}_bits"] = rounded.z_q
            bits.setdefault(f"z_q_{width}_bits", []).append(rounded.bits)
    return latents


def sample_features(
    images: Iterable[Any], count: int, network: FeatureNetwork, progress: Progress | None = None
) -> FeatureSet:
    """Features of generated images: batches as in metrics.features, this process's share of ``count`` images."""
    return _sample_features(images, count, [network], progress)[0]


def _sample_features(
    images: Iterable[Any], count: int, networks: Sequence[FeatureNetwork], progress: Progress | None
) -> list[FeatureSet]:
    bar = image_counter(progress, count, rank_and_world_size()[1])
    return [share.gather() for share in extract_with_each(images, networks, name="samples", progress=bar)]


def evaluate_samples(
    features: FeatureSet, real: FeatureSet, device: str | torch.device | None = None
) -> dict[str, Any]:
    """Every number of generated images against real ones: FID, KID, precision and recall, and, from 4,098 images on,
    FID extrapolated to infinitely many.

    Args:
        device: for what is large; None for a GPU where there is one.
    """
    device = measuring_device(device)
    distance, kernel = fid(real, features), kid(real, features)
    manifold = precision_recall(real, features, device=device)
    found = {
        "count": features.count,
        "fid": distance.value,
        "fid_biased": distance.biased,
        "fid_note": distance.note,
        "kid": kernel.value,
        "kid_error": kernel.error,
        "kid_subsets": kernel.subsets,
        "kid_subset_size": kernel.subset_size,
        "precision": manifold.precision,
        "recall": manifold.recall,
    }
    if features.count >= 2 * (features.features.shape[1] + 1):
        found["fid_infinity"] = fid_infinity(real, features, device=device)._asdict()
    return found


def evaluate_with_second(features: FeatureSet, real: FeatureSet, network: FeatureNetwork) -> dict[str, Any]:
    """The Frechet distance and KID of generated images in the features of a further network."""
    distance, kernel = fid(real, features), kid(real, features)
    return {
        "frechet_distance": distance.value,
        "biased": distance.biased,
        "kid": kernel.value,
        "kid_error": kernel.error,
        "network": describe(network),
    }


def describe(network: FeatureNetwork) -> dict[str, str]:
    """What must be equal for two numbers to be comparable."""
    return {"weights": network.description, "fingerprint": network.fingerprint, "protocol": network.protocol}


@torch.no_grad()
def evaluate_codebook(
    tokenizer: ImageTokenizer, batches: Iterable[Batch], progress: Progress | None = None, total: int = 0
) -> CodebookUsage:
    """Usage of the codebook over a whole set of images; of several processes, over all their shares."""
    count = image_counter(progress, total, rank_and_world_size()[1])

    def indices() -> Iterator[torch.Tensor]:
        for batch in batches:
            yield tokenizer.encode(to_float(batch.images.to(tokenizer.device))).indices
            count(len(batch.images))

    return codebook_usage(indices(), tokenizer.quantizer.codebook_size).gather()


@dataclass
class Extras:
    """What `evaluate` measures of samples on demand.

    Attributes:
        second: a further feature network, for a second Frechet distance.
        training: training images, to look for the nearest ones of samples.
        picture: PNG file for pairs of those.
    """

    second: FeatureNetwork | None = None
    training: Reference | None = None
    picture: Path | None = None


def evaluate(
    tokenizer: ImageTokenizer,
    draw: Callable[[int], Iterable[Any]] | None,
    reference: Reference,
    network: FeatureNetwork,
    num_samples: int = 0,
    cache: Path | None = None,
    progress: Callable[[str], AbstractContextManager[Progress]] | None = None,
    extras: Extras | None = None,
    **reconstructions: Any,
) -> dict[str, Any]:
    """All numbers of one model against one reference, in one pass over real and generated images.

    With several processes every one must call it, and every one gets the whole result.

    Args:
        draw: ``draw(n)`` yields this process's share of n images (see metrics.features); None where there is only a
            tokenizer.
        num_samples: how many to draw; 0 for as many as the reference holds.
        cache: file for the reference's features; those of a second network go to NAME_second beside it.
        progress: opens a progress bar from the name of what runs.
        reconstructions: further arguments of `evaluate_reconstructions`.

    Returns:
        ``reference``, ``network``, ``reconstruction``, ``codebook``, ``samples`` and ``seconds``.
    """
    bar = progress or (lambda title: nullcontext(None))
    seconds: dict[str, float] = {}

    def timed(title: str, work: Callable[[Progress | None], Any]) -> Any:
        started = time.monotonic()
        with bar(title) as report:
            result = work(report)
        seconds[title] = round(time.monotonic() - started, 2)
        return result

    real = timed("real images", lambda report: reference.features(network, cache, report))
    found = timed(
        "reconstructions",
        lambda report: evaluate_reconstructions(tokenizer, reference, network, real, report, **reconstructions),
    )
    results = {
        "reference": vars(reference.description),
        "network": describe(network),
        "reconstruction": found.ways,
    }
    if found.codebook is not None:
        results["codebook"] = found.codebook.summary()
    if draw is not None:
        count = num_samples or reference.count
        results["samples"] = _evaluate_drawn(
            draw, count, reference, network, real, extras or Extras(), cache, tokenizer.device, timed
        )
    return {**results, "seconds": seconds}


def _evaluate_drawn(
    draw: Callable[[int], Iterable[Any]],
    count: int,
    reference: Reference,
    network: FeatureNetwork,
    real: FeatureSet,
    extras: Extras,
    cache: Path | None,
    device: torch.device,
    timed: Callable[[str, Callable[[Progress | None], Any]], Any],
) -> dict[str, Any]:
    """``samples`` of `evaluate`: every image is drawn once and goes through every network."""
    second, training, first = extras.second, extras.training, FirstImages()
    networks = [network] if second is None else [network, second]
    features, *others = timed(
        "samples", lambda report: _sample_features(first.passing(draw(count)), count, networks, report)
    )
    found = evaluate_samples(features, real, device)
    if second is not None:
        beside = None if cache is None else cache.with_name(f"{cache.stem}_second{cache.suffix}")
        known = timed("real images, second network", lambda report: reference.features(second, beside, progress=report))
        found["second_backbone"] = evaluate_with_second(others[0], known, second)
    if training is not None:
        training_set = timed("training images", lambda report: training.features(network, progress=report))
        nearest = nearest_images(features, training_set, training, first.gather(), device)
        found["nearest_training_distance"] = nearest.median_distance
        found["nearest_training_among"] = training.count
        if extras.picture is not None and rank_and_world_size()[0] == 0:
            rows = [("samples", nearest.samples), ("nearest training images", nearest.neighbours)]
            stacked_rows(rows).save(extras.picture)
    return found
