"""Sharding a model's weights, gradients and optimizer state across processes (torch's FSDP2), and gathering them.

For an unsharded model, the functions that gather and load do the ordinary thing. accelerate's FSDP plugin shards with
the same torch function, but takes its settings from the launcher's environment instead of the run's config, and its
checkpoints differ in format from those of an unsharded model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from scq.engine.errors import UserError
from scq.engine.processes import across_processes

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(module: nn.Module, blocks: type[nn.Module]) -> nn.Module:
    """Shard ``module`` across all processes; each of its ``blocks`` is gathered only while it computes.

    Call this before the optimizer is created.

    Raises:
        UserError: there is only one process.
    """
    if not across_processes():
        raise UserError("shard=true divides a model among several processes, but there is only one; set shard=false")
    for block in module.modules():
        if isinstance(block, blocks):
            fully_shard(block)
    fully_shard(module)
    return module


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was applied to the module."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module, gathered from all processes; every process must call this."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in module.state_dict().items()}


@torch.no_grad()
def load_whole(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy whole tensors into a module; each process keeps its shard.

    Raises:
        KeyError, RuntimeError: a tensor is missing, or has another shape.
    """
    for name, mine in module.state_dict().items():
        if isinstance(mine, DTensor):
            mine.copy_(distribute_tensor(state[name].to(mine.device), mine.device_mesh, mine.placements))
        else:
            mine.copy_(state[name])


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state for a checkpoint, gathered from all processes; every process must call this."""
    if not is_sharded(module):
        return optimizer.state_dict()
    return get_optimizer_state_dict(module, _bare(optimizer), options=_WHOLE)


def load_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The inverse of `optimizer_state`, of which the device that computed it may have been another."""
    # Whether one kernel updates all weights is the device's matter, not the checkpoint's.
    here = {name: value for name, value in optimizer.param_groups[0].items() if name == "fused"}
    state = {**state, "param_groups": [{**group, **here} for group in state["param_groups"]]}
    if is_sharded(module):
        set_optimizer_state_dict(module, _bare(optimizer), state, options=_WHOLE)
        return
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():  # the fused kernel wants moments in the weights' layout in memory
            if not isinstance(value, Tensor):  # such as which of Muon's two rules a parameter follows
                continue
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter).copy_(value)


def _bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


class Whole:
    """Stands in for a sharded module where only its ``state_dict`` is needed; every process must create one."""

    def __init__(self, module: nn.Module):
        self._state = whole_state(module)

    def state_dict(self) -> dict[str, Tensor]:
        return self._state
