"""Images in, tensors out: sources, crop protocols, shards, streams and token shards. It knows nothing of models."""
