"""Everything that is measured of one model: ``scq evaluate``."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from data.stream import Batch, ImageStream
from engine.errors import UserError
from engine.processes import process_place, sum_across_processes
from evaluation.features import FeatureSet, RealSet, cached_features, extract_features
from evaluation.fid_infinity import fid_infinity
from evaluation.inception import InceptionFeatures
from evaluation.metrics import CodebookUsage, ReconstructionMetrics, codebook_usage, fid, kid, precision_recall
from evaluation.mixture_rate import round_mixture
from sampling.chunks import in_equal_chunks
from stage1_tokenizer.autoencoder import ImageTokenizer, to_float, to_uint8
from stage1_tokenizer.quantizers import Mixture
from stage2_prior.refiner import ConvexRefiner

Progress = Callable[[int, int], None]
_REFERENCE_SEED = 0  # of the shuffle that picks a reference when not the whole split is asked for


class Reference:
    """The real images that a model is measured against: ``count`` images of a split, always the same ones.

    Args:
        shards: a folder that ``scq data pack`` wrote.
        count: number of images; 0 for all.

    Raises:
        UserError: more images are asked for than the split holds.
    """

    def __init__(self, shards: Path | str, count: int = 0, batch_size: int = 64):
        self.rank, self.processes = process_place()
        if self.processes > 1:  # every process gets a share of a set that is no larger than a batch, too
            batch_size = self.processes * max(1, min(batch_size, count or batch_size) // self.processes)
        self.stream = ImageStream(
            shards, batch_size=batch_size, seed=_REFERENCE_SEED, rank=self.rank, world_size=self.processes
        )
        self.count = count or self.stream.num_images
        self.batch_size = batch_size
        if self.count > self.stream.num_images:
            raise UserError(f"{shards} holds {self.stream.num_images} images, {self.count} were asked for")
        source, protocol = self.stream.manifest["source"], self.stream.manifest["protocol"]
        self.description = RealSet(
            dataset=source["format"],
            split=str(source["split"]),
            count=self.count,
            crop=f"{protocol['crop']} {protocol['size']}",
            sha256=self.stream.state_dict()["fingerprint"],
        )

    def batches(self) -> Iterator[Batch]:
        """This process's share."""
        left = self.count - self.rank * self.batch_size // self.processes
        for batch in islice(self.stream.iterate(), -(-self.count // self.batch_size)):
            if left > 0:
                yield Batch(*(field[:left] for field in batch))
            left -= self.batch_size

    def features(
        self, network: InceptionFeatures, cache: Path | None = None, progress: Progress | None = None
    ) -> FeatureSet:
        """Inception features, from the file ``cache`` where an earlier run left them."""
        count = _counter(progress, self.count, self.processes)
        if cache is not None:
            return cached_features(cache, self.description, network, self.batches, count)
        return extract_features(self.batches(), network, name="real", progress=count).gather()


@torch.no_grad()
def evaluate_reconstructions(
    tokenizer: ImageTokenizer,
    reference: Reference,
    network: InceptionFeatures | None,
    real: FeatureSet | None,
    progress: Progress | None = None,
    perceptual: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    refiners: dict[str, ConvexRefiner] | None = None,
    weight_bits: Sequence[int] = (),
    only: Collection[str] | None = None,
    refiner_steps: int = 8,
) -> dict[str, Any]:
    """Reconstructions from z_q and from the dominant codes alone, against the originals.

    Args:
        network, real: for the FID; without them it is left out.
        perceptual: for LPIPS; without it it is left out.
        refiners: by name; each decodes what it makes of the dominant codes, at their rate.
        weight_bits: for a soft quantizer, each decodes z_q with its weights rounded to so many bits, and says its cost.
        only: measure no other ways than these.
        refiner_steps: of refiners that are flows.

    Returns:
        ``z_q`` and, where the quantizer has codes, ``dominant``, the refiners' names, and ``z_q_4_bits`` and such; each
        with mse, psnr, ssim, lpips, rfid, rkid, and the rounded ones with bits_per_image.
    """
    tokenizer.eval()
    pixels: dict[str, ReconstructionMetrics] = {}
    parts: dict[str, list[FeatureSet]] = {}
    bits: dict[str, list[torch.Tensor]] = {}
    count = _counter(progress, reference.count, reference.processes)
    for batch in reference.batches():
        # In chunks of one size, so that no image's last bit depends on how many are measured together.
        images = to_float(batch.images.to(tokenizer.device))
        encoding = tokenizer.quantizer.mix(in_equal_chunks(tokenizer.latents, images))
        latents = _latents(tokenizer, encoding, batch.positions, refiners or {}, refiner_steps, weight_bits, bits)
        done: list[tuple[torch.Tensor, FeatureSet | None]] = []
        for name, z_q in latents.items():
            if only is not None and name not in only:
                continue
            images = to_uint8(in_equal_chunks(tokenizer.decode, z_q)).cpu()
            metrics = pixels.setdefault(
                name, ReconstructionMetrics(across_processes=reference.processes > 1, perceptual=perceptual)
            )
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
            features = FeatureSet.merge(parts[name]).gather()
            kernel = kid(real, features)
            found |= {"rfid": fid(real, features).value, "rkid": kernel.value, "rkid_error": kernel.error}
        if name in bits:
            found["bits_per_image"] = float(sum_across_processes(torch.cat(bits[name]).sum()[None])) / found["count"]
    return results


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
    images: Iterable[Any], count: int, network: InceptionFeatures, progress: Progress | None = None
) -> FeatureSet:
    """Features of generated images: batches as in evaluation.features, this process's share of ``count`` images."""
    bar = _counter(progress, count, process_place()[1])
    return extract_features(images, network, name="samples", progress=bar).gather()


def evaluate_samples(features: FeatureSet, real: FeatureSet) -> dict[str, Any]:
    """Every number of generated images against real ones: FID, KID, precision and recall, and, from 4,098 images on,
    FID extrapolated to infinitely many."""
    distance, kernel, manifold = fid(real, features), kid(real, features), precision_recall(real, features)
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
        found["fid_infinity"] = fid_infinity(real, features, resamples=5)._asdict()
    return found


@torch.no_grad()
def evaluate_codebook(
    tokenizer: ImageTokenizer, batches: Iterable[Batch], progress: Progress | None = None, total: int = 0
) -> CodebookUsage:
    """Usage of the codebook over a whole set of images; of several processes, over all their shares."""
    count = _counter(progress, total, process_place()[1])

    def indices() -> Iterator[torch.Tensor]:
        for batch in batches:
            yield tokenizer.encode(to_float(batch.images.to(tokenizer.device))).indices
            count(len(batch.images))

    return codebook_usage(indices(), tokenizer.quantizer.codebook_size).gather()


def evaluate(
    tokenizer: ImageTokenizer,
    draw: Callable[[int], Iterable[Any]] | None,
    reference: Reference,
    network: InceptionFeatures,
    num_samples: int = 0,
    cache: Path | None = None,
    progress: Callable[[str], AbstractContextManager[Progress]] | None = None,
    **reconstructions: Any,
) -> dict[str, Any]:
    """All numbers of one model against one reference, in one pass over real and generated images.

    With several processes every one must call it, and every one gets the whole result.

    Args:
        draw: ``draw(n)`` yields this process's share of n images (see evaluation.features); None where there is only a
            tokenizer.
        num_samples: how many to draw; 0 for as many as the reference holds.
        cache: file for the reference's features.
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

    wanted = num_samples or reference.count
    real = timed("real images", lambda report: reference.features(network, cache, report))
    reconstruction = timed(
        "reconstructions",
        lambda report: evaluate_reconstructions(tokenizer, reference, network, real, report, **reconstructions),
    )
    results = {
        "reference": vars(reference.description),
        "network": {"weights": network.description, "fingerprint": network.fingerprint, "protocol": network.protocol},
        "reconstruction": reconstruction,
    }
    if tokenizer.quantizer.has_codes:
        codebook = timed(
            "codebook", lambda report: evaluate_codebook(tokenizer, reference.batches(), report, reference.count)
        )
        results["codebook"] = codebook.summary()
    if draw is not None:
        features = timed("samples", lambda report: sample_features(draw(wanted), wanted, network, report))
        results["samples"] = evaluate_samples(features, real)
    return {**results, "seconds": seconds}


def _counter(progress: Progress | None, total: int, processes: int = 1) -> Callable[[int], None]:
    """A callback that takes the size of each of this process's batches, from one that takes (done, total)."""
    done = 0

    def add(fresh: int) -> None:
        nonlocal done
        done = min(done + fresh * processes, total) if total else done + fresh
        if progress is not None:
            progress(done, total)

    return add
