"""What both stages' training shares: config, loop, checkpoints, randomness, progress; and the command line."""
