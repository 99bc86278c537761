"""How fast images are drawn: ``scq benchmark sampling``."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from scq.evaluation.benchmark.tables import markdown_table
from scq.sampling.pipeline import SoftConvexPipeline


def benchmark_sampling(
    pipeline: SoftConvexPipeline,
    steps: list[int],
    *,
    num_images: int = 64,
    batch_size: int = 64,
    repeats: int = 5,
    compiled: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Seconds of prior, refiner and decoder for ``num_images`` images, and of a plain loop, all in turns.

    The plain loop is the shortest that draws from the same prior, refiner and decoder: whole batches, one call of the
    network a step, torch's own random numbers, confidence order; it gives up seeds of their own for images, equal
    images in any batch, and every setting but the steps.

    Args:
        compiled: whether the prior is compiled first.

    Returns:
        a row for each number of steps: seconds of every turn, and of their median images a second and shares of time;
        the median, smallest and largest ratio of the pipeline's time to the plain loop's.
    """
    if compiled:
        pipeline.prior.compile()
    rows, done, total = [], 0, len(steps) * (repeats + 1)
    with torch.no_grad():
        for number in steps:
            turns: dict[str, list[float]] = {"prior": [], "refine": [], "decode": [], "plain": []}
            for turn in range(repeats + 1):
                spent = _turn(pipeline, number, num_images, batch_size)
                if turn:  # the first one warms up
                    for name, seconds in spent.items():
                        turns[name].append(seconds)
                done += 1
                if progress is not None:
                    progress(done, total)
            rows.append(_row(turns, number, num_images, pipeline))
    return rows


def _turn(pipeline: SoftConvexPipeline, steps: int, num_images: int, batch_size: int) -> dict[str, float]:
    spent = {"prior": 0.0, "refine": 0.0, "decode": 0.0, "plain": 0.0}

    def clock() -> float:
        if pipeline.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for first in range(0, num_images, batch_size):
        seeds = torch.arange(first, min(first + batch_size, num_images))
        start = clock()
        tokens = pipeline.draw_tokens(seeds, steps=steps)
        drawn = clock()
        pipeline.decode_tokens(tokens, seeds, refine=False)
        decoded = clock()
        pipeline.decode_tokens(tokens, seeds)
        refined = clock()
        _plain_loop(pipeline, len(seeds), steps)
        ended = clock()
        spent["prior"] += drawn - start
        spent["decode"] += decoded - drawn
        spent["refine"] += max(0.0, (refined - decoded) - (decoded - drawn)) if pipeline.refiner is not None else 0.0
        spent["plain"] += ended - refined
    return spent


def _plain_loop(pipeline: SoftConvexPipeline, count: int, steps: int) -> torch.Tensor:
    """MaskGIT's confidence order as in a tutorial, then refiner and decoder: images (count, 3, H, W)."""
    prior, length = pipeline.prior, pipeline.prior.length
    tokens = torch.full((count, length), prior.mask_token, device=pipeline.device)
    for step in range(steps):
        probabilities = prior(tokens).float().softmax(-1)  # (count, L, K)
        drawn = probabilities.flatten(0, 1).multinomial(1).view(count, length)
        confidence = probabilities.gather(-1, drawn[..., None])[..., 0]
        masked = tokens == prior.mask_token
        confidence = confidence.masked_fill(~masked, torch.inf)
        hidden = int(length * math.cos((step + 1) / steps * math.pi / 2)) if step + 1 < steps else 0
        keep = confidence.topk(max(1, length - hidden), dim=1).indices
        shown = torch.zeros_like(masked).scatter(1, keep, True)
        tokens = torch.where(masked & shown, drawn, tokens)
    grid = tokens.view(count, *prior.config.grid)
    if pipeline.refiner is None:
        return pipeline.tokenizer.decode_indices(grid)
    return pipeline.tokenizer.decode(pipeline.refiner.refine(grid, torch.arange(count, device=grid.device)))


def _row(turns: dict[str, list[float]], steps: int, images: int, pipeline: SoftConvexPipeline) -> dict[str, Any]:
    whole = [sum(parts) for parts in zip(turns["prior"], turns["refine"], turns["decode"], strict=True)]
    ratios = [ours / plain for ours, plain in zip(whole, turns["plain"], strict=True)]
    median = statistics.median(whole)
    return {
        "steps": steps,
        "precision": str(pipeline.prior.dtype).removeprefix("torch."),
        "images_per_second": images / median,
        "seconds": sorted(whole),
        "share_of_prior": statistics.median(turns["prior"]) / median,
        "share_of_refiner": statistics.median(turns["refine"]) / median if pipeline.refiner is not None else None,
        "share_of_decoder": statistics.median(turns["decode"]) / median,
        "ratio_to_plain_loop": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


def format_table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as Markdown."""
    cells = []
    for row in rows:
        refiner = row["share_of_refiner"]
        cells.append(
            [row["steps"], f"{row['images_per_second']:.1f}", f"{row['share_of_prior']:.0%}"]
            + ["-" if refiner is None else f"{refiner:.1%}", f"{row['share_of_decoder']:.0%}"]
            + [f"{row['ratio_to_plain_loop']:.2f} ({row['ratio_low']:.2f} - {row['ratio_high']:.2f})"]
        )
    head = ["steps", "images/s", "prior", "refiner", "decoder", "time beside a plain loop"]
    return markdown_table(head, cells)
