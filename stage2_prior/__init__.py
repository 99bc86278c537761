"""Tokens -> new tokens: masking, the masked transformer, training."""
