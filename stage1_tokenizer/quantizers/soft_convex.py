"""The soft convex quantizer as a layer: a drop-in for a vector quantizer in a VQGAN.

The method is that of Gautam et al., "Soft Convex Quantization" (arXiv 2310.03004). Besides the solver, training needs a
lambda that follows the scale of the latents, VQ's terms on the nearest code, and dominant dropout; docs/quantizer.md
says why.
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from scq.engine.checks import finite_number, one_of, whole_number
from scq.engine.processes import gather_rows, same_everywhere, sum_across_processes
from scq.stage1_tokenizer.quantizers.interface import (
    MOST_DIM,
    Mixture,
    Quantized,
    check_codebook_shape,
    check_indices,
    check_latents,
    count_codes,
    flatten_latents,
    register_quantizer,
    returned,
    unflatten_latents,
    usage_of,
)
from scq.stage1_tokenizer.quantizers.kmeans import kmeans, kmeans_step
from scq.stage1_tokenizer.quantizers.reviving import RevivingQuantizer
from scq.stage1_tokenizer.solver import METHODS, ConvexSolution, soft_convex_solve
from scq.stage1_tokenizer.solver.codebook import nearest_codes


@register_quantizer("scq")
class SoftConvexQuantizer(RevivingQuantizer):
    """Every latent becomes a convex combination of codes, z_q of eq. (1) in docs/quantizer.md.

    ``forward`` returns the combinations z_q and, as indices, one code of each: that of largest weight, or the nearest
    one (``token``). In eval mode it is deterministic, changes no buffer and always returns the soft z_q.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        method: str = "exact",
        neighbours: int = 16,
        rho: float = 0.3,
        rho_end: float | None = None,
        rho_steps: int = 0,
        dominant_dropout: float = 0.5,
        token: str = "dominant",
        commitment: float = 0.25,
        codebook_weight: float = 1.0,
        kmeans_batches: int = 8,
        revive: bool = True,
        projection_dim: int | None = None,
        momentum: float = 0.95,
        window: int = 2048,
    ):
        """
        Args:
            codebook_size: K, the number of codes.
            dim: F, the channels of a latent.
            method: "exact", "local" or "relaxed", see `soft_convex_solve`.
            neighbours: codes per latent that "local" looks at.
            rho: lambda as a multiple of the running mean of the squared distance to the nearest code, > 0.
            rho_end: if given, rho moves geometrically to this value over ``rho_steps`` training steps. On the way the
                straight-through gradient is blended in, because dz_q/dz vanishes as lambda grows.
            rho_steps: length of that move, >= 1 with ``rho_end``. Here and below a step is an optimizer step: see
                `Quantizer.parts_per_step`.
            dominant_dropout: share of images, in [0, 1], that training decodes from their dominant codes alone. The
                decoder needs to learn that, because a prior can emit nothing else.
            token: "dominant" or "nearest": the code that stands for a latent where a single one has to, in ``indices``
                and in images that training decodes from codes alone. They differ where the mixture leans on codes that
                are farther away than the nearest, which a weak commitment allows.
            commitment: weight of |z - sg(nearest code)|^2, >= 0.
            codebook_weight: weight of |sg(z) - nearest code|^2, >= 0.
            kmeans_batches: how many training steps, from the first, set the codes by k-means; 0: random codes.
            revive: replace codes that stood for no latent over a whole window by latents far from their codes.
            projection_dim: if given, latents are projected to this many channels, latents and codes are l2-normalised,
                and z_q is projected back.
            momentum: of the running mean of the nearest distance from step to step, in [0, 1).
            window: images over which usage and perplexity are counted in training, >= 1.
        """
        super().__init__()
        check_codebook_shape(codebook_size, dim)
        one_of("method", method, METHODS)
        finite_number("rho", rho, above=0)
        if rho_end is not None:
            finite_number("rho_end", rho_end, above=0)
        whole_number("rho_steps", rho_steps, 0 if rho_end is None else 1)
        finite_number("dominant_dropout", dominant_dropout, 0, 1)
        one_of("token", token, ("dominant", "nearest"))
        finite_number("commitment", commitment, 0)
        finite_number("codebook_weight", codebook_weight, 0)
        whole_number("kmeans_batches", kmeans_batches, 0)
        if projection_dim is not None:
            whole_number("projection_dim", projection_dim, 1, MOST_DIM)
        finite_number("momentum", momentum, 0, below=1)
        whole_number("neighbours", neighbours, 1)
        self.codebook_size, self.dim, self.method, self.neighbours = codebook_size, dim, method, neighbours
        self.rho, self.rho_end, self.rho_steps = rho, rho_end, rho_steps
        self.dominant_dropout, self.token = dominant_dropout, token
        self.commitment, self.codebook_weight = commitment, codebook_weight
        self.kmeans_batches, self.momentum = kmeans_batches, momentum
        self.projection_dim = projection_dim
        inner = dim if projection_dim is None else projection_dim
        self.down = None if projection_dim is None else nn.Linear(dim, inner)
        self.up = None if projection_dim is None else nn.Linear(inner, dim)
        self.codebook = nn.Parameter(torch.randn(codebook_size, inner) / inner**0.5)
        self.mean_distance: Tensor  # (), running mean of min_k |z - c_k|^2; 0: none yet
        self.register_buffer("mean_distance", torch.zeros(()))
        self.kmeans_counts: Tensor  # (K,), latents behind each code in k-means
        self.register_buffer("kmeans_counts", torch.zeros(codebook_size))
        self._count(revive, window)

    def forward(self, z: Tensor, image_noise: Tensor | None = None) -> Quantized:
        """See `Quantizer.forward`.

        Raises:
            ValueError: z is misshapen or has an entry that is not finite, or image_noise is not (B,). Nothing has
                changed by then. A training step on a GPU does not look at the entries, since after the k-means start it
                reads nothing back; `Quantized.stats` tell.
        """
        check_latents(z, self.dim)
        if image_noise is not None and image_noise.shape != z.shape[:1]:
            raise ValueError(f"image_noise must be ({z.shape[0]},), one per image, not {tuple(image_noise.shape)}")
        with torch.autocast(z.device.type, enabled=False):
            rows = self._rows(z)  # (N, F)
            if self.training:
                self._prepare(rows.detach())
            codes = self._codes()  # (K, F)
            solution = soft_convex_solve(
                rows, codes, self._reg(rows, codes), method=self.method, neighbours=self.neighbours
            )
            nearest = codes[solution.nearest]  # (N, F)
            loss = self.codebook_weight * nnf.mse_loss(nearest, rows.detach())
            loss = loss + self.commitment * nnf.mse_loss(rows, nearest.detach())
            stats = self._stats(rows.detach(), nearest.detach(), solution)
            z_q = solution.z_q
            tokens = self._tokens(solution)  # (N,)
            if self.training:
                z_q = self._harden(rows, codes, solution, z.shape, image_noise)
                stats |= self._record(rows.detach(), stats["hard_error"], tokens, z.shape[0])
            z_q = unflatten_latents(z_q if self.up is None else self.up(z_q), z)
        return Quantized(returned(z_q, z), tokens.view(z.shape[0], *z.shape[2:]), loss, stats)

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes (B, F, h, w) float32 of indices (B, h, w); ValueError where they are out of range."""
        indices = check_indices(indices, self.codebook_size)
        with torch.autocast(indices.device.type, enabled=False):
            codes = self._codes() if self.up is None else self.up(self._codes())
        return codes[indices].permute(0, 3, 1, 2).contiguous()

    def solve(self, z: Tensor) -> ConvexSolution:
        """Which codes each latent of z (B, F, h, w) mixes and with which weights, rows ordered (B, h, w)."""
        check_latents(z, self.dim)
        with torch.autocast(z.device.type, enabled=False):
            rows, codes = self._rows(z), self._codes()
            reg = self._reg(rows, codes)
            return soft_convex_solve(rows, codes, reg, method=self.method, neighbours=self.neighbours)

    def mix(self, z: Tensor) -> Mixture:
        solution, grid = self.solve(z), (z.shape[0], *z.shape[2:])
        z_q = unflatten_latents(solution.z_q if self.up is None else self.up(solution.z_q), z)
        return Mixture(
            z_q, self._tokens(solution).view(grid), solution.support.view(*grid, -1), solution.weights.view(*grid, -1)
        )

    def current_rho(self) -> float:
        """rho at the present training step."""
        if self.rho_end is None:
            return self.rho
        return self.rho * (self.rho_end / self.rho) ** self._progress()

    def _tokens(self, solution: ConvexSolution) -> Tensor:
        """(N,) the code that stands for each latent."""
        return solution.nearest if self.token == "nearest" else solution.dominant

    def _progress(self) -> float:
        """Share of the annealing of rho that is done."""
        if self.rho_end is None:
            return 0.0
        return min(1.0, (self._host().steps if self.training else int(self.steps)) / self.rho_steps)

    def _rows(self, z: Tensor) -> Tensor:
        """Latents z (B, F, h, w) as the solver takes them: (N, F), or (N, projection_dim) normalised."""
        rows = flatten_latents(z)
        return rows if self.down is None else nnf.normalize(self.down(rows), dim=1)

    def _codes(self) -> Tensor:
        """(K, F) or (K, projection_dim) float32, likewise."""
        codes = self.codebook.float()
        return codes if self.down is None else nnf.normalize(codes, dim=1)

    @torch.no_grad()
    def _reg(self, rows: Tensor, codes: Tensor) -> Tensor:
        """Lambda (), from the mean distance up to the last step, so that the nearest codes need not be found twice."""
        mean, seen = self.mean_distance, self._host()
        if seen.steps + seen.parts == 0 if self.training else not mean > 0:
            mean = (rows - codes[nearest_codes(rows, codes)]).square().sum(1).mean()
            mean = sum_across_processes(mean) / sum_across_processes(torch.ones_like(mean)) if self.training else mean
        # Lambda must be positive even where all latents equal their codes; any will do, since the solution is the code.
        return (self.current_rho() * mean).clamp_min(torch.finfo(torch.float32).tiny * 1e6)

    def _harden(
        self, rows: Tensor, codes: Tensor, solution: ConvexSolution, shape: torch.Size, image_noise: Tensor | None
    ) -> Tensor:
        """z_q (N, F) as training decodes it: some images from codes alone."""
        z_q = solution.z_q
        progress = self._progress()
        if progress > 0:
            z_q = (1 - progress) * z_q + progress * (z_q.detach() + rows - rows.detach())
        if self.dominant_dropout == 0:
            return z_q
        if image_noise is None:
            image_noise = torch.rand(shape[0], device=rows.device)
        hard = (image_noise.to(rows.device) < self.dominant_dropout).view(-1, 1)  # (B, 1)
        hard = hard.expand(-1, shape[2] * shape[3]).reshape(-1, 1)  # (N, 1)
        straight_through = rows + (codes[self._tokens(solution)] - rows).detach()
        return torch.where(hard, straight_through, z_q)

    @torch.no_grad()
    def _prepare(self, rows: Tensor) -> None:
        """Change codes before they enter the graph: k-means over the first batches, revival when a window is full."""
        self._turn_window(rows)
        seen = self._host()
        if seen.steps >= self.kmeans_batches:
            return
        everywhere = gather_rows(rows)
        if seen.steps == 0 and seen.parts == 0:
            codes, counts = kmeans(everywhere, self.codebook_size)
        else:
            codes, counts = kmeans_step(self._codes(), self.kmeans_counts, everywhere)
        self.codebook.copy_(same_everywhere(codes))
        self.kmeans_counts.copy_(same_everywhere(counts))

    @torch.no_grad()
    def _record(self, rows: Tensor, hard_error: Tensor, tokens: Tensor, images: int) -> dict[str, Tensor]:
        """Advance the running statistics, the same in all processes."""
        first = self._host().steps + self._host().parts == 0
        sums = self._advance(tokens, images, hard_error * len(rows), hard_error.new_full((), len(rows)))
        mean = (sums[0] / sums[1]).float()
        momentum = self.momentum ** (1 / self.parts_per_step)
        self.mean_distance.copy_(mean if first else mean.lerp(self.mean_distance, momentum))
        return usage_of(self.counts + self.last_counts)

    @torch.no_grad()
    def _stats(self, rows: Tensor, nearest: Tensor, solution: ConvexSolution) -> dict[str, Tensor]:
        """Statistics of this batch. In training `_record` replaces usage and perplexity by those of the window."""
        return usage_of(count_codes(self._tokens(solution), self.codebook_size)) | {
            "support_size": (solution.weights > 0).sum(1).float().mean(),
            "dominant_weight": solution.weights.amax(1).mean(),
            "dominant_is_nearest": (solution.dominant == solution.nearest).float().mean(),
            "soft_error": (rows - solution.z_q.detach()).square().sum(1).mean(),
            "hard_error": (rows - nearest).square().sum(1).mean(),
            "residual": solution.residual.amax(),
            "rho": rows.new_full((), self.current_rho()),
        }
