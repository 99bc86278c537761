"""Images through the tokenizer and back: what each way of decoding loses, and how the codebook is used meanwhile."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from scq.data.stream import Batch
from scq.engine.measurements import MixtureSummary, Reconstruction
from scq.engine.processes import sum_across_processes
from scq.evaluation.metrics.codebook import CodebookUsage, CodeCounter, MixtureCounter
from scq.evaluation.metrics.distances import fid, kid
from scq.evaluation.metrics.features import FeatureSet, extract_features
from scq.evaluation.metrics.mixture_rate import round_mixture
from scq.evaluation.metrics.networks import FeatureNetwork
from scq.evaluation.metrics.pixels import ReconstructionMetrics
from scq.evaluation.reference import Progress, Reference, image_counter
from scq.sampling.chunks import in_equal_chunks
from scq.stage1_tokenizer.autoencoder import ImageTokenizer, to_float, to_uint8
from scq.stage1_tokenizer.quantizers import Mixture
from scq.stage2_prior.refiner import ConvexRefiner


class Reconstructions(NamedTuple):
    """What one pass over a reference finds.

    Attributes:
        ways: by what was decoded. First comes ``z_q``, then ``dominant`` where the quantizer has codes, then the
            refiners' names, then ``z_q_4_bits`` and such for rounded weights.
        codebook: usage of the codes; None where the quantizer has none.
        mixed: how the codes shared the weight of all mixtures; None where the quantizer mixed none anywhere.
    """

    ways: dict[str, Reconstruction]
    codebook: CodebookUsage | None
    mixed: MixtureSummary | None

    @property
    def soft(self) -> bool:
        """Whether the quantizer mixed codes anywhere."""
        return self.mixed is not None


@torch.no_grad()
def evaluate_reconstructions(
    tokenizer: ImageTokenizer,
    reference: Reference,
    network: FeatureNetwork | None = None,
    real: FeatureSet | None = None,
    *,
    progress: Progress | None = None,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    refiners: Mapping[str, ConvexRefiner] | None = None,
    refiner_steps: int = 8,
    weight_bits: Sequence[int] = (),
    only: Collection[str] | None = None,
) -> Reconstructions:
    """Decode every image of the reference in several ways, and compare it with the original.

    Of several processes every one must call it, and every one gets the numbers of the whole reference.

    Args:
        tokenizer: put into eval mode.
        network, real: for the FID, with the reference's features; without them it is left out.
        perceptual: for LPIPS, on the tokenizer's device, see `ReconstructionMetrics`; without it it is left out.
        refiners: by name; each decodes what it makes of the dominant codes, at their rate.
        refiner_steps: of refiners that are flows.
        weight_bits: for a soft quantizer. Each number decodes z_q with its weights rounded to so many bits, and says
            what they cost.
        only: measure no other ways than these.
    """
    tokenizer.eval()
    ways: dict[str, _Way] = {}
    count = image_counter(progress, reference.count, reference.processes)
    shared, soft = reference.processes > 1, False
    codes = CodeCounter(tokenizer.quantizer.codebook_size) if tokenizer.quantizer.has_codes else None
    mixed = MixtureCounter(tokenizer.quantizer.codebook_size)
    for batch in reference.batches():
        # In chunks of one size, so that no image's last bit depends on how many are measured together.
        encoding = tokenizer.quantizer.mix(
            in_equal_chunks(tokenizer.latents, to_float(batch.images.to(tokenizer.device)))
        )
        soft |= encoding.support.shape[-1] > 1
        if codes is not None:
            codes.update(encoding.indices)
            mixed.update(encoding.support, encoding.weights)
        done: list[tuple[Tensor, FeatureSet]] = []
        for name, z_q, bits in _decodable(
            tokenizer, encoding, batch.positions, refiners or {}, refiner_steps, weight_bits
        ):
            if only is not None and name not in only:
                continue
            way = ways.setdefault(name, _Way(ReconstructionMetrics(tokenizer.device, shared, perceptual)))
            images = to_uint8(in_equal_chunks(tokenizer.decode, z_q)).cpu()
            way.pixels.update(batch.images, images)
            if bits is None and (each := tokenizer.quantizer.bits_per_latent) is not None:
                bits = torch.full((len(z_q),), each * z_q[0, 0].numel())
            if bits is not None:
                way.bits.append(bits)
            if network is not None:
                # A hard quantizer decodes one and the same thing twice.
                features = next((known for same, known in done if torch.equal(same, images)), None)
                if features is None:
                    part = Batch(images, batch.labels, batch.positions)
                    features = extract_features([part], network, name=f"reconstructions from {name}")
                done.append((images, features))
                way.features.append(features)
        count(len(batch.images))
    found = {name: way.compute(reference, real) for name, way in ways.items()}
    usage = None if codes is None else codes.usage
    if shared:
        usage = usage if usage is None else usage.gather()
        soft = bool(sum_across_processes(torch.tensor([float(soft)])) > 0)  # of some process's images, perhaps
    return Reconstructions(found, usage, mixed.summary(shared) if soft else None)


def _decodable(
    tokenizer: ImageTokenizer,
    encoding: Mixture,
    positions: Tensor,
    refiners: Mapping[str, ConvexRefiner],
    refiner_steps: int,
    weight_bits: Sequence[int],
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """What a decoder can be given for a batch: names, latents (B, F, h, w), and the bits (B,) of rounded weights."""
    yield "z_q", encoding.z_q, None
    if tokenizer.quantizer.has_codes:
        yield "dominant", tokenizer.quantizer.lookup(encoding.indices).to(encoding.z_q.dtype), None
    for name, refiner in refiners.items():
        yield name, refiner.refine(encoding.indices, positions.to(encoding.indices.device), refiner_steps), None
    if encoding.support.shape[-1] > 1:
        for width in weight_bits:
            rounded = round_mixture(tokenizer.quantizer, encoding, width)
            yield rounded_way(width), rounded.z_q, rounded.bits


class _Way:
    """What is gathered of one way of decoding, batch by batch."""

    def __init__(self, pixels: ReconstructionMetrics):
        self.pixels = pixels
        self.features: list[FeatureSet] = []
        self.bits: list[Tensor] = []

    def compute(self, reference: Reference, real: FeatureSet | None) -> Reconstruction:
        found = self.pixels.compute()
        if self.features and real is not None:
            features = reference.whole(FeatureSet.merge(self.features))
            kernel = kid(real, features)
            distance = fid(real, features).value
            found = replace(found, rfid=distance, rkid=kernel.value, rkid_error=kernel.error)
        if self.bits:
            spent = torch.cat(self.bits).sum()[None]
            spent = float(sum_across_processes(spent) if reference.processes > 1 else spent)
            found = replace(found, bits_per_image=spent / found.count)
        return found


def rounded_way(weight_bits: int) -> str:
    """The name of decoding z_q with weights of so many bits."""
    return f"z_q_{weight_bits}_bits"


def rounded_bits(way: str) -> int | None:
    """The bits in such a name; None where it names another way."""
    found = re.fullmatch(r"z_q_(\d+)_bits", way)
    return int(found[1]) if found else None
