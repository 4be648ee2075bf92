"""Train: the loop, one step, optimiser, checkpoints, processes."""
