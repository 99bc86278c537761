"""Experiments as YAML over typed dataclasses.

A config file holds only what differs from the dataclass defaults. It may name another file with ``base: other.yaml``
(relative to itself); it then holds only what differs from that file, so that two arms of an experiment share everything
else. The command line overrides values with ``section.key=value``.

A user's own config and overrides may refer to the environment (``${oc.env:SHARDS}``) and to each other. What is saved
keeps such a reference, and the run uses what it stands for. A config that lies in a folder of a run or a model may be
somebody else's: it is read as plain data, in which nothing is looked up (`read_saved_config`).
"""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from scq.engine import checks
from scq.engine.errors import UserError, first_line
from scq.engine.files import expand_home, real_path, write_file
from scq.engine.plain_yaml import declared_type, leaves, parse_text, read_yaml, write_yaml
from scq.engine.references import Referenced, shown

Schema = TypeVar("Schema")
PACKAGE = Path(__file__).resolve().parents[1]  # the folder of scq; in a checkout, the root of the repository
CONFIG_ROOT = PACKAGE / "configs"
REVISION = "REVISION"  # file in the package that names the commit, where a bundle brought it without its repository
LARGEST = 2**31 - 1  # whole number in a config, by value; seeds are made of 64 bits, of which a step needs its own
MOST_IMAGES = 2**20  # in a batch
Ranges = list[tuple[str, bool, str]]  # for fields: the name, whether the value is valid, and what it must be


@runtime_checkable
class Section(Protocol):
    """A part of a config that knows which values no run could use."""

    def ranges(self) -> Ranges: ...


OPTIMIZERS = ("adamw", "muon")


@dataclass
class OptimizerConfig:
    """An optimizer from timm's factory, with no weight decay on biases, norms and codebooks."""

    # adamw | muon. Muon (docs/training.md) takes matrices and convolutions, and leaves biases, norms and codebooks to
    # AdamW. Its steps are scaled to the size of AdamW's, so learning rates mean the same.
    name: str = "adamw"
    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    warmup_steps: int = 100
    schedule: str = "cosine"  # constant | cosine, after a linear warm-up
    final_share: float = 0.05  # cosine ends at this share of learning_rate
    clip_norm: float = 1.0  # largest gradient norm; 0 turns clipping off

    def ranges(self) -> Ranges:
        betas = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        positive = ("learning_rate", "weight_decay", "warmup_steps", "clip_norm")
        return [
            ("name", self.name in OPTIMIZERS, " or ".join(OPTIMIZERS)),
            *((name, 0 <= getattr(self, name) < math.inf, "at least 0, and finite") for name in positive),
            ("betas", betas, "two numbers in [0, 1)"),
            ("final_share", 0 <= self.final_share <= 1, "in [0, 1]"),
        ]


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

    def ranges(self) -> Ranges:
        counts = ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every")
        return [
            *((name, getattr(self, name) >= 1, "at least 1") for name in counts),
            *((name, getattr(self, name) >= 0, "at least 0") for name in ("keep_checkpoints", "images_every")),
            ("batch_size", self.batch_size <= MOST_IMAGES, f"at most {MOST_IMAGES}"),
            ("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)"),
        ]


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

    def ranges(self) -> Ranges:
        return [
            ("workers", self.workers >= 0, "at least 0"),
            ("workers", self.workers <= checks.MOST_WORKERS, f"at most {checks.MOST_WORKERS}"),
            ("max_bad", 0 <= self.max_bad < 1, "in [0, 1)"),
            ("shuffle", self.shuffle in ("full", "blocks"), "full or blocks"),
        ]


