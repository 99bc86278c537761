"""Image shards -> token shards: ``scq tokenize``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState

from scq.data.shards import ShardSet
from scq.data.stream import check_max_bad, iterate_once
from scq.data.tokens import TokenDataset, TokenWriter
from scq.data.views import augmented_view
from scq.engine.errors import UserError
from scq.engine.processes import join_processes
from scq.stage1_tokenizer.autoencoder import ImageTokenizer, to_float


@torch.no_grad()
def write_tokens(
    tokenizer: ImageTokenizer,
    shards: Path | str,
    out: Path | str,
    batch_size: int = 64,
    views: int = 1,
    cache: str | None = None,
    max_bad: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> TokenDataset:
    """Write the dominant codes of every image once, in the order of the shards.

    Under ``accelerate launch``, each process writes its part. An interrupted run resumes where it stopped.

    Args:
        batch_size: images per process and batch.
        views: augmented views of each image, see data.views; a prior sees one of them at a time.
        cache: folder that keeps the shards of a URL, see data.shards.ShardSet.
        max_bad: share of the set's images that may be unusable in this process. The next one is tokenized in place of
            each, so that there are as many grids as images, whatever the number of processes.
        progress: called as progress(done, total), in images of this process.

    Raises:
        UserError: the tokenizer has no codes.
        DataError: the shards are missing or damaged, ``max_bad`` is not in [0, 1), more images are unusable than may
            be, or ``out`` holds other tokens.
    """
    if not tokenizer.quantizer.has_codes:
        name = tokenizer.config.quantizer_name
        raise UserError(f"the tokenizer's quantizer, {name!r}, has no codes: there are no tokens to write")
    join_processes()
    state = PartialState()
    source = ShardSet(shards, cache)
    mine = len(source) * (state.process_index + 1) // state.num_processes
    mine -= len(source) * state.process_index // state.num_processes
    check_max_bad(max_bad)  # before a folder is made
    writer = TokenWriter(
        out,
        grid=tokenizer.grid,
        codebook_size=tokenizer.quantizer.codebook_size,
        fingerprint=tokenizer.fingerprint(),
        source={"fingerprint": source.fingerprint},
        num_classes=len(source.manifest["class_names"]),
        class_names=source.manifest["class_names"],
        views=views,
        rank=state.process_index,
        world_size=state.num_processes,
    )
    tokenizer = tokenizer.to(state.device).eval()
    done = writer.num_written
    if not writer.complete:
        part = {"rank": state.process_index, "world_size": state.num_processes, "start": writer.num_written}
        batches = iterate_once(shards, batch_size, cache=cache, max_bad=max_bad, **part)
        for batch in batches:
            indices = torch.stack(
                [
                    tokenizer.encode(
                        to_float(augmented_view(batch.images, batch.positions, v).to(state.device))
                    ).indices
                    for v in range(views)
                ],
                dim=1,
            )  # (b, views, h, w)
            writer.write(indices, batch.labels, source.keys(batch.positions.numpy()))
            done += len(indices)
            if progress is not None:
                progress(done, mine)
        writer.close()
    state.wait_for_everyone()
    return TokenDataset(out)
