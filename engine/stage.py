"""What a training has to say for itself. `scq.engine.run` does everything that trainings have in common.

A `Stage` is cheap: a config and what it freezes. It says what it streams, builds and exports. The `Task` that it builds
holds networks and optimizers in memory, and takes training steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from accelerate import Accelerator
from PIL import Image
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from scq.engine.config import LoopConfig, OptimizerConfig
from scq.engine.errors import UserError
from scq.engine.optimizers import in_parts, mean_terms, micro_batches, optimizer_step

Part = TypeVar("Part")
Terms = dict[str, Tensor]  # numbers to log, 0-dim, by name
PROBED_IMAGES = 4  # small enough for any machine; a dry run scales memory and time from them


class Experiment(Protocol):
    """The config of a stage: what all of them have."""

    out: str  # the run folder
    optimizer: OptimizerConfig
    training: LoopConfig


class Stream(Protocol):
    """An endless stream of this process's share of every batch, which knows how far it is (see data.order)."""

    num_images: int
    unit: str  # what it hands out, for people: images, token grids
    order_description: str

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Probe(NamedTuple):
    """A few images for a dry run."""

    batch: Any  # of PROBED_IMAGES images, a NamedTuple of tensors
    images: int | None  # in the whole training set; None where it is not at hand


class Task(ABC):
    """The networks of one training, and one training step of them.

    Args:
        make: builds the network that is trained; called with torch's generator seeded, so that every process begins
            with the same weights.

    Attributes:
        modules: all that is trained, by name, ``model`` first; a checkpoint keeps each.
        optimizers: by name; a checkpoint keeps each.
        frozen: networks that the step uses without training them, by name; a run goes on only with the same.
        average: the exponential moving average of ``modules["model"]``: what is scored, pictured and exported.
        score_name: which of the numbers that `score` returns chooses the best checkpoint, the lowest being the best.
    """

    score_name: str = ""

    def __init__(self, config: Experiment, accelerator: Accelerator, make: Callable[[], nn.Module]):
        self.config, self.accelerator = config, accelerator
        torch.manual_seed(config.training.seed)
        network = make().to(accelerator.device)
        if config.training.gradient_checkpointing:
            if not getattr(network, "_supports_gradient_checkpointing", False):
                raise UserError(f"training.gradient_checkpointing=true is not for a {type(network).__name__}")
            network.enable_gradient_checkpointing()
        # Copied before accelerate wraps the network's forward in autocast.
        self.average = ModelEmaV3(network, decay=config.training.ema_decay, use_warmup=True)
        self.modules: dict[str, nn.Module] = {"model": network}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.frozen: dict[str, nn.Module] = {}

    @abstractmethod
    def training_step(self, batch: Any, step: int) -> Terms:
        """Take one step of every optimizer; ``loss`` is among the terms that are returned."""

    def score(self, averaged: nn.Module) -> dict[str, float] | None:
        """How good the averaged weights are on held-out data; None where nobody asked.

        Called in the main process alone: it must not wait for the others.
        """
        return None

    def picture(self, averaged: nn.Module) -> Image.Image | None:
        """Something to look at, drawn with the averaged weights."""
        return None

    def in_parts(self, batch: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """A process's share of a batch, divided into ``training.accumulate`` micro-batches."""
        return in_parts(batch, self.config.training)

    def optimize(
        self, name: str, wrapped: nn.Module, parts: Sequence[Part], loss: Callable[[Part], tuple[Tensor, Terms]]
    ) -> Terms:
        """One step of the optimizer ``name``: forward, backward and clipping over the parts of a batch.

        Args:
            wrapped: the module as accelerate prepared it.
            loss: of one part: what to minimise (), and terms to log.

        Returns:
            the mean of each term over the parts, and the norm of the gradient before clipping.
        """
        rows = []
        for part in micro_batches(self.accelerator, wrapped, parts):
            with self.accelerator.autocast():
                value, terms = loss(part)
            self.accelerator.backward(value / len(parts))
            rows.append(terms)
        norm = optimizer_step(wrapped, self.optimizers[name], self.accelerator, self.config.optimizer.clip_norm)
        return {**mean_terms(rows), "gradient_norm": norm}


class Stage(ABC):
    """One training: `scq.engine.run.run` trains it, `dry_run` says what that would take.

    Attributes:
        name: tokenizer, prior or refiner.
        config: an `Experiment`.
    """

    name: str
    config: Any

    @property
    def title(self) -> str:
        """What people read: the name, and the kind where there are several."""
        return self.name

    @abstractmethod
    def open_stream(self, accelerator: Accelerator) -> Stream:
        """This process's share of the training set.

        Raises:
            UserError, DataError: the data is missing, or does not fit the config.
        """

    @abstractmethod
    def probe(self, accelerator: Accelerator) -> Probe:
        """A few training images, without reading more."""

    @abstractmethod
    def build(self, accelerator: Accelerator, probe: Probe | None = None) -> Task:
        """Networks and optimizers in memory.

        Args:
            probe: in a dry run, the only images there are; no others are read, and nothing will be scored.

        Raises:
            UserError: the config does not describe a network.
        """

    @abstractmethod
    def export(self, averaged: nn.Module, folder: Path, steps: int) -> None:
        """Save the averaged weights after so many steps as a model that users open.

        Raises:
            UserError: ``folder`` holds anything but a model.
        """

    def heaviest_step(self) -> int:
        """The step that needs the most memory, with every loss switched on."""
        return self.config.training.steps - 1
