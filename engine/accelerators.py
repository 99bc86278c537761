"""Devices, processes and precision of a training."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from scq.engine.config import LoopConfig
from scq.engine.errors import UserError
from scq.engine.processes import join_processes
from scq.engine.tracking import checked_tracker


def make_accelerator(config: LoopConfig) -> Accelerator:
    """accelerate's view of this process: its device, the other processes, and mixed precision.

    Raises:
        UserError: the tracker or the precision is unknown, or ``accumulate`` does not divide a process's images.
    """
    # accelerate keeps the first precision of a process for good; a process may train several models.
    AcceleratorState._reset_state()
    join_processes()
    tracker = checked_tracker(config.tracker)
    accelerator = Accelerator(mixed_precision=resolve_precision(config.precision), log_with=tracker, project_dir=".")
    share = config.batch_size // accelerator.num_processes
    if share % config.accumulate:
        raise UserError(
            f"training.accumulate={config.accumulate} does not divide the {share} images of each process's share of "
            f"training.batch_size={config.batch_size}"
        )
    return accelerator


def resolve_precision(precision: str) -> str:
    """accelerate's word for a precision.

    ``auto`` becomes bf16 where the hardware multiplies bf16 natively; elsewhere emulation would only be slower.

    Raises:
        UserError: another word than auto, fp32 or bf16.
    """
    if precision not in ("auto", "fp32", "bf16"):  # fp16 needs losses scaled, and steps left out where they overflow
        raise UserError(f"training.precision is {precision!r}; it must be auto, fp32 or bf16")
    if precision != "auto":
        return "no" if precision == "fp32" else precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16", False) else "no"
