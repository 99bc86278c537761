"""Modules that compute in float32 whatever the model around them is cast to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class KeepsFloat32(nn.Module):
    """A module whose weights a cast of the model around it, such as ``model.half()``, leaves as they are."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def without_a_cast(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            cast = tensor.is_floating_point() and applied.dtype != tensor.dtype
            return tensor.to(applied.device) if cast else applied

        return super()._apply(without_a_cast, recurse)
