"""Measuring: the Inception network, metrics, the benchmark of several arms and its report."""
