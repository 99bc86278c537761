"""Measuring: metrics, everything about one model, the benchmark of several arms and its report, and speeds."""
