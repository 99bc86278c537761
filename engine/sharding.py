"""A model whose weights, gradients and optimizer state are divided among the processes (torch's FSDP2), and the whole
of it where a checkpoint or an average needs that.

For a model that is not divided, every function here does the ordinary thing. accelerate's FSDP plugin divides with the
same function, but takes its settings from the launcher's environment instead of the run's config, and its checkpoints
are of another kind than those of a model that is not divided.
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
    """Divide ``module`` among all processes, each of its ``blocks`` gathered only while it computes.

    Call it before the optimizer is made.

    Raises:
        UserError: there is only one process.
    """
    if not across_processes():
        raise UserError("shard=true divides a model among several processes; this is one alone: set shard=false")
    for block in module.modules():
        if isinstance(block, blocks):
            fully_shard(block)
    return fully_shard(module)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` divided it."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a module, put together from all processes; every one must call it."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in module.state_dict().items()}


@torch.no_grad()
def load_whole(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy whole tensors into a module, each process its share.

    Raises:
        KeyError, RuntimeError: a tensor is missing, or of another shape.
    """
    for name, mine in module.state_dict().items():
        if isinstance(mine, DTensor):
            mine.copy_(distribute_tensor(state[name].to(mine.device), mine.device_mesh, mine.placements))
        else:
            mine.copy_(state[name])


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint keeps of an optimizer."""
    if not is_sharded(module):
        return optimizer.state_dict()
    return get_optimizer_state_dict(module, _bare(optimizer), options=_WHOLE)


def load_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The reverse of `optimizer_state`."""
    if is_sharded(module):
        set_optimizer_state_dict(module, _bare(optimizer), state, options=_WHOLE)
    else:
        optimizer.load_state_dict(state)


def _bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


class Whole:
    """Stands for a divided module where only its ``state_dict`` is asked for; every process must make one."""

    def __init__(self, module: nn.Module):
        self._state = whole_state(module)

    def state_dict(self) -> dict[str, Tensor]:
        return self._state
