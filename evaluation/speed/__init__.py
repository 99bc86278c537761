"""How fast: quantizers, training steps, sampling, and reading, each beside what others use."""
