"""Soft convex quantization as a function: solve problem (1) of docs/quantizer.md for many latents, differentiably.

The problem and the relaxation (4) are those of Gautam, Pryzant, Yang, Zhu and Sojoudi, "Soft Convex Quantization"
(arXiv 2310.03004); the solver of (1), through its F-dimensional dual (2) and working sets, is this project's.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scq.engine.errors import NotFiniteError
from scq.stage1_tokenizer.solver import compiled
from scq.stage1_tokenizer.solver.active_set import solve_support
from scq.stage1_tokenizer.solver.codebook import Codebook
from scq.stage1_tokenizer.solver.local import solve_local
from scq.stage1_tokenizer.solver.relaxed import relaxed_gradient, solve_relaxed
from scq.stage1_tokenizer.solver.working_set import WorkingSolution, row_chunks, solve_exact, stack

METHODS = ("exact", "local", "relaxed")
# What a row's weights are asked to reach, in units of weight: well above rounding, well below what training notices.
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


class ConvexSolution(NamedTuple):
    """Solutions of (1) for N latents. Only ``z_q`` carries gradients."""

    z_q: Tensor  # (N, F) convex combinations of codes
    weights: Tensor  # (N, S) in [0, 1], rows sum to one, padded with 0
    support: Tensor  # (N, S) int64 codes that the weights belong to; padding repeats a code, with weight 0
    nearest: Tensor  # (N,) int64, the first code of least distance
    dominant: Tensor  # (N,) int64, the code of largest weight, the first one where several tie
    residual: Tensor  # (N,) how far the weights are from optimal for (1) over all K codes, in units of weight
    iterations: int  # moves of the support of the slowest row; 0 for the relaxation


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
    """Solve  min over p in the simplex of  1/2 |z - C^T p|^2 + reg/2 |p - e|^2,  e one-hot on the nearest code.

    Gradients reach z, codebook and reg by the optimality conditions, eq. (3) of docs/quantizer.md, with e held
    constant; nothing is unrolled, and second derivatives are not offered.

    Args:
        z: (N, F) latents, float32 or float64; half precision is computed in float32.
        codebook: (K, F) codes c_k, the rows of C.
        reg: lambda > 0 in units of squared distance, a number or a (N,) tensor. Large: vector quantization. Small:
            projection on the convex hull of the codes.
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
    """
    _check(z, codebook, method, neighbours, max_iter, tol)
    with torch.autocast(z.device.type, enabled=False):
        dtype = torch.float64 if torch.float64 in (z.dtype, codebook.dtype) else torch.float32
        z, codebook = z.to(dtype), codebook.to(dtype)
        reg = _check_reg(reg, z)  # (N, 1)
        options = {"method": method, "neighbours": neighbours, "tol": tol or _TOLERANCE[dtype], "max_iter": max_iter}
        z_q, weights, support, nearest, residual, iterations = _Solve.apply(z, codebook, reg, options)
        top = weights.amax(1, keepdim=True)
        dominant = torch.where(weights == top, support, codebook.shape[0]).amin(1)
    return ConvexSolution(z_q, weights, support, nearest, dominant, residual, iterations)


class _Solve(torch.autograd.Function):
    """z_q of (1) with the backward of eq. (3), or of (4) for the relaxation."""

    @staticmethod
    def forward(ctx, z: Tensor, codebook: Tensor, reg: Tensor, options: dict):
        book = Codebook(codebook)
        solution, nearest = _solve(book, codebook, z - book.centre, reg, **options)
        z_q = _combine(book, solution) + book.centre
        ctx.save_for_backward(z, codebook, reg, solution.support, solution.weights, nearest)
        ctx.method = options["method"]
        ctx.mark_non_differentiable(solution.weights, solution.support, nearest, solution.residual)
        return z_q, solution.weights, solution.support, nearest, solution.residual, solution.iterations

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_):
        z, codebook, reg, support, weights, nearest = ctx.saved_tensors
        with torch.autocast(z.device.type, enabled=False):
            target = z - codebook[nearest]
            if ctx.method == "relaxed":
                return *relaxed_gradient(grad, codebook, support, weights, nearest, target, reg), None
            return *_implicit_gradient(grad, codebook, support, weights, nearest, target, reg), None


def _solve(
    book: Codebook, codebook: Tensor, z: Tensor, reg: Tensor, *, method: str, neighbours: int, tol: float, max_iter: int
) -> tuple[WorkingSolution, Tensor]:
    if method == "relaxed":
        return solve_relaxed(book, codebook, z, reg)
    if method == "local":
        return solve_local(book, z, reg, neighbours=neighbours, tol=tol, max_iter=max_iter)
    natively = _runs_natively(z)
    solution, nearest = (_solve_natively if natively else solve_exact)(book, z, reg, tol=tol, max_iter=max_iter)
    missed = (solution.residual > tol).nonzero().squeeze(1)
    if missed.numel() == 0 or (z.dtype == torch.float64 and not natively) or z.device.type == "mps":
        return solution, nearest
    # In compiled code a support outgrew its room (many duplicate codes), or else prices c_k.y of a far-away latent or a
    # tiny reg are so large that float32 cannot tell weights apart in them.
    double = Codebook(codebook.double())
    far = (z + book.centre)[missed].double() - double.centre
    again, nearest[missed] = solve_exact(double, far, reg[missed].double(), tol=tol, max_iter=max_iter)
    everything = torch.arange(len(z), device=z.device)
    return stack([solution, again], nearest, [everything, missed]), nearest


def _combine(book: Codebook, solution: WorkingSolution) -> Tensor:
    """C^T p (N, F), centred as the codebook is."""
    weights, support = solution.weights, solution.support
    if _runs_natively(book.codes):
        return compiled.combine_rows(book.codes.double(), support, weights.double()).to(weights.dtype)
    z_q = weights.new_empty(len(weights), book.dim)
    for rows in row_chunks(book, len(weights), support.shape[1]):
        codes = book.codes[support[rows]]  # (n, S, F)
        z_q[rows] = (weights[rows].unsqueeze(1) @ codes).squeeze(1)
    return z_q


def _runs_natively(z: Tensor) -> bool:
    return z.device.type == "cpu" and z.shape[1] <= compiled.LARGEST_DIM


def _solve_natively(
    book: Codebook, z: Tensor, reg: Tensor, *, tol: float, max_iter: int
) -> tuple[WorkingSolution, Tensor]:
    """The exact solution row by row in compiled code, in float64 whatever the latents are."""
    nearest = book.nearest(z)
    support, weights, residual, moves = compiled.solve_rows(
        z.double(), book.codes.double(), nearest, reg[:, 0].double(), tol=0.5 * tol, max_iter=max_iter
    )
    return WorkingSolution(support, weights.to(z.dtype), residual.to(z.dtype), moves), nearest


def _implicit_gradient(
    grad: Tensor, codebook: Tensor, support: Tensor, weights: Tensor, nearest: Tensor, target: Tensor, reg: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (3): gradients with respect to z (N, F), the codebook (K, F) and reg (N, 1)."""
    book = Codebook(codebook)
    if _runs_natively(grad):
        latents = target + book.codes[nearest]
        double = [x.double() for x in (grad, latents, book.codes)]
        found = compiled.gradient_rows(*double, nearest, reg[:, 0].double(), support, weights.double())
        return found[0].to(grad.dtype), found[1].to(grad.dtype), found[2].to(grad.dtype).unsqueeze(1)
    grad_z, grad_codebook, grad_reg = torch.empty_like(grad), torch.zeros_like(codebook), torch.empty_like(reg)
    for rows in row_chunks(book, len(grad), support.shape[1]):
        codes, p = book.around(nearest[rows], support[rows]), weights[rows]  # (n, S, 1 + F), (n, S)
        used = p.sign()
        right = torch.cat([torch.zeros_like(reg[rows]), grad[rows]], 1)
        lifted = reg[rows] * solve_support(codes, used, reg[rows], right)  # (-m.u, u)
        u = lifted[:, 1:]  # (n, F)
        spread_u = (codes @ lifted.unsqueeze(-1)).squeeze(-1) * used  # (n, S), (c_k - m).u
        y = (target[rows] - (p.unsqueeze(1) @ codes)[:, 0, 1:]) / reg[rows]
        grad_z[rows] = grad[rows] - u
        per_code = p.unsqueeze(-1) * u.unsqueeze(1) + spread_u.unsqueeze(-1) * y.unsqueeze(1)  # (n, S, F)
        entries = used.flatten().nonzero().squeeze(1)  # two thirds are padding, not worth scattering
        grad_codebook.index_add_(0, support[rows].flatten()[entries], per_code.flatten(0, 1)[entries])
        grad_reg[rows] = -(grad_z[rows] * y).sum(1, keepdim=True)
    return grad_z, grad_codebook, grad_reg


