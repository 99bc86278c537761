"""What the processes of one job tell each other; where there is only one, nothing."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def join_processes() -> torch.device:
    """This process's device, after it has joined the others that `accelerate launch` or `torchrun` started, if any.

    With GPUs the group carries tensors of both kinds: losses lie on the GPU, counts and features on the CPU, and
    accelerate's own group would be NCCL's alone, which refuses the latter.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available() and not cpu and not dist.is_initialized():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    # Said here, because only accelerate's larger states read that variable, and each process would think it were alone.
    return PartialState(cpu=cpu).device


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank, and how many processes there are."""
    return (dist.get_rank(), dist.get_world_size()) if across_processes() else (0, 1)


def across_processes() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_across_processes(value: Tensor) -> Tensor:
    """Sum of a tensor over all processes; the tensor itself where there is only one."""
    if across_processes():
        value = value.clone()
        dist.all_reduce(value)
    return value


def gather_rows(rows: Tensor) -> Tensor:
    """Rows (n, F) of all processes in rank order (world n, F); every process must hold equally many."""
    if not across_processes():
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def gather_objects(value: Any) -> list[Any]:
    """What every process holds, in rank order, on every process; every one must call it."""
    if not across_processes():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def same_everywhere(value: Tensor) -> Tensor:
    """Overwrite a tensor with process 0's, so that no rounding sets the processes apart."""
    if across_processes():
        dist.broadcast(value, 0)
    return value


def leave_processes() -> None:
    """End the group, the last thing that a process of several does."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
