"""What each kind of training defines for itself. `scq.engine.run` does everything that they have in common.

A `Stage` is cheap: a config and the frozen networks it needs. It says what to stream, build and export. The `Task` that
it builds holds networks and optimizers in memory, and takes training steps.
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

from scq.engine.accelerators import place
from scq.engine.config import LoopConfig, OptimizerConfig
from scq.engine.errors import UserError
from scq.engine.optimizers import in_parts, mean_terms, micro_batches, optimizer_step

Part = TypeVar("Part")
Terms = dict[str, Tensor]  # numbers to log, 0-dim, by name
PROBED_IMAGES = 4  # few enough for any machine; a dry run scales memory and time up from them


class Experiment(Protocol):
    """The fields that the config of every stage has."""

    out: str  # the run folder
    optimizer: OptimizerConfig
    training: LoopConfig


class Stream(Protocol):
    """An endless stream of this process's share of every batch, which knows its own position (see data.order)."""

    num_images: int
    unit: str  # what it yields, in words: images, token grids
    order_description: str

    def __iter__(self) -> Iterator[Any]: ...

    def measured(self) -> dict[str, float]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Probe(NamedTuple):
    """A few images for a dry run."""

    batch: Any  # of PROBED_IMAGES images, a NamedTuple of tensors
    images: int | None  # in the whole training set; None if that is not available here


class Task(ABC):
    """The networks and optimizers of one training run, and its training step.

    Args:
        make: builds the network to train; called with torch's generator seeded, so that every process starts with the
            same weights.

    Attributes:
        modules: everything that is trained, by name, ``model`` first; checkpoints save them all.
        optimizers: by name; checkpoints save them all.
        frozen: networks that the step uses but does not train, by name; a run resumes only with the same ones.
        average: the exponential moving average of ``modules["model"]``, which is scored, pictured and exported.
        score_name: the number from `score` that chooses the best checkpoint; lower is better.

    Raises:
        UserError: the network does not support gradient checkpointing, but the config asks for it.
    """

    score_name: str = ""

    def __init__(self, config: Experiment, accelerator: Accelerator, make: Callable[[], nn.Module]):
        self.config: Any = config
        self.accelerator = accelerator
        torch.manual_seed(config.training.seed)
        network: Any = place(make(), accelerator.device)
        if config.training.gradient_checkpointing:
            if not getattr(network, "_supports_gradient_checkpointing", False):
                raise UserError(
                    f"training.gradient_checkpointing=true does not work with {type(network).__name__}; set it to false"
                )
            network.enable_gradient_checkpointing()
        # Copied before accelerate wraps the network's forward in autocast.
        self.average = ModelEmaV3(network, decay=config.training.ema_decay, use_warmup=True)
        self.modules: dict[str, Any] = {"model": network}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.frozen: dict[str, nn.Module] = {}

    @abstractmethod
    def training_step(self, batch: Any, step: int) -> Terms:
        """Take one step of every optimizer and return the terms to log, ``loss`` among them.

        Raises:
            NotFiniteError: the forward pass met NaN or infinity.
        """

    def score(self, averaged: Any) -> dict[str, float] | None:
        """Score the averaged weights on held-out data; None if no score is wanted.

        Only the main process calls this, so it must not wait for the others.
        """
        return None

    def picture(self, averaged: Any) -> Image.Image | None:
        """A picture of what the averaged weights can do; None for no picture."""
        return None

    def in_parts(self, batch: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Divide a process's share of a batch into ``training.accumulate`` micro-batches."""
        return in_parts(batch, self.config.training)

    def optimize(
        self, name: str, wrapped: nn.Module, parts: Sequence[Part], loss: Callable[[Part], tuple[Tensor, Terms]]
    ) -> Terms:
        """One step of the optimizer ``name``: forward, backward and clipping over the parts of a batch.

        Args:
            wrapped: the module as accelerate prepared it.
            loss: of one part: what to minimise, 0-dim, and terms to log.

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
    """One kind of training: `scq.engine.run.run` trains it, and `dry_run` says what that would take.

    Attributes:
        name: tokenizer, prior or refiner.
        config: an `Experiment`.
    """

    name: str
    config: Any

    @property
    def title(self) -> str:
        """The name that is shown, with the kind if there are several."""
        return self.name

    @abstractmethod
    def open_stream(self, accelerator: Accelerator) -> Stream:
        """Open this process's share of the training set.

        Raises:
            UserError, DataError: the data is missing, or does not fit the config.
        """

    @abstractmethod
    def probe(self, accelerator: Accelerator) -> Probe:
        """Read a few training images, and no more."""

    @abstractmethod
    def build(self, accelerator: Accelerator, probe: Probe | None = None) -> Task:
        """Create the networks and optimizers in memory.

        Args:
            probe: for a dry run: no other images are read, and nothing will be scored.

        Raises:
            UserError: the config does not describe a valid network.
        """

    @abstractmethod
    def export(self, averaged: Any, folder: Path, steps: int) -> None:
        """Save the averaged weights after ``steps`` steps as a model that users can open.

        Raises:
            UserError: ``folder`` holds anything but a model.
        """

    def heaviest_step(self) -> int:
        """The number of a step that needs the most memory, one with every loss switched on."""
        return self.config.training.steps - 1