def load_config(schema: type[Schema], path: Path | str | None = None, overrides: list[str] | None = None) -> Schema:
    """Read the user's own config ``path`` over the defaults of ``schema``, then apply ``section.key=value`` overrides.

    References are resolved; the config remembers them for `save_config` (see `Referenced`).

    Raises:
        UserError: the file is missing or not a YAML mapping, a key is unknown, or a value has the wrong type or is out
            of range; the message names the key and, for files, the file.
    """
    config: Any = OmegaConf.structured(schema)
    for source, tree in _chain(Path(path), schema) if path else []:
        config = _merge(config, tree, f"{source}")
    for override in overrides or []:
        # One that stood in a benchmark's config was resolved there, and is here again what it was.
        text = override.reference if isinstance(override, Referenced) else override
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise UserError(f"override {text!r} is not of the form section.key=value")
        try:
            parsed = OmegaConf.create()
            OmegaConf.update(parsed, key, parse_text(value, declared_type(schema, key)))
            tree = cast(dict[str, Any], OmegaConf.to_container(parsed, resolve=False))
        except (OmegaConfBaseException, YAMLError) as error:
            raise UserError(f"override {text!r} cannot be read: {first_line(error)}") from error
        config = _merge(config, tree, f"override {text!r}")
    try:
        found = cast(Schema, OmegaConf.to_object(config))
        found = _remember(found, _saved_tree(OmegaConf.to_container(config, resolve=False)))
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'the config'} cannot be resolved: {first_line(error)}") from error
    check_ranges(found)
    return _expand_home(found)


def read_saved_config(schema: type, path: Path) -> dict[str, Any]:
    """The config that a run saved, as plain values: nothing in it is looked up, and no other file is read.

    Args:
        schema: its defaults stand where the file is silent.

    Raises:
        UserError: the file cannot be read, is not a YAML mapping, or has aliases.
    """
    return _over(saved_form(schema()), read_yaml(path, schema, aliases=False))


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            both[key] = _over(below[key], above[key])
    return both


def _map_text(value: Any, change: Callable[[str], Any]) -> Any:
    """Apply ``change`` to every text in nested mappings and lists."""
    if isinstance(value, dict):
        return {key: _map_text(each, change) for key, each in value.items()}
    if isinstance(value, list):
        return [_map_text(each, change) for each in value]
    return change(value) if isinstance(value, str) else value


def _saved_tree(tree: Any) -> Any:
    """A config with references to its own keys replaced by what these hold, and all other references as they stand."""
    calls: list[str] = []

    def hide(text: str) -> str:
        """Replace ``${resolver:...}``, which would look something up, with a mark."""
        found, rest = "", text
        while (start := rest.find("${")) >= 0:
            end, depth = start + 1, 1
            while depth and end + 1 < len(rest):
                end += 1
                depth += {"{": 1, "}": -1}.get(rest[end], 0)
            span = rest[start : end + 1]
            if ":" in span:
                calls.append(span)
                span = f"\ue000{len(calls) - 1}\ue001"
            found, rest = found + rest[:start] + span, rest[end + 1 :]
        return found + rest

    def mark(text: str) -> str:
        if "${" in text and "\\" in text:  # with escapes, the text stays as a whole
            calls.append(text)
            return f"\ue000{len(calls) - 1}\ue001"
        return hide(text)

    marked = OmegaConf.to_container(OmegaConf.create(_map_text(tree, mark)), resolve=True)
    return _map_text(marked, lambda text: re.sub("\ue000(\\d+)\ue001", lambda found: calls[int(found[1])], text))


def _remember(value: Any, saved: Any) -> Any:
    """The resolved ``value`` in which every text knows how it is saved, where that is not the text itself."""
    if is_dataclass(value):
        for each in fields(value):
            setattr(value, each.name, _remember(getattr(value, each.name), saved[each.name]))
    elif isinstance(value, dict) and isinstance(saved, dict):
        return {key: _remember(each, saved[key]) for key, each in value.items()}
    elif isinstance(value, list) and isinstance(saved, list):
        return [_remember(*pair) for pair in zip(value, saved, strict=True)]
    elif isinstance(value, str) and isinstance(saved, str) and value != saved:
        return Referenced(value, saved)
    return value


def _expand_home(config: Any) -> Any:
    """Expand a leading ~ in every path to the user's home, as a shell does."""
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            _expand_home(value)
        elif isinstance(value, str) and value.startswith("~"):
            home = str(expand_home(value))
            setattr(config, each.name, Referenced(home, value.reference) if isinstance(value, Referenced) else home)
    return config


