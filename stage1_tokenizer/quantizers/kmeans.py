"""How codes are placed: k-means at the start, and rows drawn at random, which also revive dead codes."""

import torch
from torch import Tensor

from scq.stage1_tokenizer.solver.codebook import nearest_codes


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


def kmeans_step(codes: Tensor, counts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """One step of mini-batch k-means: every code becomes the mean of all latents that it was nearest to so far.

    Args:
        codes: (K, F); counts: (K,) latents behind each code so far; rows: (n, F) new latents.

    Returns:
        The new codes and counts.
    """
    nearest = nearest_codes(rows, codes)  # (n,)
    new_counts = counts + torch.bincount(nearest, minlength=len(codes)).to(counts.dtype)
    total = (codes * counts.unsqueeze(1)).index_add_(0, nearest, rows)
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
