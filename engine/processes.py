"""Communication between the processes of one job; with a single process, every function is trivial."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def join_processes() -> torch.device:
    """Join the processes that `accelerate launch` or `torchrun` started, if any, and return this process's device.

    With GPUs, the process group needs a backend for each device: losses are on the GPU, counts and features on the CPU.
    accelerate's own group would use NCCL alone, which refuses CPU tensors.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available() and not cpu and not dist.is_initialized():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    # PartialState does not read the variable itself: without ``cpu``, each process would think that it is alone.
    return torch.device(PartialState(cpu=cpu).device or "cpu")


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if across_processes() else (0, 1)


def across_processes() -> bool:
    """Whether this job has several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_across_processes(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes; the tensor itself if there is only one process."""
    if across_processes():
        value = value.clone()
        dist.all_reduce(value)
    return value


def start_maximum(value: int) -> Callable[[], int]:
    """Start to look for the largest value of all processes; the function that is returned waits until it is found.

    Every process must call both, and may do other things in between.
    """
    if not across_processes():
        return lambda: value
    largest = torch.tensor([value])  # (1,)
    work = dist.all_reduce(largest, dist.ReduceOp.MAX, async_op=True)

    def wait() -> int:
        work.wait()
        return int(largest)

    return wait


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (n, F) of all processes in rank order, (world_size * n, F); n must be the same in every process."""
    if not across_processes():
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def gather_objects(value: Any) -> list[Any]:
    """The values of all processes in rank order; every process must call this, and gets them all."""
    if not across_processes():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def same_everywhere(value: Tensor) -> Tensor:
    """Overwrite a tensor with that of rank 0, so that rounding cannot make the processes differ."""
    if across_processes():
        dist.broadcast(value, 0)
    return value


def is_forked() -> bool:
    """Whether this process is the fork of one that had loaded scq.

    The threads of a parent's OpenMP do not exist in its forks, and whoever asks for them waits forever. A fork
    therefore computes in one thread.
    """
    return _forked


def _after_fork() -> None:
    global _forked
    _forked = True
    torch.set_num_threads(1)


_forked = False
if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_after_fork)


def leave_processes() -> None:
    """Destroy the process group, if there is one; call this last."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
