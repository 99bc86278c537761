"""Problem (1) of docs/quantizer.md and its gradient: `soft_convex_solve` is the one entry."""

from scq.stage1_tokenizer.solver.solve import METHODS, ConvexSolution, soft_convex_solve

__all__ = ["METHODS", "ConvexSolution", "soft_convex_solve"]
