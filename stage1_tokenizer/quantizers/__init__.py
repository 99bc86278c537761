"""Quantizers: latents in, quantized latents and dominant codes out. They can be used without the rest of scq."""

from scq.stage1_tokenizer.quantizers.interface import Mixture, Quantized, Quantizer, create_quantizer, quantizer_names
from scq.stage1_tokenizer.quantizers.library import (
    AveragedVectorQuantizer,
    FiniteScalarQuantizer,
    LinearVectorQuantizer,
    ResidualVectorQuantizer,
)
from scq.stage1_tokenizer.quantizers.soft_convex import SoftConvexQuantizer
from scq.stage1_tokenizer.quantizers.vq import NoQuantizer, VectorQuantizer

__all__ = [
    "AveragedVectorQuantizer",
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
]
