"""The device, the processes and the precision of a training run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin, parse_flag_from_env
from torch import Tensor, nn

from scq.engine.config import LoopConfig
from scq.engine.errors import UserError
from scq.engine.processes import gather_objects, join_processes
from scq.engine.progress import say
from scq.engine.tracking import checked_tracker

Placed = TypeVar("Placed", bound=nn.Module)

# `accelerate launch` sets these from its own questionnaire. Whatever they say, the config decides.
_DECIDED_BY = {
    "ACCELERATE_MIXED_PRECISION": "training.precision",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "training.accumulate",
    "ACCELERATE_GRADIENT_CLIPPING": "optimizer.clip_norm",
    "ACCELERATE_DYNAMO_BACKEND": "training.compile",
}
_REFUSED = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")  # of ACCELERATE_USE_...
# Libraries below torch read these, and then round what is computed in float32.
_ROUNDING = (
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


def make_accelerator(config: LoopConfig, begun: str | None = None) -> Accelerator:
    """Create the accelerator of this process: its device, the other processes, and mixed precision.

    Everything that changes a weight comes from the config, and nothing from accelerate's environment variables.

    Args:
        begun: the precision that the run was begun with, which ``auto`` keeps; None for a new run.

    Raises:
        UserError: the tracker is unknown or not installed, the precision is unknown, ``accumulate`` does not divide
            this process's share of a batch, or the environment asks for another engine, such as DeepSpeed.
    """
    _refuse_other_engines()
    # accelerate fixes the precision at its first use in a process, but a process may train several models.
    AcceleratorState._reset_state()
    join_processes()
    tracker = checked_tracker(config.tracker)
    accelerator = Accelerator(
        mixed_precision="bf16" if resolve_precision(config.precision, begun) == "bf16" else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_plugin=TorchDynamoPlugin(backend="no"),  # pyright: ignore[reportArgumentType]  its annotation is wrong
        log_with=tracker,
        project_dir=".",
    )
    if accelerator.is_main_process:
        _say_what_the_environment_asks()
    # Batches have one size, so that the time to look for the fastest convolutions is spent once. float32 is computed as
    # torch does by default: matrix products in full, convolutions in TF32.
    torch.backends.cudnn.benchmark = accelerator.device.type == "cuda"
    share = config.batch_size // accelerator.num_processes
    if share % config.accumulate:
        raise UserError(
            f"training.accumulate={config.accumulate} does not divide the {share} images that each process takes of "
            f"training.batch_size={config.batch_size}; choose a divisor of {share}"
        )
    return accelerator


def place(network: Placed, device: torch.device) -> Placed:
    """Move a network to the device that trains it; on a GPU, weights of convolutions are laid out channels-last.

    Tensor cores multiply in that layout. Only the order in memory changes: values, fingerprints and what is saved stay.
    """
    network = network.to(device)
    return network.to(memory_format=torch.channels_last) if device.type == "cuda" else network


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of the host's tensors on a device, of which a GPU need not be waited for.

    CUDA copies without the host only from pinned memory.
    """
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]


def resolve_precision(precision: str, begun: str | None = None) -> str:
    """The precision, bf16 or fp32, that ``training.precision`` stands for.

    ``auto`` keeps the precision that the run was begun with. A new run takes bf16 where the hardware multiplies it
    fast, in every process. Among CPUs those are the ones with AMX's tiles, and AMD's with AVX-512's bf16: with the same
    instructions alone, a step takes longer than in float32 on Intel's.

    Raises:
        UserError: the precision is not auto, fp32 or bf16.
    """
    if precision not in ("auto", "fp32", "bf16"):  # fp16 would need loss scaling, and skipped steps on overflow
        raise UserError(f"training.precision is {precision!r}; it must be auto, fp32 or bf16")
    if precision != "auto":
        return precision
    here = "bf16" if all(gather_objects(_has_fast_bf16())) else "fp32"
    if begun not in (None, here):
        say(f"the run was begun in {begun}, which it keeps; a new one would take {here} on this machine")
    return begun or here


def cpu_capabilities() -> dict[str, Any]:
    """What torch knows of this processor: its name, and its instructions. torch before 2.11 knows nothing."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def _has_fast_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # oneDNN, which multiplies for torch, may have been told to leave newer instructions alone.
    allowed = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL").upper()
    known = cpu_capabilities()
    amd = "AMD" in known.get("cpu_name", "")
    needed, at_least = ("avx512_bf16", ("BF16", "AMX")) if amd else ("amx_bf16", ("AMX",))
    return known.get(needed, False) and any(isa in allowed for isa in ("ALL", "DEFAULT", *at_least))


def _refuse_other_engines() -> None:
    for engine in _REFUSED:
        if parse_flag_from_env(f"ACCELERATE_USE_{engine}"):
            raise UserError(
                f"ACCELERATE_USE_{engine} is set, perhaps by `accelerate launch`, but scq trains without it; unset it, "
                "or start with torchrun (shard=true divides a prior among processes)"
            )


def _say_what_the_environment_asks() -> None:
    for variable, key in _DECIDED_BY.items():
        if os.environ.get(variable, "no").lower() not in ("no", "1", ""):
            say(f"{variable}={os.environ[variable]} has no effect: {key} decides")
    for variable in _ROUNDING:
        if variable in os.environ:
            say(f"{variable}={os.environ[variable]} is set: results in float32 may be rounded more than usual")
