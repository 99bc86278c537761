"""Solve problem (1) of docs/quantizer.md, differentiably: `soft_convex_solve`."""

from scq.stage1_tokenizer.solver.solve import METHODS, ConvexSolution, soft_convex_solve

__all__ = ["METHODS", "ConvexSolution", "soft_convex_solve"]
