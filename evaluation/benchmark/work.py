"""The work of an arm's phases: trainings in the arm's own folder, and what is measured of their networks.

A method here is the work of one kind of phase (see `benchmark.phases`). It is called with the inputs that the phase
names. `ArmWork` itself knows folders and a device, and no setting. Networks are opened by the result of the phase that
trained them, and refused where other weights lie there by now: whoever did not name that phase cannot open them.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from scq.data.manifest import Classes, refuse_other_classes
from scq.data.stream import Batch, iterate_once
from scq.engine.accelerators import resolve_precision
from scq.engine.config import DataConfig
from scq.engine.errors import UserError, first_line
from scq.engine.files import write_file
from scq.engine.fingerprint import fingerprint
from scq.engine.loop import Trained
from scq.engine.measurements import CodebookSummary, Reconstruction, SampleScores, SamplingSeconds
from scq.engine.progress import progress_bar
from scq.engine.run import run
from scq.engine.tracking import read_metrics
from scq.evaluation.benchmark.config import Recipe
from scq.evaluation.benchmark.images import Images
from scq.evaluation.benchmark.plots import curve, save_images
from scq.evaluation.benchmark.results import (
    CODES,
    CodesResult,
    LikelihoodResult,
    PriorResult,
    RealImages,
    ReconstructionsResult,
    RefinerResult,
    Shards,
    SweptSettings,
    TokenizerResult,
    TokensResult,
)
from scq.evaluation.evaluate import evaluate_codebook
from scq.evaluation.metrics.codebook import codebook_usage
from scq.evaluation.metrics.distances import fid
from scq.evaluation.metrics.networks import FeatureNetwork, weights_fingerprint
from scq.evaluation.neighbours import nearest_images
from scq.evaluation.reconstructions import evaluate_reconstructions
from scq.evaluation.samples import evaluate_samples, sample_features
from scq.evaluation.score import mean_rfid
from scq.sampling.pipeline import SoftConvexPipeline
from scq.stage1_tokenizer.autoencoder import ImageTokenizer, to_float
from scq.stage1_tokenizer.model_folder import load_tokenizer
from scq.stage1_tokenizer.perceptual import PerceptualLoss
from scq.stage1_tokenizer.stage import TokenizerExperiment, TokenizerStage, reconstruction_rows
from scq.stage1_tokenizer.write_tokens import write_tokens
from scq.stage2_prior.likelihood import likelihood_bound
from scq.stage2_prior.prior_stage import PriorExperiment, PriorStage
from scq.stage2_prior.refiner_stage import RefinerExperiment, RefinerStage
from scq.stage2_prior.scheduler import UnmaskingScheduler, parse_settings

PICTURED_RECONSTRUCTIONS = 12
DRAWN = "drawn.safetensors"  # codes (N, h, w) of the samples, and the seed (N,) of each
Item = TypeVar("Item")


class Lpips:
    """LPIPS, whose network is loaded when it is first needed.

    Args:
        weights: file of VGG16's weights. LPIPS was made for one network, so the file only says where it lies.
    """

    identity = "LPIPS, VGG16"

    def __init__(self, weights: str, device: str):
        self._weights, self._device = weights, device

    def __call__(self, images: Tensor, others: Tensor) -> Tensor:
        """Mean distance () of two batches (B, 3, H, W) in [-1, 1]."""
        return self._network(images, others)

    @cached_property
    def _network(self) -> PerceptualLoss:
        return PerceptualLoss(self._weights).to(self._device)


class ArmWork:
    """Where one quantizer with one seed is trained and measured.

    Args:
        title: for people: phases' names begin with it.
        folder: for runs, models and codes.
        pictures: folder for what the report shows.
        images: the benchmark's.
        device: for what is measured; trainings choose their own.
    """

    def __init__(self, title: str, folder: Path, pictures: Path, images: Images, device: str):
        self.title, self.folder, self.pictures, self.images, self.device = title, folder, pictures, images, device

    def train_tokenizer(
        self,
        shards: Shards,
        recipe: Recipe[TokenizerExperiment],
        scored: RealImages | None = None,
        network: FeatureNetwork | None = None,
    ) -> TokenizerResult:
        """Train a tokenizer, or go on with it.

        Args:
            scored, network: for the rFID of every checkpoint; None for no learning curve.
        """
        config = replace(recipe.config, out=str(self.folder / "tokenizer"), data=self._data(recipe.config.data, shards))
        score = None if scored is None or network is None else self._rfid(scored, network)
        trained = run(TokenizerStage(config, score))
        tokenizer, log = load_tokenizer(config.out), read_metrics(Path(config.out))
        soft = log[-1].get("soft_error")
        return TokenizerResult(
            quantizer=config.quantizer.name,
            seed=config.training.seed,
            fingerprint=tokenizer.fingerprint(),
            parameters=sum(p.numel() for p in tokenizer.parameters()),
            steps=trained.steps,
            images_seen=trained.steps * config.training.batch_size,
            batch_size=config.training.batch_size,
            images_per_second=statistics.median(row["images_per_second"] for row in log),
            seconds=trained.seconds,
            curve=curve(log, ["l2", "perplexity"] if tokenizer.quantizer.has_codes else ["l2"]),
            soft_over_hard=None if soft is None else soft / log[-1]["hard_error"],
            cpu_seconds=trained.cpu_seconds,
            learned=None if score is None else curve(log, ["cpu_seconds", "rfid"]),
        )

    @torch.no_grad()
    def reconstruct(
        self,
        tokenizer: TokenizerResult,
        real: RealImages,
        network: FeatureNetwork | None,
        lpips: Lpips | None,
        weight_bits: Sequence[int],
    ) -> ReconstructionsResult:
        """Measure what the decoder makes of held-out images, and picture the first ones."""
        model, reference = self._tokenizer(tokenizer).to(self.device), self.images.open(real)
        features = None if network is None else self.images.features(real, network)
        with progress_bar(f"{self.title}: reconstructions") as bar:
            found = evaluate_reconstructions(
                model, reference, network, features, progress=bar, perceptual=lpips, weight_bits=weight_bits
            )
        images = torch.cat([batch.images for batch in islice(reference.batches(), 4)]).to(self.device)
        stats = model.quantizer(model.latents(to_float(images))).stats
        shown = reconstruction_rows(model, images[:PICTURED_RECONSTRUCTIONS])
        save_images(self.pictures / "reconstructions.png", shown)
        known = {name: float(stats[name]) for name in ("dominant_is_nearest", "dominant_weight") if name in stats}
        usage = None if found.codebook is None else found.codebook.summary()
        return ReconstructionsResult(found.soft, found.ways, usage, found.mixed, model.quantizer.token, **known)

    def write_tokens(self, tokenizer: TokenizerResult, shards: Shards) -> TokensResult:
        """Write the codes of all images, for the prior, and count them."""
        model = self._tokenizer(tokenizer)
        with progress_bar(f"{self.title}: tokenize") as bar:
            tokens = write_tokens(model, self.images.folder(shards), self.folder / "tokens", progress=bar)
        written = (tokens.read(np.array([i]), np.array([0])) for i in range(len(tokens)))
        both = f"{tokenizer.fingerprint} {shards.fingerprint}"
        usage = codebook_usage(written, tokens.codebook_size).summary()
        return TokensResult(hashlib.sha256(both.encode()).hexdigest()[:16], usage)

    def count_codes(self, tokenizer: TokenizerResult, shards: Shards) -> CodebookSummary:
        """How the codebook is used over all images."""
        batches = iterate_once(self.images.folder(shards), batch_size=64)
        with progress_bar(f"{self.title}: codebook") as bar:
            model = self._tokenizer(tokenizer).to(self.device)
            return evaluate_codebook(model, batches, bar, shards.images).summary()

    def train_prior(
        self, tokenizer: TokenizerResult, tokens: TokensResult, recipe: Recipe[PriorExperiment]
    ) -> PriorResult:
        """Train a prior over the written codes, or go on with it."""
        # `run` itself refuses tokens of another tokenizer.
        config = replace(
            recipe.config,
            out=str(self.folder / "prior"),
            tokenizer=str(self.folder / "tokenizer" / "model"),
            data=replace(recipe.config.data, train=str(self.folder / "tokens"), validation=""),
        )
        trained = run(PriorStage(config, self._tokenizer(tokenizer)))
        return PriorResult(**_of_training(trained, config), curve=curve(read_metrics(Path(config.out)), ["loss"]))

    @torch.no_grad()
    def bound_likelihood(self, prior: PriorResult, shards: Shards, count: int) -> LikelihoodResult:
        """How many bits the prior needs for the codes of so many held-out images; 0 for all."""
        pipeline = self._pipeline(prior)
        network, grids, labels = pipeline.prior, [], []
        reference = self.images.reference(shards, count)
        if network.config.num_classes:
            names = reference.stream.class_names
            held_out = Classes(self.images.folder(shards), len(names), names)
            refuse_other_classes(network.classes("the prior"), held_out, "choose splits with the same class folders")
        for batch in reference.batches():
            grids.append(pipeline.tokenizer.encode(to_float(batch.images.to(self.device))).indices.flatten(1))  # (b, L)
            labels.append(batch.labels)
        given = torch.cat(labels) if network.config.num_classes else None
        bound = likelihood_bound(network, torch.cat(grids), network.mask_token, given, passes=2, device=self.device)
        return LikelihoodResult(**bound._asdict())

    @torch.no_grad()
    def draw_codes(
        self, prior: PriorResult, sampling: UnmaskingScheduler, count: int, like: RealImages | None, seed: int
    ) -> CodesResult:
        """Draw the codes of all samples, classes in turn; ``count`` 0 for as many as there are of ``like``.

        A GPU draws them in bf16, where that is fast, as ``scq sample --precision bf16`` does. They are decoded in fp32.
        """
        count = like.images.count if like is not None and not count else count
        pipeline, started, parts = self._pipeline(prior, sampling=sampling), time.monotonic(), []
        if pipeline.device.type == "cuda" and resolve_precision("auto") == "bf16":
            pipeline.to(dtype=torch.bfloat16)
        classes, seeds = pipeline.prior.config.num_classes, torch.arange(count) + seed
        with progress_bar(f"{self.title}: draw codes") as bar:
            for part in seeds.split(_together(pipeline)):
                parts.append(pipeline.draw_tokens(part, part % classes if classes else None).cpu())
                bar(sum(map(len, parts)), count)
        seconds, drawn = time.monotonic() - started, {"tokens": torch.cat(parts), "seeds": seeds}
        write_file(self.folder / DRAWN, save(drawn))
        return CodesResult(count, sampling.steps, _fingerprint_of(drawn), seconds)

    def measure_samples(
        self,
        prior: PriorResult,
        codes: CodesResult,
        real: RealImages,
        network: FeatureNetwork,
        neighbours: RealImages | None,
        pictured: int,
        refiner: RefinerResult | None = None,
        sampling: UnmaskingScheduler | None = None,
    ) -> SampleScores:
        """Decode the drawn codes in one way, and measure the images and where the time goes.

        Args:
            neighbours: training images, to look for the nearest ones and to measure FID against; None for none.
            pictured: how many samples are shown.
            refiner: None to decode the codes as they are.
            sampling: the settings of the refiner.
        """
        pipeline, spent = self._pipeline(prior, refiner, sampling), []
        images = timed(self._decoded(codes, pipeline), spent.append)
        with progress_bar(f"{self.title}: samples") as bar:
            (features,) = sample_features(images, codes.count, [network], bar)
        scores = evaluate_samples(features, self.images.features(real, network))
        scores = replace(scores, steps=codes.steps, seconds_of=SamplingSeconds(codes.seconds, sum(spent)))
        way, shown = _way(refiner), next(self._decoded(codes, pipeline, pictured)).images
        save_images(self.pictures / f"samples_{way}.png", shown)
        if neighbours is None:
            return scores
        known = self.images.features(neighbours, network)
        found = nearest_images(features, known, self.images.open(neighbours), shown)
        save_images(self.pictures / f"neighbours_{way}.png", torch.cat([found.samples, found.neighbours]))
        return replace(
            scores,
            nearest_training_distance=found.median_distance,
            nearest_training_among=neighbours.images.count,
            fid_to_training=fid(known, features).value,
        )

    def train_refiner(
        self, tokenizer: TokenizerResult, prior: PriorResult, shards: Shards, recipe: Recipe[RefinerExperiment]
    ) -> RefinerResult:
        """Train a refiner, or go on with it."""
        kind = recipe.config.architecture.kind
        config = replace(
            recipe.config,
            out=str(self.folder / f"refiner_{kind}"),
            tokenizer=str(self.folder / "tokenizer" / "model"),
            prior=str(self.folder / "prior"),
            data=self._data(recipe.config.data, shards),
        )
        self._pipeline(prior)  # refuses other weights than those that the stage is to read
        trained = run(RefinerStage(config, self._tokenizer(tokenizer)))
        return RefinerResult(kind=kind, **_of_training(trained, config))

    def reconstruct_refined(
        self,
        prior: PriorResult,
        refiner: RefinerResult,
        real: RealImages,
        network: FeatureNetwork,
        lpips: Lpips | None,
        refiner_steps: int,
    ) -> Reconstruction:
        """Measure what the decoder makes of held-out images' codes when a refiner gives them their detail back."""
        pipeline, reference = self._pipeline(prior, refiner), self.images.open(real)
        features = self.images.features(real, network)
        with progress_bar(f"{self.title}: refined reconstructions") as bar:
            found = evaluate_reconstructions(
                pipeline.tokenizer,
                reference,
                network,
                features,
                progress=bar,
                perceptual=lpips,
                refiners={refiner.kind: pipeline.refiner},
                refiner_steps=refiner_steps,
                only=[refiner.kind],
            )
        return found.ways[refiner.kind]

    def measure_settings(
        self,
        prior: PriorResult,
        refiner: RefinerResult | None,
        real: RealImages,
        network: FeatureNetwork,
        sampling: UnmaskingScheduler,
        settings: str,
        count: int,
        seed: int,
    ) -> SweptSettings:
        """Draw so many images with ``settings`` that differ from those of ``sampling``, and measure them."""
        changed = sampling.changed(**parse_settings(settings.split()))
        pipeline = self._pipeline(prior, refiner, changed)
        with progress_bar(f"{self.title}: {settings}") as bar:
            (features,) = sample_features(pipeline.stream(count, seed), count, [network], bar)
        return SweptSettings(_way(refiner), evaluate_samples(features, self.images.features(real, network)))

    def _data(self, data: DataConfig, shards: Shards) -> DataConfig:
        return replace(data, train=self.images.folder(shards), validation=self.images.shown)

    def _rfid(self, real: RealImages, network: FeatureNetwork) -> Callable[[ImageTokenizer], float]:
        """rFID of a tokenizer under training, decoded from codes where it has codes."""
        reference, features = self.images.open(real), self.images.features(real, network)

        def measure(tokenizer: ImageTokenizer) -> float:
            way = "dominant" if tokenizer.quantizer.has_codes else "z_q"
            return mean_rfid(tokenizer, reference, network, features, only=[way])

        return measure

    def _tokenizer(self, trained: TokenizerResult) -> ImageTokenizer:
        tokenizer = load_tokenizer(self.folder / "tokenizer")
        _refuse_others(tokenizer.fingerprint(), trained, self.folder / "tokenizer")
        return tokenizer

    def _pipeline(
        self, prior: PriorResult, refiner: RefinerResult | None = None, sampling: UnmaskingScheduler | None = None
    ) -> SoftConvexPipeline:
        folder = self.folder / ("prior" if refiner is None else f"refiner_{refiner.kind}")
        chosen: dict[str, Any] = {} if sampling is None else {"scheduler": sampling}
        pipeline = SoftConvexPipeline.from_pretrained(folder / "model", self.device, **chosen)
        _refuse_others(fingerprint(pipeline.prior), prior, folder)
        if refiner is not None:
            _refuse_others(fingerprint(pipeline.refiner), refiner, folder)
        return pipeline

    def _decoded(
        self, codes: CodesResult, pipeline: SoftConvexPipeline, batch_size: int | None = None
    ) -> Iterator[Batch]:
        """Images of the drawn codes, in batches."""
        if not (self.folder / DRAWN).is_file():
            raise UserError(f"{self.folder / DRAWN} is not there: delete the file of this arm's codes in phases/")
        try:
            drawn = load_file(self.folder / DRAWN)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self.folder / DRAWN} cannot be read ({first_line(error)}): delete the file of this arm's codes in "
                "phases/ to draw them again"
            ) from error
        _refuse_others(_fingerprint_of(drawn), codes, self.folder / DRAWN)
        positions = torch.arange(len(drawn["seeds"]))
        for part in positions.split(batch_size or _together(pipeline)):
            images = pipeline.decode_tokens(drawn["tokens"][part], drawn["seeds"][part]).cpu()
            yield Batch(images, torch.full_like(part, -1), part)


