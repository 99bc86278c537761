"""Soft convex quantization as a function: the best convex combination of codes for many latents, differentiably.

For a latent z in R^F and a codebook C (K, F) with rows c_k, over the probability simplex D, with lambda > 0 and e the
one-hot vector of the code nearest to z:

    p* = argmin over p in D of  1/2 |z - C^T p|^2 + (lambda/2) |p - e|^2,        z_q = C^T p*                    (1)

docs/quantizer.md derives the dual (2), the gradient (3) and the published relaxation (4). The problem and (4) are those
of Gautam, Pryzant, Yang, Zhu and Sojoudi, "Soft Convex Quantization" (arXiv 2310.03004); the exact solver is this
project's own. It has three implementations with the same functions: `compiled` on a CPU, `fused` on NVIDIA's GPUs,
`batched` everywhere else.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import scq.stage1_tokenizer.solver.batched as batched
import scq.stage1_tokenizer.solver.compiled as compiled
from scq.stage1_tokenizer.solver.codebook import Codebook, fused_kernels, may_wait, require_finite_squares
from scq.stage1_tokenizer.solver.relaxed import relaxed_gradient, solve_relaxed

METHODS = ("exact", "local", "relaxed")
# What the residual is asked to stay below, in units of weight: well above rounding, well below what training notices.
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
# The least reg, in units of the codes' mean squared distance from their mean. From a hundredth of it down, not even
# float64 tells weights apart; z_q is the projection on the hull either way. Training comes there if latents are codes.
_LEAST_REG = 1e-6


class ConvexSolution(NamedTuple):
    """Solutions of (1) for N latents. Only ``z_q`` carries gradients."""

    z_q: Tensor  # (N, F) convex combinations of codes
    weights: Tensor  # (N, S) in [0, 1], rows sum to one, padded with 0
    support: Tensor  # (N, S) int64 codes that the weights belong to; padding repeats a code, with weight 0
    nearest: Tensor  # (N,) int64, the first code of least distance
    dominant: Tensor  # (N,) int64, the code of largest weight, the first one where several tie
    residual: Tensor  # (N,) how far the weights are from optimal for (1) over all K codes, in units of weight
    iterations: int | Tensor  # moves of the slowest row's support, () where it is not read yet; 0 for the relaxation


def soft_convex_solve(
    z: Tensor,
    codebook: Tensor,
    reg: float | Tensor,
    *,
    method: str = "exact",
    neighbours: int = 16,
    tol: float | None = None,
    max_iter: int = 100,
) -> ConvexSolution:
    """Find the best convex combination of codes for each latent: z_q of eq. (1) of docs/quantizer.md.

    Gradients reach z, codebook and reg by the optimality conditions, eq. (3), with e held constant. Nothing is
    unrolled, and second derivatives are not offered.

    Args:
        z: (N, F) latents, float32 or float64; half precision is computed in float32.
        codebook: (K, F) codes c_k, the rows of C.
        reg: lambda > 0 in units of squared distance, a number or a (N,) tensor. Large: vector quantization. Small:
            projection on the convex hull of the codes; 1e-6 of the codes' mean squared distance from their mean is the
            least, for which any smaller value stands.
        method: "exact", the solution of (1) over all codes; "local", over the ``neighbours`` nearest codes only;
            "relaxed", the published closed form (4), which solves a looser problem.
        neighbours: how many codes "local" looks at, >= 1.
        tol: what ``residual`` is asked to stay below; None: 1e-5 in float32, 1e-10 in float64. Rows that float32
            cannot bring there (far-away latents, tiny reg) are solved again in float64.
        max_iter: moves of a row's support at most, per working set.

    Returns:
        A `ConvexSolution`. A row that did not reach ``tol`` says so in its ``residual``.

    Raises:
        ValueError: shapes that do not fit, an empty codebook, a value that is not finite, reg <= 0, an unknown method.
            A training step on a GPU (see `may_wait`) looks into no tensor: there, what is not finite gives residuals
            that are not.
    """
    waits = may_wait(z)
    _check(z, codebook, method, neighbours, max_iter, tol, values=waits)
    with torch.autocast(z.device.type, enabled=False):
        dtype = torch.float64 if torch.float64 in (z.dtype, codebook.dtype) else torch.float32
        z, codebook = z.to(dtype), codebook.to(dtype)
        spread = (codebook - codebook.mean(0)).detach().square().sum(1).mean()  # ()
        reg = torch.maximum(_check_reg(reg, z, values=waits), _LEAST_REG * spread)  # (N, 1)
        z_q, weights, support, nearest, residual, iterations = ConvexProgram.apply(
            z, codebook, reg, method, neighbours, tol or _TOLERANCE[dtype], max_iter, waits
        )
        top = weights.amax(1, keepdim=True)  # (N, 1)
        # NaN equals nothing, but must end as a code all the same: a GPU would stop at an index that is out of range.
        dominant = torch.where(weights == top, support, codebook.shape[0] - 1).amin(1)  # (N,)
    return ConvexSolution(z_q, weights, support, nearest, dominant, residual, iterations)


class ConvexProgram(torch.autograd.Function):
    """z_q of (1) with the backward of eq. (3), or of (4) for the relaxation."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        codebook: Tensor,
        reg: Tensor,
        method: str,
        neighbours: int,
        tol: float,
        max_iter: int,
        waits: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int | Tensor]:
        """Arguments as for `soft_convex_solve`, checked, z (N, F) and codebook (K, F) of one dtype and reg (N, 1).

        ``waits``: whether values may be read back. If not, a row that `fused` cannot bring to ``tol`` stays as it is.
        """
        implementation = _implementation(z)
        fuses = method == "exact" and implementation is fused_kernels(z)
        book = Codebook(codebook.double() if fuses else codebook)
        centred = z - book.centre  # (N, F)
        if fuses:
            solved = implementation.solve_rows(book, centred, reg.double(), tol=tol, max_iter=max_iter)
            if waits:
                solved = _solve_missed_rows_again(solved, codebook, z - codebook.mean(0), reg, tol, max_iter)
        elif method == "relaxed":
            solved = solve_relaxed(book, codebook, centred, reg)
        elif method == "local":
            limits = {"neighbours": neighbours, "tol": tol, "max_iter": max_iter}
            if z.device.type == "mps":  # which has no float64; elsewhere a small lambda needs its digits
                solved = batched.solve_local(book, centred, reg, **limits)
            else:
                wide = Codebook(codebook.double())
                solved = batched.solve_local(wide, z.double() - wide.centre, reg.double(), **limits)
                solved = solved._replace(weights=solved.weights.to(z.dtype))
        else:
            solved = implementation.solve_rows(book, centred, reg, tol=tol, max_iter=max_iter)
            # Whole tensors of float64 change nothing where the rows were solved in them already, and MPS has none.
            if not (implementation is batched and z.dtype == torch.float64) and z.device.type != "mps":
                solved = _solve_missed_rows_again(solved, codebook, centred, reg, tol, max_iter)
        z_q = (implementation.combine_rows(book, solved.support, solved.weights) + book.centre).to(z.dtype)
        solved = solved._replace(weights=solved.weights.to(z.dtype), residual=solved.residual.to(z.dtype))
        ctx.method = method
        ctx.save_for_backward(z, codebook, reg, solved.support, solved.weights, solved.nearest)
        ctx.mark_non_differentiable(solved.weights, solved.support, solved.nearest, solved.residual)
        return z_q, solved.weights, solved.support, solved.nearest, solved.residual, solved.iterations

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, codebook, reg, support, weights, nearest = ctx.saved_tensors
        gradient = relaxed_gradient if ctx.method == "relaxed" else _implementation(z).gradient_rows
        with torch.autocast(z.device.type, enabled=False):
            gradients = gradient(grads[0], codebook, support, weights, nearest, z - codebook[nearest], reg)
        return *gradients, None, None, None, None, None


