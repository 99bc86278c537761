"""One arm of a benchmark: one quantizer with one seed through both stages, phase by phase."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from scq.data.stream import Batch, ImageStream, iterate_once
from scq.engine.config import as_dict
from scq.engine.files import write_file
from scq.engine.fingerprint import fingerprint
from scq.engine.loop import Trained
from scq.engine.progress import progress_bar
from scq.engine.tracking import read_metrics
from scq.evaluation.benchmark.phases import Phases
from scq.evaluation.benchmark.plots import curve, save_images
from scq.evaluation.benchmark.tokenizers import Yardsticks, measure_tokenizer
from scq.evaluation.evaluate import Reference, evaluate_codebook, evaluate_samples, sample_features
from scq.evaluation.metrics.features import FeatureSet
from scq.evaluation.metrics.inception import InceptionFeatures
from scq.evaluation.metrics.scores import codebook_usage
from scq.evaluation.neighbours import nearest_images
from scq.sampling.pipeline import SoftConvexPipeline
from scq.sampling.scheduler import UnmaskingScheduler, parse_settings
from scq.stage1_tokenizer.autoencoder import ImageTokenizer, to_float, to_uint8
from scq.stage1_tokenizer.train import TokenizerExperiment, load_tokenizer
from scq.stage1_tokenizer.write_tokens import write_tokens
from scq.stage2_prior.likelihood import LikelihoodBound, likelihood_bound
from scq.stage2_prior.train import PriorExperiment, train_prior
from scq.stage2_prior.train_refiner import RefinerExperiment, train_refiner
from scq.stage2_prior.transformer import MaskedTransformer

PICTURED_RECONSTRUCTIONS = 12
DRAWN = "drawn.safetensors"  # codes (N, h, w) of the samples, and the seconds that drawing them took
CODES = "codes"  # the way of decoding samples that every arm has: their dominant codes as they are


@dataclass
class SampleBudget:
    """How much is drawn, and with which settings."""

    count: int  # images for the metrics
    pictured: int
    seed: int
    sweep: list[str]  # further settings to measure, each as "steps=8 sampler=halton", with `sweep_count` images
    sweep_count: int
    scheduler: UnmaskingScheduler
    against: dict[str, Any]  # description of the real images that samples are measured against


class Arm:
    """One quantizer, one seed.

    Args:
        name: of the arm's phases.
        folder: for its runs and models.
        pictures: folder for what the report shows.
        tokenizer, prior, refiners: experiments; their folders and data are set here. No prior: reconstructions only.
        training_set: features of training images, to look for memorised ones; None to leave that out.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        pictures: Path,
        tokenizer: TokenizerExperiment,
        prior: PriorExperiment | None,
        refiners: dict[str, RefinerExperiment],
        yardsticks: Yardsticks,
        samples: SampleBudget,
        shards: dict[str, Path],
        training_set: FeatureSet | None = None,
    ):
        self.name, self.folder, self.pictures = name, folder, pictures
        self.shards, self.training_images = shards, ImageStream(shards["train"], batch_size=1).fingerprint
        self.tokenizer, self.prior, self.refiners = tokenizer, prior, refiners
        self.yardsticks, self.samples, self.training_set = yardsticks, samples, training_set
        tokenizer.out = str(folder / "tokenizer")
        for each in (tokenizer, *refiners.values()):
            each.data.train, each.data.validation = str(shards["train"]), str(shards["test"])
        if prior is not None:
            prior.out, prior.tokenizer = str(folder / "prior"), str(folder / "tokenizer" / "model")
            prior.data.train = str(folder / "tokens")
        for kind, refiner in refiners.items():
            refiner.out, refiner.tokenizer = str(folder / f"refiner_{kind}"), str(folder / "tokenizer" / "model")
            refiner.prior, refiner.architecture.kind = str(folder / "prior"), kind

    def run(self, phases: Phases, network: InceptionFeatures, real: FeatureSet) -> dict[str, Any]:
        """Every number of this arm; what is finished is reused."""
        name, place = self.name, self._place
        measured = self.yardsticks.description
        row = phases.run(f"{name} tokenizer", [place(self.tokenizer), measured], self._measure_tokenizer)
        found: dict[str, Any] = {"tokenizer": row}
        if self.prior is None:
            return found
        # Every key holds the weights that its phase works with: their results must not outlive them.
        tokenizer = row["fingerprint"]
        found["codebook"] = phases.run(f"{name} tokens", [tokenizer], self._tokenize)
        found["prior"] = phases.run(f"{name} prior", [tokenizer, place(self.prior)], self._train_prior)
        weights = [tokenizer, found["prior"]["fingerprint"]]
        known = self.training_set.count if self.training_set else 0
        drawn = [*weights, measured, as_dict(self.samples.scheduler), self.samples.count, self.samples.seed]
        drawn += [self.samples.pictured, self.samples.against, known]
        found["samples"] = {
            CODES: phases.run(f"{name} samples", drawn, lambda: self._measure_samples(CODES, network, real))
        }
        for kind, refiner in self.refiners.items():
            trained = phases.run(
                f"{name} {kind} refiner", [*weights, place(refiner)], lambda k=kind: self._train_refiner(k)
            )
            settings = [trained["fingerprint"], *drawn]
            reconstructed = phases.run(
                f"{name} {kind} reconstructions", settings, lambda k=kind: self._measure_refined(k)
            )
            found["samples"][kind] = {"refiner": trained, "reconstruction": reconstructed["refined"]} | phases.run(
                f"{name} {kind} samples", settings, lambda k=kind: self._measure_samples(k, network, real)
            )
        refined = [way["refiner"] for way in found["samples"].values() if "refiner" in way]
        for settings in self.samples.sweep:
            budget = [*drawn, [way["fingerprint"] for way in refined], settings, self.samples.sweep_count]
            found.setdefault("sweep", {})[settings] = phases.run(
                f"{name} {settings}", budget, lambda s=settings: self._measure_settings(s, network, real)
            )
        return found

    def _place(self, experiment: Any) -> list[Any]:
        """What the result of a training depends on; not where on this disk it lies."""
        places = {"out", "tokenizer", "prior", "data"}
        choices = {key: value for key, value in as_dict(experiment).items() if key not in places}
        return [choices, as_dict(experiment)["data"].get("flip"), self.training_images]

    def _measure_tokenizer(self) -> dict[str, Any]:
        row = measure_tokenizer(self.tokenizer, self.yardsticks)
        tokenizer = load_tokenizer(self.tokenizer.out)
        images = next(self.yardsticks.reference.batches()).images[:PICTURED_RECONSTRUCTIONS]
        with torch.no_grad():
            encoding = tokenizer.encode(to_float(images))
            rows = [images, to_uint8(tokenizer.decode(encoding.z_q))]
            if tokenizer.quantizer.has_codes:
                rows.append(to_uint8(tokenizer.decode_indices(encoding.indices)))
        save_images(self.pictures / "reconstructions.png", torch.cat(rows))
        return row

    def _tokenize(self) -> dict[str, Any]:
        tokenizer = load_tokenizer(self.tokenizer.out)
        with progress_bar("tokenize") as bar:
            tokens = write_tokens(tokenizer, self.shards["train"], self.prior.data.train, progress=bar)
        held_out = evaluate_codebook(tokenizer, iterate_once(self.shards["test"], batch_size=64))
        everything = (tokens.read(np.array([i]), np.array([0])) for i in range(len(tokens)))
        return {"train": codebook_usage(everything, tokens.codebook_size).summary(), "held_out": held_out.summary()}

    def _train_prior(self) -> dict[str, Any]:
        tokenizer = load_tokenizer(self.tokenizer.out)
        trained = train_prior(self.prior, tokenizer.fingerprint(), tokenizer.codes())
        SoftConvexPipeline(tokenizer, trained.averaged, scheduler=self.samples.scheduler).save_pretrained(
            self.folder / "model"
        )
        bound = self._likelihood(tokenizer, trained.averaged)
        losses = curve(read_metrics(Path(self.prior.out)), ["loss"])
        return _training(trained, self.prior) | {"held_out_likelihood": bound._asdict(), "curve": losses}

    def _likelihood(self, tokenizer: ImageTokenizer, prior: MaskedTransformer) -> LikelihoodBound:
        """On the codes of the reference images."""
        grids, labels = [], []
        with torch.no_grad():
            for batch in self.yardsticks.reference.batches():
                grids.append(tokenizer.encode(to_float(batch.images)).indices.flatten(1))
                labels.append(batch.labels)
        given = torch.cat(labels) if prior.config.num_classes else None
        on = self.yardsticks.device
        return likelihood_bound(prior.to(on), torch.cat(grids), prior.mask_token, given, passes=2, device=on)

    def _train_refiner(self, kind: str) -> dict[str, Any]:
        pipeline = self._pipeline()
        trained = train_refiner(self.refiners[kind], pipeline.tokenizer, pipeline.prior)
        parts = pipeline.tokenizer.cpu(), pipeline.prior.cpu(), trained.averaged.cpu(), pipeline.scheduler
        SoftConvexPipeline(*parts).save_pretrained(self.folder / f"model_{kind}")
        return _training(trained, self.refiners[kind])

    def _measure_refined(self, kind: str) -> dict[str, Any]:
        pipeline = self._pipeline(kind)
        steps = pipeline.scheduler.refiner_steps
        return self.yardsticks.reconstructions(
            pipeline.tokenizer, refiners={"refined": pipeline.refiner}, refiner_steps=steps, only=("refined",)
        )

    def _measure_samples(self, way: str, network: InceptionFeatures, real: FeatureSet) -> dict[str, Any]:
        """The metrics of samples whose codes are drawn once and then decoded in each way; and where the time goes."""
        pipeline, budget = self._pipeline(way), self.samples
        # Every way of decoding takes the codes that the first one drew.
        seconds = {"prior": self._draw(pipeline) if way == CODES else self._drawn()["seconds"].item(), "decode": 0.0}
        with progress_bar(f"{self.name}: samples") as bar:
            batches = timed(self._decoded(pipeline), lambda spent: seconds.update(decode=seconds["decode"] + spent))
            features = sample_features(batches, budget.count, network, bar)
        results = evaluate_samples(features, real) | {"seconds_of": seconds, "steps": budget.scheduler.steps}
        pictured = next(self._decoded(pipeline, budget.pictured)).images
        save_images(self.pictures / f"samples_{way}.png", pictured)
        if self.training_set is not None:
            results |= self._nearest(features, way, pictured)
        return results

    def _draw(self, pipeline: SoftConvexPipeline) -> float:
        """Draw the codes of all samples; returns the seconds it took."""
        budget, started, parts = self.samples, time.monotonic(), []
        classes = pipeline.prior.config.num_classes
        with progress_bar(f"{self.name}: draw codes") as bar:
            for first in range(0, budget.count, 64):
                seeds = torch.arange(first, min(first + 64, budget.count)) + budget.seed
                labels = seeds % classes if classes else None
                with torch.no_grad():
                    parts.append(pipeline.draw_tokens(seeds, labels).cpu())
                bar(first + len(seeds), budget.count)
        seconds = time.monotonic() - started
        write_file(self.folder / DRAWN, save({"tokens": torch.cat(parts), "seconds": torch.tensor(seconds)}))
        return seconds

    def _drawn(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / DRAWN)

    def _decoded(self, pipeline: SoftConvexPipeline, batch_size: int = 64) -> Any:
        tokens = self._drawn()["tokens"]
        for first in range(0, len(tokens), batch_size):
            part = tokens[first : first + batch_size]
            positions = torch.arange(first, first + len(part))
            images = pipeline.decode_tokens(part, positions + self.samples.seed).cpu()
            yield Batch(images, torch.full_like(positions, -1), positions)

    def _measure_settings(self, settings: str, network: InceptionFeatures, real: FeatureSet) -> dict[str, Any]:
        way = next(iter(self.refiners)) if self.refiners else CODES
        pipeline, count = self._pipeline(way), self.samples.sweep_count
        pipeline.register_modules(scheduler=pipeline.scheduler.changed(**parse_settings(settings.split())))
        with progress_bar(f"{self.name}: {settings}") as bar:
            features = sample_features(pipeline.stream(count, self.samples.seed), count, network, bar)
        return evaluate_samples(features, real) | {"way": way}

    def _nearest(self, features: FeatureSet, way: str, pictured: torch.Tensor) -> dict[str, Any]:
        """How near samples come to training images, and the pairs as a picture."""
        training = Reference(self.shards["train"], self.training_set.count)
        found = nearest_images(features, self.training_set, training, pictured)
        save_images(self.pictures / f"neighbours_{way}.png", torch.cat([found.samples, found.neighbours]))
        return {"nearest_training_distance": found.median_distance}

    def _pipeline(self, way: str = CODES) -> SoftConvexPipeline:
        return SoftConvexPipeline.from_pretrained(
            self.folder / ("model" if way == CODES else f"model_{way}"), self.yardsticks.device
        )


def _training(trained: Trained, experiment: PriorExperiment | RefinerExperiment) -> dict[str, Any]:
    return {
        "fingerprint": fingerprint(trained.averaged),
        "parameters": trained.averaged.num_parameters(),
        "steps": trained.steps,
        "images_seen": trained.steps * experiment.training.batch_size,
        "seconds": trained.seconds,
    }


def timed(batches: Any, spent: Callable[[float], None]) -> Any:
    """The same batches; ``spent`` gets the seconds that each took to make."""
    iterator = iter(batches)
    while True:
        started = time.monotonic()
        try:
            batch = next(iterator)
        except StopIteration:
            return
        spent(time.monotonic() - started)
        yield batch
