"""Random numbers as pure functions of an image's key and a purpose: the project's one source of randomness.

Training and sampling never draw from a global generator whose state would have to be saved and divided among
processes. Every image has its own stream of numbers, addressed by (key of the image, counter): the same image gets the
same numbers whatever the batch size, the number of processes, the device, or how often the run was resumed.

The generator is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): the
finaliser of a Weyl sequence, in wrapping 64-bit integer arithmetic that NumPy and torch compute alike on every device.
Data readers use `position_bits`, in NumPy, because torch's threads do not survive a fork. Networks use the other
functions, on their own device.
"""

from __future__ import annotations

import math
import zlib
from typing import TypeVar

import numpy as np
import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MULTIPLIER_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = -7723592293110705685  # 0x94D049BB133111EB
Int64 = TypeVar("Int64", torch.Tensor, np.ndarray)  # of 64-bit signed integers


def _shift_right(x: Int64, bits: int) -> Int64:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # >> copies the sign bit of signed integers; the mask clears it


def _mix(x: Int64) -> Int64:
    """SplitMix64's finaliser."""
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIER_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIER_2
    return x ^ _shift_right(x, 31)


def position_bits(seed: int, positions: np.ndarray, purpose: int) -> np.ndarray:
    """64 random bits for each position of a data stream, or each image of a set.

    Args:
        seed: of the stream, any integer.
        positions: (n,) int64.
        purpose: keeps draws for different decisions independent.

    Returns:
        (n,) uint64.
    """
    with np.errstate(over="ignore"):  # overflow is intended
        start = _mix(np.array([seed % 2**64], np.uint64).view(np.int64) + _GOLDEN) + purpose  # (1,)
        return _mix(_mix(start + np.asarray(positions, np.int64) + _GOLDEN) + _GOLDEN).view(np.uint64)


def image_uniform(keys: torch.Tensor, *shape: int, seed: int = 0, purpose: str = "") -> torch.Tensor:
    """Uniform numbers in (0, 1), one block of ``shape`` for each image.

    Args:
        keys: (B,) int64, one for each image: its position in the training sequence, or its sampling seed.
        shape: size of each image's block; none for a single number.
        seed: the experiment's seed.
        purpose: keeps the numbers that an image needs for different things independent.

    Returns:
        (B, *shape) float32 on the device of ``keys``.
    """
    base = zlib.crc32(purpose.encode()) + (seed << 32)  # no tensor: a GPU would be waited for to send it there
    streams = _mix(_mix(keys.to(torch.int64) * _GOLDEN + base) + base)  # (B,)
    counters = torch.arange(1, math.prod(shape) + 1, device=keys.device) * _GOLDEN  # (prod(shape),)
    bits = _mix(streams[:, None] + counters)
    # 23 bits and a half step fill a float32 mantissa exactly and keep 0 and 1 out, so that logarithms stay finite.
    uniform = (_shift_right(bits, 41).to(torch.float32) + 0.5) * 2.0**-23
    return uniform.view(len(keys), *shape)


def image_gumbel(keys: torch.Tensor, *shape: int, seed: int = 0, purpose: str = "") -> torch.Tensor:
    """Standard Gumbel numbers, addressed like :func:`image_uniform`. Returns (B, *shape) float32."""
    return -torch.log(-torch.log(image_uniform(keys, *shape, seed=seed, purpose=purpose)))


def standard_normal(keys: torch.Tensor, *shape: int, seed: int = 0, purpose: str = "") -> torch.Tensor:
    """Standard normal numbers, addressed like :func:`image_uniform` (Box and Muller). Returns (B, *shape) float32."""
    radius = (-2 * image_uniform(keys, *shape, seed=seed, purpose=f"{purpose} radius").log()).sqrt()
    return radius * (2 * math.pi * image_uniform(keys, *shape, seed=seed, purpose=f"{purpose} angle")).cos()


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A seed for torch's own generator in one training step, for the few modules that draw from it (dropout)."""
    key = torch.tensor([step * 4096 + rank])
    return int(image_uniform(key, 2, seed=seed, purpose="step").mul(2**23).long()[0] @ torch.tensor([1, 2**23]))
