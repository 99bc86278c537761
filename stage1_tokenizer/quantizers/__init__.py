"""Quantizers: latents in, quantized latents and dominant codes out. Usable alone."""

from stage1_tokenizer.quantizers.baselines import NoQuantizer, VectorQuantizer
from stage1_tokenizer.quantizers.convex_solver import ConvexSolution, soft_convex_solve
from stage1_tokenizer.quantizers.interface import Mixture, Quantized, Quantizer, create_quantizer, quantizer_names
from stage1_tokenizer.quantizers.library import (
    AveragedVectorQuantizer,
    FiniteScalarQuantizer,
    LinearVectorQuantizer,
    ResidualVectorQuantizer,
)
from stage1_tokenizer.quantizers.soft_convex import SoftConvexQuantizer

__all__ = [
    "AveragedVectorQuantizer",
    "ConvexSolution",
    "FiniteScalarQuantizer",
    "LinearVectorQuantizer",
    "Mixture",
    "NoQuantizer",
    "Quantized",
    "Quantizer",
    "ResidualVectorQuantizer",
    "SoftConvexQuantizer",
    "VectorQuantizer",
    "create_quantizer",
    "quantizer_names",
    "soft_convex_solve",
]
