"""The one training loop, shared by both stages.

A stage gives a :class:`Task`: its modules, its optimizers and one training step. The loop owns everything else:
learning rates, the exponential moving average, logging, the guard against divergence, checkpoints and exact resume.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from timm.utils import ModelEmaV3
from torch import nn

from scq.engine.checkpoint import Checkpoints
from scq.engine.config import LoopConfig, OptimizerConfig
from scq.engine.errors import NotFiniteError, UserError
from scq.engine.pictures import curves
from scq.engine.processes import join_processes, rank_and_world_size, sum_across_processes
from scq.engine.progress import progress_bar, say
from scq.engine.randomness import step_seed
from scq.engine.schedules import learning_rate_share
from scq.engine.sharding import Whole, is_sharded
from scq.engine.tracking import RunFolder, checked_tracker, read_metrics


class Task(Protocol):
    """What one stage trains."""

    modules: dict[str, nn.Module]  # saved and restored by name
    optimizers: dict[str, torch.optim.Optimizer]
    score_name: str  # which of the numbers that `score` returns decides
    average: ModelEmaV3  # of modules["model"]; copied before accelerate wraps that model's forward in autocast

    def training_step(self, batch: Any, step: int) -> dict[str, torch.Tensor]:
        """Take one optimizer step; return 0-dim tensors to log, gradient norms among them."""

    def picture(self, averaged: nn.Module) -> Image.Image | None:
        """Something to look at, drawn with the averaged weights."""

    def score(self, averaged: nn.Module) -> dict[str, float] | None:
        """How good the averaged weights are on held-out data, to log; of ``score_name``, lower is better. None where
        nobody asked.

        Called in the main process alone: it must not wait for the others.
        """


@dataclass
class Trained:
    """What a finished training hands on."""

    averaged: nn.Module  # the model with averaged weights, in eval mode
    steps: int
    seconds: float  # of training, over all interruptions
    best: Path | None  # the checkpoint with the lowest score; None where nobody asked for scores


def make_accelerator(config: LoopConfig) -> Accelerator:
    """Devices, processes and mixed precision, as ``accelerate launch`` or the machine decides.

    Raises:
        UserError: the tracker or the precision is unknown, or ``accumulate`` does not divide a process's images.
    """
    # accelerate keeps the first precision of a process for good; a process may train several models.
    AcceleratorState._reset_state()
    join_processes()
    tracker = checked_tracker(config.tracker)
    accelerator = Accelerator(mixed_precision=resolve_precision(config.precision), log_with=tracker, project_dir=".")
    share = config.batch_size // accelerator.num_processes
    if share % config.accumulate:
        raise UserError(
            f"training.accumulate={config.accumulate} does not divide the {share} images of each process's share of "
            f"training.batch_size={config.batch_size}"
        )
    return accelerator


def resolve_precision(precision: str) -> str:
    """accelerate's word for a precision.

    ``auto`` becomes bf16 where the hardware multiplies bf16 natively; elsewhere emulation would only be slower.
    """
    if precision not in ("auto", "fp32", "bf16"):  # fp16 needs losses scaled, and steps left out where they overflow
        raise UserError(f"training.precision is {precision!r}; it must be auto, fp32 or bf16")
    if precision != "auto":
        return "no" if precision == "fp32" else precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16", False) else "no"


def train(
    task: Task,
    stream: Any,
    config: LoopConfig,
    optimizer: OptimizerConfig,
    run: RunFolder,
    accelerator: Accelerator,
    title: str,
    frozen: dict[str, str] | None = None,
) -> Trained:
    """Train until ``config.steps``, going on from the newest checkpoint of ``run`` where there is one.

    Args:
        stream: yields this process's share of every batch, and knows its place (data.stream, data.tokens).
        title: what the progress bar says.
        frozen: fingerprints, by name, of the networks that the task takes as given; a checkpoint keeps them.

    Raises:
        UserError: a loss or gradient became non-finite; the message names the step, the terms and the last good
            checkpoint, which is left untouched. Or the newest checkpoint is beyond ``config.steps``, or the run was
            trained with other frozen networks.
        DataError: the run was trained on other data.
    """
    frozen = frozen or {}
    model, average = task.modules["model"], task.average
    modules = {**task.modules, "ema": average.module}
    checkpoints = Checkpoints(run.path / "checkpoints", config.keep_checkpoints, modules, task.optimizers)
    state = checkpoints.restore()
    first, spent = state["step"], state.get("seconds", 0.0)
    if first > config.steps:
        raise UserError(
            f"{run.path} was trained for {first} steps already, training.steps={config.steps} asks for fewer; "
            "raise training.steps, choose another out=... or delete that folder"
        )
    if first:
        stream.load_state_dict(state["stream"])
        _refuse_other_networks(run.path, state.get("frozen", frozen), frozen)
    run.begin(first)
    base_rates = {name: [group["initial_lr"] for group in o.param_groups] for name, o in task.optimizers.items()}
    meter, divided = _Meter(checkpoints), is_sharded(model)
    started = time.monotonic()
    if run.is_main and accelerator.num_processes > 1:
        say(f"{accelerator.num_processes} processes, {config.batch_size} images a step over all of them")
    with progress_bar(title, quiet=not run.is_main) as progress:
        batches = iter(stream)
        progress(first, config.steps)
        for step in range(first, config.steps):
            waiting = time.monotonic()
            batch = next(batches)
            waited = time.monotonic() - waiting
            share = learning_rate_share(
                step, config.steps, optimizer.warmup_steps, optimizer.schedule, optimizer.final_share
            )
            for name, each in task.optimizers.items():
                for group, rate in zip(each.param_groups, base_rates[name], strict=True):
                    group["lr"] = rate * share
            torch.manual_seed(step_seed(config.seed, step, accelerator.process_index))
            try:
                terms = task.training_step(batch, step)
            except NotFiniteError as error:
                raise meter.divergence(step, str(error)) from error
            meter.add(step, terms, waited)
            average.update(Whole(model) if divided else model, step=step)

            done = step + 1
            last = done == config.steps
            saves = done % config.checkpoint_every == 0 or last
            progress(done, config.steps)
            if done % config.log_every == 0 or saves:
                values = meter.flush(config.batch_size)
                speed = f"loss {values['loss']:.4f}  {values['images_per_second']:.0f} images/s"
                progress(done, config.steps, f"{speed}  data wait {values['data_wait_share']:.0%}")
                values["learning_rate"] = optimizer.learning_rate * share
                with meter.paused():
                    found = (task.score(average.module.eval()) if saves and run.is_main else None) or {}
                    # Logged before it is saved: a kill in between leaves a line that the resumed run drops.
                    run.log(done, {**values, **found})
                    if saves:
                        state = {"seconds": spent + time.monotonic() - started, "stream": stream.state_dict()}
                        checkpoints.save(
                            done, write=run.is_main, score=found.get(task.score_name), frozen=frozen, **state
                        )
            if config.images_every and (done % config.images_every == 0 or last) and run.is_main:
                with meter.paused():
                    run.picture("curves", curves(read_metrics(run.path)))
                    picture = task.picture(average.module.eval())
                    if picture is not None:
                        run.picture(f"step_{done:08d}", picture)
            if saves:
                accelerator.wait_for_everyone()
    # Not accelerator.end_training(): it would end the processes' group, which exports and benchmarks still need.
    for tracker in accelerator.trackers:
        tracker.finish()
    seconds = spent + time.monotonic() - started if first < config.steps else spent
    return Trained(average.module.eval(), config.steps, seconds, checkpoints.best())


def _refuse_other_networks(run: Path, saved: dict[str, str], given: dict[str, str]) -> None:
    for name in sorted(saved.keys() | given.keys()):
        if saved.get(name) != given.get(name):
            raise UserError(
                f"{run} holds a run with {name} {saved.get(name, 'none')}, this one is given {name} "
                f"{given.get(name, 'none')}; choose another out=... or delete that folder"
            )


class _Meter:
    """Means over all processes and the steps since the last flush, kept on the device so that no step waits for the
    host. Every process must flush."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        self._reset()

    def _reset(self) -> None:
        self.steps: list[int] = []
        self.rows: list[dict[str, torch.Tensor]] = []
        self.waited, self.started = 0.0, time.monotonic()

    def add(self, step: int, terms: dict[str, torch.Tensor], waited: float) -> None:
        self.steps.append(step)
        self.rows.append(terms)
        self.waited += waited

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile is no training, and does not count in its speed."""
        before = time.monotonic()
        yield
        self.started += time.monotonic() - before

    def flush(self, batch_size: int) -> dict[str, float]:
        # One transfer for all, and one sum over processes; a term that begins within the window is averaged over the
        # steps that have it.
        values = torch.stack([x.detach().float() for row in self.rows for x in row.values()])
        values = iter((sum_across_processes(values) / rank_and_world_size()[1]).tolist())
        rows = [{name: next(values) for name in row} for row in self.rows]
        for step, row in zip(self.steps, rows, strict=True):
            if not _finite(row):
                raise self._diverged(step, row)
        elapsed = max(1e-9, time.monotonic() - self.started)
        names = dict.fromkeys(name for row in rows for name in row)
        means = {name: statistics.fmean(row[name] for row in rows if name in row) for name in names}
        means["images_per_second"] = batch_size * len(self.steps) / elapsed
        means["data_wait_share"] = self.waited / elapsed
        self._reset()
        return means

    def divergence(self, step: int, found: str) -> UserError:
        """What to say of ``step``, whose forward pass met numbers that are not finite, ``found`` in words. The step
        that went astray may be an earlier one, not yet flushed. Asks no other process: they may wait elsewhere."""
        for number, row in zip(self.steps, self.rows, strict=True):
            values = {name: float(value) for name, value in row.items()}
            if not _finite(values):
                return self._diverged(number, values)
        return self._diverged(step, found)

    def _diverged(self, step: int, found: dict[str, float] | str) -> UserError:
        terms = found if isinstance(found, str) else ", ".join(f"{name}={value:.4g}" for name, value in found.items())
        return UserError(
            f"training diverged at step {step}: {terms}. Last good checkpoint: "
            f"{self.checkpoints.latest() or 'none yet'}. "
            "Begin again in another out=... with a lower optimizer.learning_rate, or with training.precision=fp32"
        )


def _finite(terms: dict[str, float]) -> bool:
    return all(math.isfinite(value) for value in terms.values())