def check_ranges(config: Any, prefix: str = "") -> None:
    """Refuse values with which no run could train.

    Raises:
        UserError: a value is out of range; the message gives its full key.
    """
    for name, good, what in _ranges(config):
        if not good:
            raise UserError(f"{prefix}{name} is {checks.shown(getattr(config, name))}; it must be {what}")
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            check_ranges(value, f"{prefix}{each.name}.")


def _ranges(config: object) -> Ranges:
    """The ranges of a section: its own, and those of every number and text."""
    values = {each.name: getattr(config, each.name) for each in fields(cast(Any, config))}
    whole = f"a whole number from {-LARGEST} to {LARGEST}"
    return [
        *((name, math.isfinite(value), "finite") for name, value in values.items() if type(value) is float),
        *((name, abs(value) <= LARGEST, whole) for name, value in values.items() if type(value) is int),
        *((name, "\0" not in value, "text without NUL") for name, value in values.items() if isinstance(value, str)),
        *(config.ranges() if isinstance(config, Section) else []),
    ]


def save_config(config: object, path: Path) -> None:
    """Write the config as YAML (see `saved_form`), headed by the git revision of the code."""
    write_file(path, f"# resolved by scq at git revision {git_revision()}\n" + write_yaml(saved_form(config)))


def saved_form(config: object) -> dict[str, Any]:
    """The config as plain dictionaries and lists that others may read, and that `load_config` reads back.

    Numbers are there as they were used. Text that came by a reference is that reference, and a URL loses user, password
    and query (see `shown`).
    """

    def text_of(text: str) -> str:
        return shown(text) if isinstance(text, Referenced) else shown(text).replace("${", "\\${")

    return _map_text(as_dict(config), text_of)


def as_dict(config: Any) -> dict[str, Any]:
    """The config as plain dictionaries and lists, with the values that it is used with."""
    return asdict(config)


def git_revision() -> str:
    """The commit of this source tree; 'unknown' if scq was installed without its repository.

    A repository that merely surrounds the installed package, such as the user's own around a virtual environment, says
    nothing about scq.
    """
    if not (PACKAGE / ".git").exists():
        kept = PACKAGE / REVISION
        return kept.read_text().strip() if kept.is_file() else "unknown"
    command = ["git", "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() or "unknown"


def _chain(path: Path, schema: type) -> list[tuple[Path, dict[str, Any]]]:
    """The file and every file that it is based on, the base first, each with what it holds."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    following: Path | None = path
    while following is not None:
        if real_path(following) in [real_path(known) for known, _ in chain]:
            raise UserError(f"config {following} is based on itself")
        if not following.is_file():
            raise UserError(f"config {following} does not exist; those that come with scq are in configs/")
        tree = read_yaml(following, schema)
        try:
            base = OmegaConf.create({"base": tree.pop("base", None)}).base
        except OmegaConfBaseException as error:
            raise UserError(f"base of config {following} cannot be resolved: {first_line(error)}") from error
        if base is not None and not isinstance(base, str):
            raise UserError(f"config {following} has the base {base!r}; it must be the name of a file")
        chain.insert(0, (following, tree))
        following = following.parent / base if base else None
    return chain


def _merge(config: DictConfig, other: dict[str, Any], source: str) -> DictConfig:
    try:
        if unset := next((key for key, value in leaves(other) if value == "???"), None):  # it would be left out
            raise UserError(f"{source}: {unset} is ???, which stands for a missing value; give it one")
        if misplaced := next((key for key in _mappings(other) if OmegaConf.is_list(_at(config, key))), None):
            raise UserError(f"{source}: wrong value for {misplaced!r}: it is a list, and not a mapping")
        return cast(DictConfig, OmegaConf.merge(config, other))
    except OmegaConfBaseException as error:
        key = error.full_key or error.key or "?"
        kind = "unknown key" if "not in" in str(error) else "wrong value for"
        raise UserError(f"{source}: {kind} {key!r}: {first_line(error)}") from error


def _mappings(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The full key of every mapping inside a mapping."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield f"{prefix}{key}"
            yield from _mappings(value, f"{prefix}{key}.")


def _at(config: DictConfig, key: str) -> Any:
    try:
        return OmegaConf.select(config, key)
    except OmegaConfBaseException:  # an unknown key, which merging names
        return None
