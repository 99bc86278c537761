"""Tokens -> new tokens: masking, the masked transformer, training."""

from stage2_prior.transformer import MaskedTransformer

__all__ = ["MaskedTransformer"]
