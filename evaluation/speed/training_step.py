"""How long a whole training step takes with one quantizer or another: what ``scq benchmark step`` runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scq.data.stream import ImageStream
from scq.engine.accelerators import make_accelerator
from scq.engine.config import load_config
from scq.stage1_tokenizer.stage import TokenizerExperiment, TokenizerTask


def benchmark_step(
    configs: list[Path],
    shards: str,
    *,
    overrides: list[str] | None = None,
    warmup: int = 30,
    repeats: int = 20,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Time training steps of several tokenizers in turns, so that a busy machine disturbs all alike.

    Args:
        configs: tokenizer configs; the first one is what the others are compared with.
        shards: real images; latents of noise would be solved faster or slower than those of training.
        overrides: ``section.key=value`` for all of them.
        warmup: untimed steps of each, past k-means starts and compilation.
        repeats: timed steps of each, at least 2.
        progress: called with (done, total), counted in steps of all.

    Returns:
        one dict for each config: config, median_s, low_s and high_s (quartiles), ratio (median of the paired ratios).

    Raises:
        UserError, DataError: a config or the shards are unfit.
    """
    tasks, streams = [], []
    for path in configs:
        config = load_config(TokenizerExperiment, path, overrides)
        tasks.append(TokenizerTask(config, make_accelerator(config.training), torch.zeros(1)))
        streams.append(iter(ImageStream(shards, batch_size=config.training.batch_size, flip=config.data.flip)))
    seconds: list[list[float]] = [[] for _ in tasks]
    for step in range(warmup + repeats):
        for task, stream, kept in zip(tasks, streams, seconds, strict=True):
            batch = next(stream)
            started = time.perf_counter()
            terms = task.training_step(batch, step)
            float(terms["loss"])  # waits for the device
            if step >= warmup:
                kept.append(time.perf_counter() - started)
        if progress is not None:
            progress(step + 1, warmup + repeats)
    rows = []
    for path, kept in zip(configs, seconds, strict=True):
        low, median, high = statistics.quantiles(kept, n=4)
        ratio = statistics.median(mine / first for mine, first in zip(kept, seconds[0], strict=True))
        rows.append({"config": str(path), "median_s": median, "low_s": low, "high_s": high, "ratio": ratio})
    return rows


def format_table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as lines for people."""
    return [
        f"{row['config']:48} {1e3 * row['median_s']:8.1f} ms  "
        f"({1e3 * row['low_s']:.1f} - {1e3 * row['high_s']:.1f})  {row['ratio']:.2f}x"
        for row in rows
    ]
