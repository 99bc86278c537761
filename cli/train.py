"""scq train and scq tokenize: both stages, and the tokens between them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scq.cli.common import Parser, add_model, command, config_file, positive, say_once

if TYPE_CHECKING:
    from scq.engine.stage import Stage


def add_train(commands: Any) -> None:
    parser = commands.add_parser("train", help="train a tokenizer, then a prior over its tokens")
    stages = parser.add_subparsers(title="stages", metavar="STAGE", required=True, parser_class=Parser)
    for name, open_stage, help in (
        ("tokenizer", _tokenizer_stage, "stage 1: train an autoencoder with a quantizer"),
        ("prior", _prior_stage, "stage 2: train a masked transformer over the dominant codes"),
        ("refiner", _refiner_stage, "stage 2: train a network that restores the convex detail of dominant codes"),
    ):
        each = command(
            stages,
            name,
            _train(open_stage),
            help,
            "Run it again to resume from the newest checkpoint. For several processes or GPUs: "
            f"accelerate launch --module scq train {name} --config FILE",
        )
        each.add_argument(
            "--config", type=config_file, required=True, help="YAML file; those under configs/ come with the package"
        )
        each.add_argument(
            "--dry-run", action="store_true", help="print parameters, memory, steps per epoch and time; train nothing"
        )
        each.add_argument(
            "overrides", nargs="*", metavar="key=value", help="replaces a value of the config, as training.steps=1000"
        )


def _train(open_stage: Callable[[argparse.Namespace], Stage]) -> Callable[[argparse.Namespace], None]:
    def train(options: argparse.Namespace) -> None:
        from scq.engine.run import dry_run, run

        stage = open_stage(options)
        if options.dry_run:
            say_once("\n".join(dry_run(stage)))
            return
        run(stage)
        say_once(f"{Path(stage.config.out) / 'model'}")

    return train


def _tokenizer_stage(options: argparse.Namespace) -> Stage:
    from scq.engine.config import load_config
    from scq.evaluation.score import rfid_scorer
    from scq.stage1_tokenizer.stage import TokenizerExperiment, TokenizerStage

    config = load_config(TokenizerExperiment, options.config, options.overrides)
    return TokenizerStage(config, None if options.dry_run else rfid_scorer(config.data.validation, config.score))


def _prior_stage(options: argparse.Namespace) -> Stage:
    from scq.engine.config import load_config
    from scq.sampling.pipeline import sample_sheet
    from scq.stage2_prior.prior_stage import PriorExperiment, PriorStage

    return PriorStage(load_config(PriorExperiment, options.config, options.overrides), draw=sample_sheet)


def _refiner_stage(options: argparse.Namespace) -> Stage:
    from scq.engine.config import load_config
    from scq.stage2_prior.refiner_stage import RefinerExperiment, RefinerStage

    return RefinerStage(load_config(RefinerExperiment, options.config, options.overrides))


def add_tokenize(commands: Any) -> None:
    parser = command(commands, "tokenize", _tokenize, "write the dominant codes of every image as token shards")
    add_model(parser, "a tokenizer that 'scq train tokenizer' wrote")
    parser.add_argument("--data", required=True, help="shards that 'scq data pack' wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokens")
    parser.add_argument("--batch-size", type=positive, default=64, help="images that are encoded together")
    parser.add_argument(
        "--views", type=positive, default=1, help="augmented views of each image; 2 adds its mirror image"
    )
    parser.add_argument("--cache", help="folder that keeps the shards of a URL; without it, every image is a request")
    parser.add_argument(
        "--max-bad", type=float, default=0.0, help="share of images that may be unusable; the next take their place"
    )


def _tokenize(options: argparse.Namespace) -> None:
    from scq.engine.processes import join_processes, rank_and_world_size
    from scq.engine.progress import progress_bar
    from scq.stage1_tokenizer.model_folder import load_tokenizer
    from scq.stage1_tokenizer.write_tokens import write_tokens

    tokenizer = load_tokenizer(options.model)
    join_processes()
    with progress_bar("tokenize", quiet=rank_and_world_size()[0] > 0) as bar:
        settings = (options.batch_size, options.views, options.cache, options.max_bad)
        tokens = write_tokens(tokenizer, options.data, options.out, *settings, progress=bar)
    h, w = tokens.grid
    say_once(f"{options.out}: {len(tokens)} grids of {h}x{w} codes out of {tokens.codebook_size}")
