"""One life cycle for every stage: open its data, build, train or resume, export.

run(TokenizerStage(config))        # from the command line, from Python, and from a benchmark alike
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

from safetensors.torch import load_model

from scq.engine.accelerators import make_accelerator
from scq.engine.config import check_ranges
from scq.engine.dry_run import estimate
from scq.engine.errors import UserError
from scq.engine.loop import Loop, Trained
from scq.engine.progress import say
from scq.engine.stage import Stage
from scq.engine.tracking import RunFolder, begun_precision


def run(stage: Stage) -> Trained:
    """Train a stage, or resume its training, and export it to ``out/model`` and its best checkpoint to ``out/best``.

    Every process of a job must call this.

    Raises:
        UserError: ``out`` is empty, or holds another run or one that another process is training; the config does not
            fit the data; or training diverged.
        DataError: the data is missing or damaged, or is not what the run was started with.
        Interrupted: SIGTERM, SIGUSR1 or SIGHUP came, and a checkpoint was saved after the running step; call this again
            to go on. After Ctrl-C, a KeyboardInterrupt says the same. Signals are only waited for in the main thread,
            and only while steps are trained; a signal that the program handles itself stays with it.
    """
    config = stage.config
    if not config.out:
        raise UserError(f"out is empty: name a folder for the run, for example out=runs/{stage.name}")
    check_ranges(config)
    accelerator = make_accelerator(config.training, begun_precision(config))
    stream = stage.open_stream(accelerator)
    task = stage.build(accelerator)
    # What `auto` stands for is recorded, so that a run that goes on elsewhere keeps it.
    precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
    recorded = dataclasses.replace(config, training=dataclasses.replace(config.training, precision=precision))
    folder = RunFolder(config.out, recorded, accelerator)
    if folder.is_main:
        size = sum(p.numel() for p in task.modules["model"].parameters()) / 1e6
        say(f"{stage.title}: {size:.1f}M parameters, {stream.num_images} {stream.unit}, {precision}, {folder.path}")
        say(stream.order_description)
    trained = Loop(task, stream, folder, f"train {stage.title}").run()
    if folder.is_main:
        stage.export(trained.averaged, folder.path / "model", trained.steps)
        if trained.best is not None:
            best = copy.deepcopy(trained.averaged)
            load_model(best, str(trained.best / "ema.safetensors"))
            stage.export(best, folder.path / "best", _step_of(trained.best))
    accelerator.wait_for_everyone()
    return trained


def dry_run(stage: Stage) -> list[str]:
    """Estimate what `run` would take, in lines for a person (see `engine.dry_run.estimate`); writes nothing.

    Raises:
        UserError, DataError: as `run`.
    """
    training = stage.config.training
    accelerator = make_accelerator(training)
    probe = stage.probe(accelerator)
    single = copy.copy(stage)  # without accumulation: the probe is too small to be divided
    single.config = dataclasses.replace(stage.config, training=dataclasses.replace(training, accumulate=1))
    task = single.build(accelerator, probe)
    return estimate(task, probe, training, accelerator, stage.heaviest_step())


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))
