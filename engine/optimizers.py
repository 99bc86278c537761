"""Optimizers by timm's factory, with weight decay where it belongs."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from torch import nn

from engine.config import OptimizerConfig


def create_optimizer(
    module: nn.Module, config: OptimizerConfig, exclude: tuple[str, ...] = ()
) -> torch.optim.Optimizer:
    """AdamW over ``module``; no weight decay on one-dimensional parameters nor on names containing ``exclude``.

    Every group carries its base rate as ``initial_lr``, from which the loop computes the rate of each step.
    """
    skipped = [name for name, _ in module.named_parameters() if any(part in name for part in exclude)]
    module.no_weight_decay = lambda: set(skipped)
    optimizer = create_optimizer_v2(
        module, opt="adamw", lr=config.learning_rate, weight_decay=config.weight_decay, betas=tuple(config.betas)
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = config.learning_rate
    return optimizer


def optimizer_step(
    loss: torch.Tensor, module: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, clip_norm: float
) -> torch.Tensor:
    """Backward, clip, step, clear. Returns the gradient norm before clipping, 0-dim."""
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(module.parameters(), clip_norm if clip_norm > 0 else float("inf"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.as_tensor(norm).detach()
