"""``--dry-run``: what a training run would take, measured in a few steps whose result is discarded."""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scq.engine.config import LoopConfig
from scq.engine.stage import Probe, Task


def estimate(task: Task, probe: Probe, config: LoopConfig, accelerator: Accelerator, heaviest: int) -> list[str]:
    """Estimate parameters, memory, steps per epoch and total time of a training run.

    Args:
        probe: at least 2 images to take training steps on; memory and time are scaled up from them.
        config: of the full run.
        heaviest: the step that needs the most memory.

    Returns:
        lines for a person to read.
    """
    probed, images, frozen = len(probe.batch[0]), probe.images, task.frozen
    share = -(-config.batch_size // accelerator.num_processes)
    micro_batch = -(-share // config.accumulate)
    last = config.steps - 1
    half = type(probe.batch)(*(field[: probed // 2] for field in probe.batch))
    weights = [*task.modules.values(), *frozen.values()]
    saved = []
    for batch in (half, probe.batch):  # also a warm-up: compilation, first allocations
        with _SavedForBackward(weights) as kept:
            task.training_step(batch, heaviest)
        saved.append(kept.bytes)
    # The difference leaves out what does not grow with the batch, such as copies of the weights in bf16.
    per_image = (saved[1] - saved[0]) / (probed - probed // 2)
    activations = saved[1] + per_image * (micro_batch - probed)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        terms = task.training_step(probe.batch, last)
        float(terms["loss"])  # waits for the device
        seconds.append(time.perf_counter() - started)
    pace = min(seconds) * share / probed
    states = _state_bytes(task) + sum(_weight_bytes(module) for module in frozen.values())
    sizes = ", ".join(f"{name} {_parameters(module) / 1e6:.1f}M" for name, module in task.modules.items())
    sizes += "".join(f", frozen {name} {_parameters(module) / 1e6:.1f}M" for name, module in frozen.items())
    epoch = "the training set is not available here"
    if images is not None:
        steps = images / config.batch_size
        epoch = f"{images:,} images, {steps:,.0f} steps per epoch, {config.steps / steps:,.1f} epochs"
    return [
        f"parameters: {sizes}",
        f"memory per process: about {(states + activations) / 1e9:.2f} GB ({states / 1e9:.2f} GB of weights, "
        f"averages, gradients and optimizer state, {activations / 1e9:.2f} GB of activations for {micro_batch} images)",
        f"data: {epoch}",
        f"time on this machine: {pace:.2f} s per step (measured on {probed} images, scaled to {share}), "
        f"{_duration(pace * config.steps)} for {config.steps:,} steps of {config.batch_size} images in "
        f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}",
    ]


class _SavedForBackward:
    """Counts the bytes that autograd keeps for the backward pass: each storage once, without parameters."""

    def __init__(self, modules: list[nn.Module]):
        self._known = {_local(p).untyped_storage().data_ptr() for module in modules for p in module.parameters()}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.bytes = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> _SavedForBackward:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _weight_bytes(module: nn.Module) -> int:
    """Bytes of the weights in this process; of a sharded model, only its shard."""
    return sum(_local(p).nbytes for p in module.parameters())


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _state_bytes(task: Task) -> int:
    """Bytes of the weights, their averages, gradients as large as the weights, and the optimizers' state."""
    weights = sum(_weight_bytes(module) for module in task.modules.values())
    averages = _weight_bytes(task.average.module)
    state = sum(
        _local(value).nbytes
        for optimizer in task.optimizers.values()
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, Tensor)
    )
    return 2 * weights + averages + state


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
