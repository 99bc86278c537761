"""The training loop of every stage: learning rates, averages, logs, pictures, scores, checkpoints, exact resume."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scq.engine.checkpoint import Checkpoints
from scq.engine.errors import Interrupted, NotFiniteError, UserError
from scq.engine.fingerprint import fingerprint
from scq.engine.interruption import Signals
from scq.engine.pictures import curves
from scq.engine.processes import rank_and_world_size, sum_across_processes
from scq.engine.progress import Report, progress_bar, say
from scq.engine.randomness import step_seed
from scq.engine.schedules import learning_rate_share
from scq.engine.sharding import Whole, is_sharded
from scq.engine.stage import Stream, Task, Terms
from scq.engine.tracking import RunFolder, read_metrics

_PROMISE = "a checkpoint will be saved after the running step; a second signal ends at once"


@dataclass
class Trained:
    """The result of a finished training run."""

    averaged: nn.Module  # the model with averaged weights, in eval mode
    steps: int
    seconds: float  # of training, summed over all restarts
    cpu_seconds: float  # of all threads of the main process, likewise, without scores and pictures
    best: Path | None  # the checkpoint with the lowest score; None if nothing was scored


class Loop:
    """One training run, from its newest checkpoint (if there is one) to its last step.

    Args:
        task: the networks, and what to do in a step.
        stream: yields this process's share of every batch.
        folder: the run folder; training resumes from the newest checkpoint in it.
        title: the label of the progress bar.
    """

    def __init__(self, task: Task, stream: Stream, folder: RunFolder, title: str):
        self.task, self.stream, self.folder, self.title = task, stream, folder, title
        self.training, self.optimizer = task.config.training, task.config.optimizer
        self.accelerator, self.is_main = task.accelerator, folder.is_main
        self.frozen = {name: fingerprint(network) for name, network in task.frozen.items()}
        self.checkpoints = Checkpoints(
            folder.path / "checkpoints",
            self.training.keep_checkpoints,
            {**task.modules, "ema": task.average.module},
            task.optimizers,
        )
        self.seconds = 0.0  # of training up to the newest checkpoint, summed over all restarts
        self.cpu_seconds = 0.0  # likewise, see `Trained`
        self.saved = 0  # the steps that the newest checkpoint holds
        self.unscored = False  # whether that checkpoint was to be scored, but a signal came
        self.signals = Signals(hold=True, promise=_PROMISE if self.is_main else "")

    def run(self) -> Trained:
        """Train until ``training.steps``.

        Raises:
            UserError: a loss or gradient is not finite (the message names the step, the terms and the last good
                checkpoint, which is left untouched); the newest checkpoint is already past ``training.steps``; or the
                run was started with other frozen networks.
            DataError: the run was started with other data.
            Interrupted, KeyboardInterrupt: a signal came (see `engine.interruption`), and a checkpoint was saved.
        """
        first, steps = self._resume(), self.training.steps
        self.meter, self.started = _Meter(self.checkpoints), time.monotonic()
        if self.is_main and self.accelerator.num_processes > 1:
            count, images = self.accelerator.num_processes, self.training.batch_size
            say(f"{count} processes, {images} images per step in total")
        with progress_bar(self.title, quiet=not self.is_main) as progress, self.signals:
            batches = iter(self.stream)
            progress(first, steps)
            self._score_late(first)
            for step in range(first, steps):
                with self.meter.waiting():
                    batch = self._next(batches, step, progress)
                self._set_learning_rates(step)
                torch.manual_seed(step_seed(self.training.seed, step, self.accelerator.process_index))
                self._train(batch, step)
                done, last, stops = step + 1, step + 1 == steps, self.signals.agreed()
                scored = last or done % self.training.checkpoint_every == 0
                saves = scored or stops
                progress(done, steps)
                if saves or done % self.training.log_every == 0:
                    values = self._log(done, progress, scored)
                    if saves:
                        self._save(done, values)
                if self.training.images_every and (last or done % self.training.images_every == 0):
                    self._picture(done)
                if saves:
                    self.accelerator.wait_for_everyone()
                    stops = stops or self.signals.agreed()
                if stops:
                    raise self._interruption()
        # Not accelerator.end_training(): it would destroy the process group, which exports and benchmarks still need.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        averaged, best = self.task.average.module.eval(), self.checkpoints.best()
        return Trained(averaged, steps, self.seconds, self.cpu_seconds, best)

    def _resume(self) -> int:
        """Restore the newest checkpoint and return the number of steps that were done by then."""
        state = self.checkpoints.restore()
        first, self.seconds, self.cpu_seconds = state["step"], state.get("seconds", 0.0), state.get("cpu_seconds", 0.0)
        if first > self.training.steps:
            raise UserError(
                f"{self.folder.path} has already been trained for {first} steps, but "
                f"training.steps={self.training.steps} asks for fewer; raise training.steps, choose another out=... or "
                "delete that folder"
            )
        if first:
            self.stream.load_state_dict(state["stream"])
            self._refuse_other_networks(state.get("frozen", {}))
        self.seconds_before, self.saved, self.unscored = self.seconds, first, state.get("unscored", False)
        self.cpu_seconds_before = self.cpu_seconds
        self.folder.begin(first)
        return first

    def _refuse_other_networks(self, saved: dict[str, str]) -> None:
        """Raise UserError if the run was started with other frozen networks than those it is given now."""
        for name, known in saved.items():
            if known != self.frozen.get(name):
                raise UserError(
                    f"{self.folder.path} holds a run with {name} {known}, but this run uses {name} "
                    f"{self.frozen.get(name, 'none')}; choose another out=... or delete that folder"
                )

    def _next(self, batches: Iterator[Any], step: int, progress: Report) -> Any:
        """The batch of ``step``. One process alone need not wait for it after a signal; several must agree first."""
        if self.accelerator.num_processes > 1:
            return next(batches)
        position = self.stream.state_dict()
        try:
            with self.signals.at_once():
                return next(batches)
        except (Interrupted, KeyboardInterrupt):
            if not self.signals.asked:
                raise
            self.stream.load_state_dict(position)
            if step > self.saved:
                logged = not self.meter.steps  # with the step before
                self._save(step, {} if logged else self._log(step, progress, scored=False))
            raise self._interruption() from None

    def _interruption(self) -> BaseException:
        newest = self.checkpoints.latest()
        done = f"saved {newest}, run again to go on" if newest else "nothing was trained yet, run again to begin"
        if self.is_main:
            say(done)
        return self.signals.interruption(done)

    def _learning_rate_share(self, step: int) -> float:
        return learning_rate_share(
            step,
            self.training.steps,
            self.optimizer.warmup_steps,
            self.optimizer.schedule,
            self.optimizer.final_share,
        )

    def _set_learning_rates(self, step: int) -> None:
        share = self._learning_rate_share(step)
        for optimizer in self.task.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * share

    def _train(self, batch: Any, step: int) -> None:
        try:
            terms = self.task.training_step(batch, step)
        except NotFiniteError as error:
            raise self.meter.divergence(step, str(error)) from error
        self.meter.add(step, terms)
        model = self.task.modules["model"]
        self.task.average.update(Whole(model) if is_sharded(model) else model, step=step)

    def _log(self, done: int, progress: Report, scored: bool) -> dict[str, float]:
        """Log the mean of each term since the last line, and the score if a checkpoint follows; return what was logged.

        The line is written before the checkpoint: if the process is killed in between, the resumed run drops the line.
        """
        self.cpu_seconds = self.cpu_seconds_before + self.meter.cpu_seconds()
        values = {**self.meter.flush(self.training.batch_size), "cpu_seconds": self.cpu_seconds}
        speed = f"loss {values['loss']:.4f}  {values['images_per_second']:.0f} images/s"
        progress(done, self.training.steps, f"{speed}  data wait {values['data_wait_share']:.0%}")
        self.unscored = False
        values["learning_rate"] = self.optimizer.learning_rate * self._learning_rate_share(done - 1)
        values |= self.stream.measured()
        with self.meter.paused():
            values |= self._score() if scored else {}
            self.folder.log(done, values)
        return values

    def _score(self) -> dict[str, float]:
        """Score the averaged weights in the main process; after a signal, this is left to the run that goes on."""
        if not self.is_main:
            return {}
        try:
            with self.signals.at_once():
                return self.task.score(self.task.average.module.eval()) or {}
        except (Interrupted, KeyboardInterrupt):
            if not self.signals.asked:
                raise
            self.unscored = True
            return {}

    def _score_late(self, first: int) -> None:
        """Score the checkpoint that the run goes on from, if a signal came before it was."""
        if self.unscored:
            self.unscored = False
            values = self._score()
            self.folder.log_more(first, values)
            self._save(first, values)

    def _save(self, done: int, values: dict[str, float]) -> None:
        with self.meter.paused():
            self.seconds = self.seconds_before + time.monotonic() - self.started
            self.checkpoints.save(
                done,
                write=self.is_main,
                score=values.get(self.task.score_name),
                frozen=self.frozen,
                seconds=self.seconds,
                cpu_seconds=self.cpu_seconds,
                stream=self.stream.state_dict(),
                unscored=self.unscored,
            )
            self.saved = done

    def _picture(self, done: int) -> None:
        if not self.is_main:
            return
        with self.meter.paused():
            self.folder.picture("curves", curves(read_metrics(self.folder.path)))
            picture = self.task.picture(self.task.average.module.eval())
            if picture is not None:
                self.folder.picture(f"step_{done:08d}", picture)


class _Meter:
    """Means of all terms over the processes and over the steps since the last flush.

    Terms stay on the device until they are flushed, so that no step waits for the host. Every process must flush.
    """

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        self.cpu_started = time.process_time()
        self._reset()

    def _reset(self) -> None:
        self.steps: list[int] = []
        self.rows: list[Terms] = []
        self.waited, self.started = 0.0, time.monotonic()

    def add(self, step: int, terms: Terms) -> None:
        self.steps.append(step)
        self.rows.append(terms)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in the block as waiting for data."""
        before = time.monotonic()
        yield
        self.waited += time.monotonic() - before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time in the block out of the training speed, and of its CPU seconds."""
        before, cpu_before = time.monotonic(), time.process_time()
        yield
        self.started += time.monotonic() - before
        self.cpu_started += time.process_time() - cpu_before

    def cpu_seconds(self) -> float:
        """CPU seconds of all threads of this process since the meter was made."""
        return time.process_time() - self.cpu_started

    def flush(self, batch_size: int) -> dict[str, float]:
        # One transfer and one sum over processes for all values. A term that first appears after some steps is averaged
        # over the steps that have it.
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
        """The error for ``step``, whose forward pass met numbers that are not finite; ``found`` describes them.

        It names an earlier step if the divergence began in one that is not flushed yet. It does not communicate with
        the other processes, which may be waiting in another collective call.
        """
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
            "Start again in another out=... with a lower optimizer.learning_rate, or with training.precision=fp32"
        )


def _finite(terms: dict[str, float]) -> bool:
    return all(math.isfinite(value) for value in terms.values())