def _together(pipeline: SoftConvexPipeline) -> int:
    """How many images are drawn, decoded and measured at a time."""
    return max(64, pipeline.together)


def timed(items: Iterable[Item], spent: Callable[[float], None]) -> Iterator[Item]:
    """The same items; ``spent`` is told the seconds that each took to make."""
    iterator = iter(items)
    while True:
        started = time.monotonic()
        try:
            item = next(iterator)
        except StopIteration:
            return
        spent(time.monotonic() - started)
        yield item


class _Trained(TypedDict):
    fingerprint: str
    parameters: int
    steps: int
    images_seen: int
    seconds: float


def _of_training(trained: Trained, config: PriorExperiment | RefinerExperiment) -> _Trained:
    return _Trained(
        fingerprint=fingerprint(trained.averaged),
        parameters=sum(p.numel() for p in trained.averaged.parameters()),
        steps=trained.steps,
        images_seen=trained.steps * config.training.batch_size,
        seconds=trained.seconds,
    )


def _way(refiner: RefinerResult | None) -> str:
    return CODES if refiner is None else refiner.kind


def _fingerprint_of(drawn: dict[str, Tensor]) -> str:
    return weights_fingerprint(drawn)[:16]


def _refuse_others(found: str, known: TokenizerResult | PriorResult | RefinerResult | CodesResult, where: Path) -> None:
    if found != known.fingerprint:
        raise UserError(
            f"{where} holds {found}, but the phase that made it found {known.fingerprint}: delete it, and that phase's "
            "file in phases/, to make it again"
        )