def _implementation(z: Tensor) -> ModuleType:
    """`compiled`, `fused` or `batched`, whichever suits the latents z (N, F)."""
    if z.device.type == "cpu" and z.shape[1] <= compiled.LARGEST_DIM:
        return compiled
    return fused_kernels(z) or batched


def _solve_missed_rows_again(
    solved: batched.SolvedRows, codebook: Tensor, centred: Tensor, reg: Tensor, tol: float, max_iter: int
) -> batched.SolvedRows:
    """Solve the rows that missed ``tol`` in whole tensors of float64; latents (N, F) centred, codebook (K, F) as given.

    The compiled code misses it where a support outgrew its room (many duplicate codes). Either implementation misses it
    where prices c_k.y, of a far-away latent or with a tiny reg, are so large that float32 cannot tell weights apart.
    """
    misses = solved.residual > tol  # (N,)
    if not misses.any():
        return solved
    kept, missed = (~misses).nonzero().squeeze(1), misses.nonzero().squeeze(1)
    book = Codebook(codebook.double())
    far = (centred[missed] + codebook.mean(0)).double() - book.centre  # (n, F)
    again = batched.solve_rows(book, far, reg[missed].double(), tol=tol, max_iter=max_iter)
    rest = solved._replace(
        support=solved.support[kept],
        weights=solved.weights[kept],
        nearest=solved.nearest[kept],
        residual=solved.residual[kept],
    )
    return batched.join([rest, again], [kept, missed])


def _check(
    z: Tensor, codebook: Tensor, method: str, neighbours: int, max_iter: int, tol: float | None, values: bool
) -> None:
    """Raise ValueError where an argument is wrong; only with ``values`` is what the tensors hold an argument."""
    for name, value in (("z", z), ("codebook", codebook)):
        if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
            what = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must be a two-dimensional floating tensor, not {what}")
        if 0 in value.shape:
            raise ValueError(f"{name} is empty: its shape is {tuple(value.shape)}")
        if values:
            require_finite_squares(name, value)
    if z.shape[1] != codebook.shape[1]:
        raise ValueError(f"codebook has {codebook.shape[1]} columns, but z has {z.shape[1]}: they must agree")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    for name, value in (("neighbours", neighbours), ("max_iter", max_iter)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, not {value!r}")
    if tol is not None and not tol > 0:
        raise ValueError(f"tol must be positive, not {tol!r}")


def _check_reg(reg: float | Tensor, z: Tensor, values: bool) -> Tensor:
    """reg as a (N, 1) tensor of z's dtype and device; ValueError unless all of it is positive and finite.

    With ``values`` that is checked of a tensor, too; a number is always checked.
    """
    if not isinstance(reg, Tensor):
        least = most = float(reg)
        reg = z.new_full((), reg)
    elif reg.ndim > 1 or (reg.ndim == 1 and len(reg) != len(z)):
        raise ValueError(f"reg must be a number or one per row, ({len(z)},), not {tuple(reg.shape)}")
    else:
        least, most = (float(reg.detach().min()), float(reg.detach().max())) if values else (1.0, 1.0)
    if not (least > 0 and most < float("inf")):
        raise ValueError(f"reg must be positive and finite, not {least if not least > 0 else most!r}")
    return reg.to(z).reshape(-1, 1).expand(len(z), 1)
