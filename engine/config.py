"""Experiments as YAML over typed dataclasses.

A config file holds only what differs from the dataclass defaults. It may name another file with ``base: other.yaml``
(relative to itself); it then holds only what differs from that file, so that two arms of an experiment share everything
else. The command line overrides values with ``section.key=value``.
"""

from __future__ import annotations

import math
import subprocess
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from scq.engine.errors import UserError
from scq.engine.files import write_file

Schema = TypeVar("Schema")
PACKAGE = Path(__file__).resolve().parents[1]  # the folder of scq; in a checkout, the root of the repository
CONFIG_ROOT = PACKAGE / "configs"


@dataclass
class OptimizerConfig:
    """AdamW from timm's optimizer factory, with no weight decay on biases, norms and codebooks."""

    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    warmup_steps: int = 100
    schedule: str = "cosine"  # constant | cosine, after a linear warm-up
    final_share: float = 0.05  # cosine ends at this share of learning_rate
    clip_norm: float = 1.0  # largest gradient norm; 0 turns clipping off


@dataclass
class LoopConfig:
    """The training loop that both stages share."""

    steps: int = 1000
    batch_size: int = 64  # images per step over all processes together
    accumulate: int = 1  # micro-batches into which a process divides its share of a step's images, to save memory
    seed: int = 0
    precision: str = "auto"  # auto | fp32 | bf16; auto is what is faster here (see resolve_precision)
    compile: bool = False
    gradient_checkpointing: bool = False  # recompute activations in the backward pass instead of storing them
    ema_decay: float = 0.999
    log_every: int = 20
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    images_every: int = 500  # steps between pictures in the run folder; 0 for no pictures
    tracker: str = "none"  # none | tensorboard | wandb, in addition to metrics.jsonl


@dataclass
class DataConfig:
    """The images that a stage is trained and scored on, and how they are read."""

    train: str = "shards/train"  # a folder of shards, or its URL
    validation: str = ""  # a folder of shards held out from training; empty for none
    flip: bool = True  # horizontal flips with probability 1/2
    workers: int = 0  # decoding processes per training process
    cache: str = ""  # folder that caches the shards of a URL; empty: every image is a range request
    # Share of the training images that may be unusable. The next image takes the place of each, the log names it once,
    # and the metrics count them. 0: the first one ends the training.
    max_bad: float = 0.0
    # full shuffles all images in every epoch; blocks shuffles the shards, then the images within blocks of shards. With
    # blocks, a batch needs only a few shards; with full, a cache would have to fetch nearly one for every image.
    shuffle: str = "full"


def load_config(schema: type[Schema], path: Path | str | None = None, overrides: list[str] | None = None) -> Schema:
    """Read ``path`` over the defaults of ``schema``, then apply ``section.key=value`` overrides.

    Raises:
        UserError: the file is missing or not a YAML mapping, a key is unknown, or a value has the wrong type or is out
            of range; the message names the key and, for files, the file.
    """
    config: Any = OmegaConf.structured(schema)
    for source in _chain(Path(path)) if path else []:
        config = _merge(config, _read_yaml(source), f"{source}")
    for override in overrides or []:
        key, separator, _ = override.partition("=")
        if not separator or not key:
            raise UserError(f"override {override!r} is not of the form section.key=value")
        try:
            parsed = OmegaConf.from_dotlist([f"{override}''" if override.endswith("=") else override])
        except (OmegaConfBaseException, YAMLError) as error:
            raise UserError(f"override {override!r} cannot be read: {_first_line(error)}") from error
        config = _merge(config, parsed, f"override {override!r}")
    try:
        found = cast(Schema, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'the config'} cannot be resolved: {_first_line(error)}") from error
    check_ranges(found)
    return _expand_home(found)


def _expand_home(config: Any) -> Any:
    """Expand a leading ~ in every path to the user's home, as a shell does."""
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            _expand_home(value)
        elif isinstance(value, str) and value.startswith("~"):
            setattr(config, each.name, str(Path(value).expanduser()))
    return config


def check_ranges(config: Any, prefix: str = "") -> None:
    """Refuse values with which no run could train, in the sections that all experiments share.

    Raises:
        UserError: a value is out of range; the message gives its full key.
    """
    for name, good, what in _ranges(config):
        if not good:
            raise UserError(f"{prefix}{name} is {getattr(config, name)!r}; it must be {what}")
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            check_ranges(value, f"{prefix}{each.name}.")


def _ranges(config: object) -> list[tuple[str, bool, str]]:
    """For each field: its name, whether its value is valid, and what it must be."""
    if isinstance(config, LoopConfig):
        counts = ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every")
        return [
            *((name, getattr(config, name) >= 1, "at least 1") for name in counts),
            *((name, getattr(config, name) >= 0, "at least 0") for name in ("keep_checkpoints", "images_every")),
            ("ema_decay", 0 <= config.ema_decay < 1, "in [0, 1)"),
        ]
    if isinstance(config, OptimizerConfig):
        betas = len(config.betas) == 2 and all(0 <= beta < 1 for beta in config.betas)
        positive = ("learning_rate", "weight_decay", "warmup_steps", "clip_norm")
        return [
            *((name, 0 <= getattr(config, name) < math.inf, "at least 0, and finite") for name in positive),
            ("betas", betas, "two numbers in [0, 1)"),
            ("final_share", 0 <= config.final_share <= 1, "in [0, 1]"),
        ]
    if isinstance(config, DataConfig):
        return [
            ("workers", config.workers >= 0, "at least 0"),
            ("max_bad", 0 <= config.max_bad < 1, "in [0, 1)"),
            ("shuffle", config.shuffle in ("full", "blocks"), "full or blocks"),
        ]
    return []


def save_config(config: object, path: Path) -> None:
    """Write the resolved config as YAML, headed by the git revision of the code that resolved it."""
    text = f"# resolved by scq at git revision {git_revision()}\n" + OmegaConf.to_yaml(OmegaConf.structured(config))
    write_file(path, text)


def as_dict(config: object) -> dict[str, Any]:
    """The config as plain dictionaries and lists."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config), resolve=True))


def git_revision() -> str:
    """The commit of this source tree; 'unknown' if scq was installed without its repository.

    A repository that merely surrounds the installed package, such as the user's own around a virtual environment, says
    nothing about scq.
    """
    if not (PACKAGE / ".git").exists():
        return "unknown"
    command = ["git", "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() or "unknown"


def _chain(path: Path) -> list[Path]:
    """The file and every file that it is based on, the base first."""
    chain: list[Path] = []
    following: Path | None = path
    while following is not None:
        if following.resolve() in [p.resolve() for p in chain]:
            raise UserError(f"config {following} is based on itself")
        chain.insert(0, following)
        base = _read_yaml(following, keep_base=True).get("base")
        following = following.parent / base if base else None
    return chain


def _read_yaml(path: Path, keep_base: bool = False) -> DictConfig:
    if not path.is_file():
        raise UserError(f"config {path} does not exist; those that come with scq are in configs/")
    try:
        config = OmegaConf.load(path)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} is not valid YAML: {_first_line(error)}") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"config {path} must hold a mapping of keys to values")
    if not keep_base:
        config.pop("base", None)
    return config


def _merge(config: DictConfig, other: DictConfig, source: str) -> DictConfig:
    try:
        return cast(DictConfig, OmegaConf.merge(config, other))
    except OmegaConfBaseException as error:
        key = error.full_key or error.key or "?"
        kind = "unknown key" if "not in" in str(error) else "wrong value for"
        raise UserError(f"{source}: {kind} {key!r}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
