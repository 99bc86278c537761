"""Optimizers from timm's factory, with weight decay only where it belongs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from torch import nn
from torch.distributed.tensor import DTensor

from scq.engine.config import LoopConfig, OptimizerConfig

Part = TypeVar("Part")


def create_optimizer(
    module: nn.Module, config: OptimizerConfig, exclude: tuple[str, ...] = ()
) -> torch.optim.Optimizer:
    """AdamW or Muon over ``module``.

    Muon (Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024) replaces the momentum of a matrix, or
    of a convolution's weights as one, by the nearest orthogonal matrix. timm's gives its steps the size of AdamW's, as
    in arXiv 2502.16982, and leaves one-dimensional parameters to AdamW.

    On a GPU, AdamW is torch's fused one, which updates all weights in one kernel and keeps its counters there. Every
    parameter group carries its base learning rate as ``initial_lr``; the loop computes each step's rate from it.

    Args:
        exclude: names of submodules that have no weight decay, as one-dimensional parameters have none, and that Muon
            leaves to AdamW: a codebook is a set of points and no map.
    """
    skipped = [name for name, _ in module.named_parameters() if not set(exclude).isdisjoint(name.split("."))]
    setattr(module, "no_weight_decay", lambda: set(skipped))  # noqa: B010, a module takes no function as an attribute
    on_gpu = next(module.parameters()).device.type == "cuda"
    own: dict[str, Any] = {"fallback_no_weight_decay": True} if config.name == "muon" else {"fused": on_gpu or None}
    optimizer = create_optimizer_v2(
        module,
        opt=config.name,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=tuple(config.betas),
        **own,
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = config.learning_rate
    return optimizer


def in_parts(batch: Sequence[torch.Tensor], config: LoopConfig) -> list[tuple[torch.Tensor, ...]]:
    """Divide a process's share of a batch, tensors (b, ...), into ``training.accumulate`` micro-batches."""
    return list(zip(*(tensor.chunk(config.accumulate) for tensor in batch), strict=True))


def micro_batches(accelerator: Accelerator, module: nn.Module, parts: Sequence[Part]) -> Iterator[Part]:
    """Yield the parts of a batch in turn; processes exchange gradients only in the backward pass of the last one."""
    for part in parts[:-1]:
        with accelerator.no_sync(module):
            yield part
    yield parts[-1]


def optimizer_step(
    module: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, clip_norm: float
) -> torch.Tensor:
    """Clip the gradients, take a step, and clear the gradients.

    Args:
        clip_norm: largest gradient norm; 0 for no clipping.

    Returns:
        the gradient norm before clipping, 0-dim.
    """
    norm: Any = accelerator.clip_grad_norm_(module.parameters(), clip_norm if clip_norm > 0 else float("inf"))
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.detach()


def mean_terms(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of each term, 0-dim float32, over the parts of a batch."""
    return {name: torch.stack([row[name].detach().float() for row in rows]).mean() for name in rows[0]}