def _check(z: Tensor, codebook: Tensor, method: str, neighbours: int, max_iter: int, tol: float | None) -> None:
    for name, value in (("z", z), ("codebook", codebook)):
        if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
            what = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must be a two-dimensional floating tensor, not {what}")
        if 0 in value.shape:
            raise ValueError(f"{name} is empty: its shape is {tuple(value.shape)}")
        check_finite(name, value)
    if z.shape[1] != codebook.shape[1]:
        raise ValueError(f"codebook has {codebook.shape[1]} columns, but z has {z.shape[1]}: they must agree")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    for name, value in (("neighbours", neighbours), ("max_iter", max_iter)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, not {value!r}")
    if tol is not None and not tol > 0:
        raise ValueError(f"tol must be positive, not {tol!r}")


def check_finite(name: str, value: Tensor) -> None:
    """Raise NotFiniteError, a ValueError, naming the first entry of ``value`` that is NaN or infinite; one reduction
    where all is well."""
    if bool(torch.isfinite(value.detach().sum())):
        return
    bad = (~torch.isfinite(value.detach())).nonzero()
    if len(bad):  # a finite tensor's sum may still overflow
        where = tuple(bad[0].tolist())
        raise NotFiniteError(
            f"{name} has {len(bad)} entries that are not finite; the first is {name}{list(where)} = {value[where]}"
        )


def _check_reg(reg: float | Tensor, z: Tensor) -> Tensor:
    """reg as a (N, 1) tensor of z's kind; ValueError unless all of it is positive and finite."""
    if isinstance(reg, Tensor):
        if reg.ndim > 1 or (reg.ndim == 1 and len(reg) != len(z)):
            raise ValueError(f"reg must be a number or one per row, ({len(z)},), not {tuple(reg.shape)}")
        least, most = float(reg.detach().min()), float(reg.detach().max())
    else:
        least = most = float(reg)
    if not (least > 0 and most < float("inf")):
        raise ValueError(f"reg must be positive and finite, not {least if not least > 0 else most!r}")
    reg = torch.as_tensor(reg, dtype=z.dtype, device=z.device)
    return reg.reshape(-1, 1).expand(len(z), 1)
