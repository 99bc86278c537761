"""How codes are placed: k-means at the start, and rows drawn at random, which also revive dead codes."""

import torch
import torch.nn.functional as nnf
from torch import Tensor

from scq.stage1_tokenizer.quantizers.interface import count_codes
from scq.stage1_tokenizer.solver.codebook import add_rows, nearest_codes


def draw_rows(rows: Tensor, count: int, seed: int, share: Tensor | None = None) -> Tensor:
    """``count`` rows of (n, F), drawn with a generator of this seed; each at most once while there are enough.

    Args:
        share: (n,) relative chances, None for equal ones.
    """
    generator = torch.Generator().manual_seed(seed)
    chances = torch.ones(len(rows)) if share is None else share.detach().cpu().double()
    fits = count <= int((chances > 0).sum())
    if not fits:
        chances = torch.ones(len(rows))
    if len(rows) >= count and len(rows) < 1 << 24:
        chosen = torch.multinomial(chances, count, replacement=False, generator=generator)
    else:
        chosen = torch.randint(len(rows), (count,), generator=generator)
    return rows[chosen.to(rows.device)]


def replace_rows(codes: Tensor, replaced: Tensor, rows: Tensor, seed: int, share: Tensor) -> Tensor:
    """Codes (K, F) of which those that are ``replaced`` (K,) are rows as `draw_rows` draws them, all without waiting.

    As many rows are drawn as there are codes, because on a GPU nobody knows how many it takes. The first of them are
    those that would be drawn alone.

    Args:
        rows: (n, F); share: (n,) relative chances.
    """
    generators = [torch.Generator(rows.device).manual_seed(seed) for _ in range(2)]
    count, size, n = replaced.sum(), len(codes), len(rows)
    chances = share.detach().double()
    chances = torch.where(count <= (chances > 0).sum(), chances, torch.ones_like(chances))
    # What torch.multinomial does without replacement.
    order = (chances / torch.empty_like(chances).exponential_(1, generator=generators[0])).topk(min(n, size)).indices
    once = nnf.pad(order, (0, size - len(order)))
    again = torch.randint(n, (size,), generator=generators[1], device=rows.device)
    drawn = torch.where(count <= n, once, again) if n < 1 << 24 else again  # (K,), whose first ``count`` are wanted
    place = (replaced.cumsum(0) - 1).clamp_min(0)
    return torch.where(replaced.unsqueeze(1), rows[drawn[place]], codes)


def kmeans_step(codes: Tensor, counts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """One step of mini-batch k-means: every code becomes the mean of all latents that it was nearest to so far.

    Args:
        codes: (K, F); counts: (K,) latents behind each code so far; rows: (n, F) new latents.

    Returns:
        The new codes and counts.
    """
    nearest = nearest_codes(rows, codes)  # (n,)
    new_counts = counts + count_codes(nearest, len(codes)).to(counts.dtype)
    total = add_rows(codes * counts.unsqueeze(1), nearest, rows)
    return torch.where(new_counts.unsqueeze(1) > 0, total / new_counts.clamp_min(1).unsqueeze(1), codes), new_counts


def kmeans(rows: Tensor, size: int, *, steps: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Lloyd's k-means from ``size`` drawn rows.

    Args:
        rows: (n, F) latents. With fewer rows than codes, codes repeat rows, plus noise of a thousandth of their spread.

    Returns:
        Codes (size, F) and the number of rows nearest to each (size,).
    """
    codes = draw_rows(rows, size, seed)
    if len(rows) < size:
        noise = torch.randn(codes.shape, generator=torch.Generator().manual_seed(seed), dtype=codes.dtype)
        codes = codes + 1e-3 * rows.std().nan_to_num() * noise.to(codes.device)
    counts = codes.new_zeros(size)
    for _ in range(steps):
        codes, counts = kmeans_step(codes, torch.zeros_like(counts), rows)
    return codes, counts
