"""What training shares across stages: config, loop, checkpoints, files, randomness, progress and errors."""
