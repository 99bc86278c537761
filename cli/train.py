"""scq train and scq tokenize: both stages, and the tokens between them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scq.cli.common import Parser, add_model, command, device, positive, say_once
from scq.engine.errors import UserError


def add_train(commands: Any) -> None:
    parser = commands.add_parser("train", help="train a tokenizer, then a prior over its tokens")
    stages = parser.add_subparsers(title="stages", metavar="STAGE", required=True, parser_class=Parser)
    for stage, run, help in (
        ("tokenizer", _train_tokenizer, "stage 1: train an autoencoder with a quantizer"),
        ("prior", _train_prior, "stage 2: train a masked transformer over the dominant codes"),
        ("refiner", _train_refiner, "stage 2: train a network that gives dominant codes their convex detail back"),
    ):
        each = command(
            stages,
            stage,
            run,
            help,
            "Run again, it goes on from its newest checkpoint. For several processes or GPUs: "
            f"accelerate launch --module cli.main train {stage} --config FILE",
        )
        each.add_argument("--config", type=Path, required=True, help="YAML file; the ready ones are in configs/")
        each.add_argument(
            "--dry-run", action="store_true", help="print parameters, memory, steps per epoch, time; train nothing"
        )
        each.add_argument("overrides", nargs="*", metavar="key=value", help="for example training.steps=1000")


def _train_tokenizer(options: argparse.Namespace) -> None:
    from scq.engine.config import load_config
    from scq.engine.processes import join_processes, rank_and_world_size
    from scq.stage1_tokenizer.train import TokenizerExperiment, estimate_tokenizer, train_tokenizer

    config = load_config(TokenizerExperiment, options.config, options.overrides)
    if options.dry_run:
        say_once("\n".join(estimate_tokenizer(config)))
        return
    if config.score.images and not config.data.validation:
        raise UserError("score.images needs held-out images: set data.validation to their shards")
    join_processes()
    # The loop scores in the main process alone, while the others wait.
    scores = config.score.images and rank_and_world_size()[0] == 0
    train_tokenizer(config, _rfid(config) if scores else None)
    say_once(f"{Path(config.out) / 'model'}")


def _rfid(config: Any) -> Any:
    """A function from a tokenizer to its rFID on held-out images, the mean of that of z_q and of dominant codes.

    It works in this process alone.
    """
    from scq.engine.progress import say
    from scq.evaluation.evaluate import Reference, evaluate_reconstructions
    from scq.evaluation.metrics.inception import load_inception

    reference = Reference(config.data.validation, config.score.images, alone=True)
    network = load_inception(config.score.inception_weights or None, device())
    say(f"Inception: {network.description}")
    real = reference.features(network)

    def measure(tokenizer: Any) -> float:
        found = evaluate_reconstructions(tokenizer, reference, network, real).ways
        return sum(each["rfid"] for each in found.values()) / len(found)

    return measure


def _train_prior(options: argparse.Namespace) -> None:
    from scq.engine.config import load_config
    from scq.engine.pictures import picture_grid
    from scq.sampling.pipeline import SoftConvexPipeline
    from scq.stage1_tokenizer.train import load_tokenizer
    from scq.stage2_prior.train import PriorExperiment, estimate_prior, train_prior

    config = load_config(PriorExperiment, options.config, options.overrides)
    if not config.tokenizer:
        raise UserError("tokenizer is empty: name the tokenizer's folder, for example tokenizer=runs/tokenizer")
    tokenizer = load_tokenizer(config.tokenizer)
    if options.dry_run:
        say_once("\n".join(estimate_prior(config, tokenizer.codes())))
        return

    def draw(prior: Any) -> Any:
        # Not pipeline.stream: it divides the images among processes, and the main one draws alone.
        pipeline, classes = SoftConvexPipeline(tokenizer, prior).to(prior.device), prior.config.num_classes
        labels = [i % classes for i in range(32)] if classes else None
        return picture_grid(pipeline(32, labels, seed=0, batch_size=32, output_type="pt").images, columns=8)

    trained = train_prior(config, tokenizer.fingerprint(), tokenizer.codes(), draw)
    facts = _facts_of_tokenizer(Path(config.tokenizer))

    def save(prior: Any, folder: Path, steps: int) -> None:
        pipeline = SoftConvexPipeline(tokenizer, prior)
        pipeline.measured = {"training": facts | _facts("prior", steps, config)}
        pipeline.save_pretrained(folder)

    _export(trained, Path(config.out), save)


def _train_refiner(options: argparse.Namespace) -> None:
    from scq.engine.config import load_config
    from scq.sampling.model_card import with_numbers
    from scq.sampling.pipeline import SoftConvexPipeline
    from scq.stage1_tokenizer.train import export, load_tokenizer
    from scq.stage2_prior.train_refiner import RefinerExperiment, estimate_refiner, train_refiner

    config = load_config(RefinerExperiment, options.config, options.overrides)
    if not config.tokenizer:
        raise UserError("tokenizer is empty: name the tokenizer's folder, for example tokenizer=runs/tokenizer")
    tokenizer = load_tokenizer(config.tokenizer)
    pipeline = SoftConvexPipeline.from_pretrained(config.prior) if config.prior else None
    prior = None if pipeline is None else pipeline.prior
    if options.dry_run:
        say_once("\n".join(estimate_refiner(config, tokenizer, prior)))
        return
    trained = train_refiner(config, tokenizer, prior)

    def save(refiner: Any, folder: Path, steps: int) -> None:
        if pipeline is None:
            export(refiner, folder)
        else:
            facts = pipeline.measured.get("training", {}) | _facts("refiner", steps, config)
            refined = SoftConvexPipeline(tokenizer.cpu(), pipeline.prior.cpu(), refiner, pipeline.scheduler)
            refined.measured = with_numbers(pipeline.measured, {"training": facts})
            refined.save_pretrained(folder)

    _export(trained, Path(config.out), save)


def _export(trained: Any, out: Path, save: Callable[[Any, Path, int], None]) -> None:
    """Save the averaged weights of the last step to ``out/model``, and those of the best checkpoint to ``out/best``."""
    from accelerate import PartialState
    from safetensors.torch import load_model

    if PartialState().is_main_process:
        network = trained.averaged.cpu()
        save(network, out / "model", trained.steps)
        if trained.best is not None:
            load_model(network, str(trained.best / "ema.safetensors"))
            save(network, out / "best", int(trained.best.name.removeprefix("step_")))
    say_once(f"{out / 'model'}")


def _facts(stage: str, steps: int, config: Any) -> dict[str, Any]:
    """How one stage was trained, for the model card (see sampling.model_card)."""
    from scq.engine.config import git_revision

    seen = {"steps": steps, "images_seen": steps * config.training.batch_size}
    return {"revision": git_revision(), stage: seen}


def _facts_of_tokenizer(folder: Path) -> dict[str, Any]:
    """As far as its run folder is still there, and its shards."""
    from scq.data.shards import ShardSet
    from scq.engine.config import load_config
    from scq.engine.errors import DataError
    from scq.engine.tracking import read_metrics
    from scq.stage1_tokenizer.train import TokenizerExperiment

    facts: dict[str, Any] = {}
    run = next((each for each in (folder, folder.parent) if (each / "config.yaml").is_file()), None)
    if run is None:
        return facts
    try:
        config = load_config(TokenizerExperiment, run / "config.yaml")
        if folder.name != "best":  # the weights of some step of the run
            facts |= _facts("tokenizer", read_metrics(run)[-1]["step"], config)
        source = ShardSet(config.data.train).manifest["source"]
        facts["dataset"] = source.get("name") or source["format"]
    except (
        UserError,
        DataError,
        IndexError,
        OSError,
    ) as error:  # another version's config, no log, shards that are gone
        say_once(f"the model's card will not say all about its tokenizer: {error}")
    return facts


def add_tokenize(commands: Any) -> None:
    parser = command(commands, "tokenize", _tokenize, "write the dominant codes of every image as token shards")
    add_model(parser, "a tokenizer that 'scq train tokenizer' wrote")
    parser.add_argument("--data", required=True, help="shards that 'scq data pack' wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokens")
    parser.add_argument("--batch-size", type=positive, default=64, help="images at a time")
    parser.add_argument(
        "--views", type=positive, default=1, help="augmented views of each image; 2 adds its mirror image"
    )
    parser.add_argument("--cache", help="folder that keeps the shards of a URL; without it every image is a request")


def _tokenize(options: argparse.Namespace) -> None:
    from scq.engine.processes import join_processes, rank_and_world_size
    from scq.engine.progress import progress_bar
    from scq.stage1_tokenizer.train import load_tokenizer
    from scq.stage1_tokenizer.write_tokens import write_tokens

    tokenizer = load_tokenizer(options.model)
    join_processes()
    with progress_bar("tokenize", quiet=rank_and_world_size()[0] > 0) as bar:
        settings = (options.batch_size, options.views, options.cache)
        tokens = write_tokens(tokenizer, options.data, options.out, *settings, progress=bar)
    h, w = tokens.grid
    say_once(f"{options.out}: {len(tokens)} grids of {h}x{w} codes out of {tokens.codebook_size}")
