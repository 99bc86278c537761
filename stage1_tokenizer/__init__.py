"""Image <-> tokens: the quantizers and their solver, encoder and decoder, losses, training."""
