"""Image <-> tokens: the quantizers and their solver, encoder and decoder, losses, training."""

from stage1_tokenizer.autoencoder import ImageTokenizer

__all__ = ["ImageTokenizer"]
