"""Editing images by editing grids of codes: what is kept, what is redrawn, and grids larger than the prior's."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from scq.engine.checks import finite_number
from scq.engine.errors import UserError
from scq.engine.randomness import image_uniform

Window = tuple[slice, slice]  # of a canvas: rows, columns
# Called after each step with the number of the step, the number of steps, and the grids (B, h, w).
OnStep = Callable[[int, int, torch.Tensor], None]
# Grids with masked tokens (B, h, w), seeds (B,) and what to call after each step -> filled grids.
Draw = Callable[[torch.Tensor, torch.Tensor, OnStep], torch.Tensor]


def tokens_under(mask: torch.Tensor, factor: int) -> torch.Tensor:
    """Masks of pixels (B, H, W) bool -> of tokens (B, H / factor, W / factor): those with any masked pixel."""
    return F.max_pool2d(mask[:, None].float(), factor)[:, 0] > 0


def variation_mask(seeds: torch.Tensor, grid: tuple[int, int], strength: float) -> torch.Tensor:
    """A random share of each image's tokens to redraw, bool (B, h, w).

    Args:
        seeds: (B,) int64.
        strength: the share, in [0, 1].

    Raises:
        UserError: strength is out of range.
    """
    strength = finite_number("strength", strength, 0, 1)
    rank = image_uniform(seeds, grid[0] * grid[1], purpose="variation").argsort(1).argsort(1)
    return (rank < round(strength * rank.shape[1])).view(-1, *grid)


def windows(canvas: tuple[int, int], grid: tuple[int, int], known: torch.Tensor) -> list[tuple[int, int]]:
    """Corners (top, left) of windows of the prior's size that cover a canvas, each overlapping the next by half.

    Windows nearest to the known tokens come first, so that an image grows outwards; if nothing is known, it grows from
    the top left.

    Args:
        canvas: (height, width) in tokens, at least those of ``grid``.
        grid: (height, width) of a window in tokens.
        known: (height, width) bool, the known tokens of the canvas.
    """
    tops, lefts = (
        sorted({*range(0, whole - side, max(1, side // 2)), whole - side})
        for whole, side in zip(canvas, grid, strict=True)
    )
    centre = known.nonzero().double().mean(0) if known.any() else torch.zeros(2, dtype=torch.float64)
    half = torch.tensor(grid, dtype=torch.float64) / 2

    def distance(corner: tuple[int, int]) -> float:
        return float((torch.tensor(corner) + half - 0.5 - centre).square().sum())

    return sorted(((top, left) for top in tops for left in lefts), key=distance)


def fill(
    draw: Draw, start: torch.Tensor, grid: tuple[int, int], mask_token: int, seeds: torch.Tensor, on_step: OnStep
) -> torch.Tensor:
    """Draw the masked tokens of grids of any size with a prior for grids of one size, window after window.

    What one window has drawn is fixed for the next. A grid of the prior's own size is a single window, drawn with the
    seeds as they are.

    Args:
        draw: fills grids of the prior's size.
        start: (B, H, W) int64, codes and the mask token. All images must be masked alike, unless they have the prior's
            size.
        grid: (height, width) of the prior's grids.
        seeds: (B,) int64.
        on_step: gets the whole grids, and counts the steps of all windows together.

    Returns:
        (B, H, W) int64 codes.

    Raises:
        UserError: the grids are smaller than the prior's.
    """
    canvas = tuple(start.shape[1:])
    if canvas[0] < grid[0] or canvas[1] < grid[1]:
        raise UserError(f"a grid of {canvas[0]}x{canvas[1]} tokens is smaller than the prior's {grid[0]}x{grid[1]}")
    if canvas == tuple(grid):
        return draw(start, seeds, on_step)
    tokens, masked = start.clone(), (start[0] == mask_token).cpu()
    waiting = []  # the windows that still have something to draw when their turn comes
    for number, (top, left) in enumerate(windows(canvas, grid, ~masked)):
        here = slice(top, top + grid[0]), slice(left, left + grid[1])
        if masked[here].any():
            waiting.append((number, here))
            masked[here] = False
    for done, (number, here) in enumerate(waiting):
        window = tokens[:, *here]

        def on_window_step(step: int, steps: int, grids: torch.Tensor, done: int = done, here: Window = here) -> None:
            whole = tokens.clone()
            whole[:, *here] = grids
            on_step(done * steps + step, len(waiting) * steps, whole)

        window_seeds = (image_uniform(seeds, purpose=f"window {number}").double() * 2**23).long() + (seeds << 23)
        window.copy_(draw(window, window_seeds, on_window_step))
    return tokens
