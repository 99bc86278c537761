"""A benchmark in parts, for a machine without a network: made here, run there, collected here again."""
