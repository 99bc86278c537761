"""The device, the processes and the precision of a training run."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from scq.engine.config import LoopConfig
from scq.engine.errors import UserError
from scq.engine.processes import join_processes
from scq.engine.tracking import checked_tracker


def make_accelerator(config: LoopConfig) -> Accelerator:
    """Create the accelerator of this process: its device, the other processes, and mixed precision.

    Raises:
        UserError: the tracker is unknown or not installed, the precision is unknown, or ``accumulate`` does not divide
            this process's share of a batch.
    """
    # accelerate fixes the precision at its first use in a process, but a process may train several models.
    AcceleratorState._reset_state()
    join_processes()
    tracker = checked_tracker(config.tracker)
    accelerator = Accelerator(mixed_precision=resolve_precision(config.precision), log_with=tracker, project_dir=".")
    share = config.batch_size // accelerator.num_processes
    if share % config.accumulate:
        raise UserError(
            f"training.accumulate={config.accumulate} does not divide the {share} images that each process takes of "
            f"training.batch_size={config.batch_size}; choose a divisor of {share}"
        )
    return accelerator


def resolve_precision(precision: str) -> str:
    """Translate ``training.precision`` for accelerate.

    ``auto`` becomes bf16 if the hardware computes in bf16 natively; emulated bf16 would only be slower.

    Returns:
        ``bf16``, or ``no`` for float32.

    Raises:
        UserError: the precision is not auto, fp32 or bf16.
    """
    if precision not in ("auto", "fp32", "bf16"):  # fp16 would need loss scaling, and skipped steps on overflow
        raise UserError(f"training.precision is {precision!r}; it must be auto, fp32 or bf16")
    if precision != "auto":
        return "no" if precision == "fp32" else precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16", False) else "no"
