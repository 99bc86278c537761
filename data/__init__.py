"""Images in, tensors out: sources, crop protocols, shards, streams and token shards. Knows nothing of models."""
