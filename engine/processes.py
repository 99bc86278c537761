"""What the processes of one job tell each other; where there is only one, nothing."""

import torch
import torch.distributed as dist
from torch import Tensor


def process_place() -> tuple[int, int]:
    """This process's number, and how many there are."""
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


def same_everywhere(value: Tensor) -> Tensor:
    """Overwrite a tensor with process 0's, so that no rounding sets the processes apart."""
    if across_processes():
        dist.broadcast(value, 0)
    return value


def leave_processes() -> None:
    """End the group, the last thing that a process of several does."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
