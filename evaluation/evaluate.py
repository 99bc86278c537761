"""Everything that is measured of one model: ``scq evaluate``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from data.stream import Batch, ImageStream
from engine.errors import UserError
from evaluation.features import FeatureSet, RealSet, cached_features, extract_features
from evaluation.inception import InceptionFeatures
from evaluation.metrics import CodebookUsage, ReconstructionMetrics, codebook_usage, fid, kid
from stage1_tokenizer.autoencoder import ImageTokenizer, to_float, to_uint8

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
        self.stream = ImageStream(shards, batch_size=batch_size, seed=_REFERENCE_SEED)
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
        left = self.count
        for batch in islice(self.stream.iterate(), -(-self.count // self.batch_size)):
            yield Batch(*(field[:left] for field in batch))
            left -= self.batch_size

    def features(
        self, network: InceptionFeatures, cache: Path | None = None, progress: Progress | None = None
    ) -> FeatureSet:
        """Inception features, from the file ``cache`` where an earlier run left them."""
        count = _counter(progress, self.count)
        if cache is not None:
            return cached_features(cache, self.description, network, self.batches, count)
        return extract_features(self.batches(), network, name="real", progress=count)


@torch.no_grad()
def evaluate_reconstructions(
    tokenizer: ImageTokenizer,
    reference: Reference,
    network: InceptionFeatures | None,
    real: FeatureSet | None,
    progress: Progress | None = None,
    perceptual: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Reconstructions from z_q and from the dominant codes alone, against the originals.

    Args:
        network, real: for the FID; without them it is left out.
        perceptual: for LPIPS; without it it is left out.

    Returns:
        ``z_q`` and, where the quantizer has codes, ``dominant``, each with mse, psnr, ssim, lpips, rfid, rkid.
    """
    tokenizer.eval()
    names = ("z_q", "dominant") if tokenizer.quantizer.has_codes else ("z_q",)
    pixels = {name: ReconstructionMetrics(perceptual=perceptual) for name in names}
    parts: dict[str, list[FeatureSet]] = {name: [] for name in names}
    count = _counter(progress, reference.count)
    for batch in reference.batches():
        encoding = tokenizer.encode(to_float(batch.images.to(tokenizer.device)))
        decoded = {"z_q": to_uint8(tokenizer.decode(encoding.z_q)).cpu()}
        if "dominant" in names:
            decoded["dominant"] = to_uint8(tokenizer.decode_indices(encoding.indices)).cpu()
        for name, images in decoded.items():
            pixels[name].update(batch.images, images)
            if network is None:
                continue
            if name == "dominant" and torch.equal(decoded["z_q"], images):
                parts[name].append(parts["z_q"][-1])  # a hard quantizer decodes one and the same thing
                continue
            part = Batch(images, batch.labels, batch.positions)
            parts[name].append(extract_features([part], network, name=f"reconstructions from {name}"))
        count(len(batch.images))
    results = {name: pixels[name].compute()._asdict() for name in names}
    for name, sets in parts.items():
        if sets:
            features = FeatureSet.merge(sets)
            kernel = kid(real, features)
            results[name] |= {"rfid": fid(real, features).value, "rkid": kernel.value, "rkid_error": kernel.error}
    return results


def evaluate_samples(
    images: Iterable[torch.Tensor],
    count: int,
    network: InceptionFeatures,
    real: FeatureSet,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """FID and KID of generated images (uint8 batches) against the features of real ones."""
    features = extract_features(images, network, name="samples", limit=count, progress=_counter(progress, count))
    distance, kernel = fid(real, features), kid(real, features)
    return {
        "count": features.count,
        "fid": distance.value,
        "fid_biased": distance.biased,
        "fid_note": distance.note,
        "kid": kernel.value,
        "kid_error": kernel.error,
        "kid_subsets": kernel.subsets,
        "kid_subset_size": kernel.subset_size,
    }


@torch.no_grad()
def evaluate_codebook(
    tokenizer: ImageTokenizer, batches: Iterable[Batch], progress: Progress | None = None, total: int = 0
) -> CodebookUsage:
    """Usage of the codebook over a whole set of images."""
    count = _counter(progress, total)

    def indices() -> Iterator[torch.Tensor]:
        for batch in batches:
            yield tokenizer.encode(to_float(batch.images.to(tokenizer.device))).indices
            count(len(batch.images))

    return codebook_usage(indices(), tokenizer.quantizer.codebook_size)


def evaluate(
    tokenizer: ImageTokenizer,
    draw: Callable[[int], Iterable[torch.Tensor]] | None,
    reference: Reference,
    network: InceptionFeatures,
    num_samples: int = 0,
    cache: Path | None = None,
    progress: Callable[[str], AbstractContextManager[Progress]] | None = None,
) -> dict[str, Any]:
    """All numbers of one model against one reference.

    Args:
        draw: ``draw(n)`` yields n images as uint8 batches; None where there is only a tokenizer.
        num_samples: how many to draw; 0 for as many as the reference holds.
        cache: file for the reference's features.
        progress: opens a progress bar from the name of what runs.

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
        "reconstructions", lambda report: evaluate_reconstructions(tokenizer, reference, network, real, report)
    )
    codebook = timed(
        "codebook", lambda report: evaluate_codebook(tokenizer, reference.batches(), report, reference.count)
    )
    results = {
        "reference": vars(reference.description),
        "network": {"weights": network.description, "fingerprint": network.fingerprint, "protocol": network.protocol},
        "reconstruction": reconstruction,
        "codebook": codebook.summary(),
    }
    if draw is not None:
        results["samples"] = timed(
            "samples", lambda report: evaluate_samples(draw(wanted), wanted, network, real, report)
        )
    return {**results, "seconds": seconds}


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """A callback that takes the size of each batch, from one that takes (done, total)."""
    done = 0

    def add(fresh: int) -> None:
        nonlocal done
        done += fresh
        if progress is not None:
            progress(done, total)

    return add
