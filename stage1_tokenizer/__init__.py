"""Image <-> tokens: quantizers and their solver, encoder and decoder, losses, training."""
