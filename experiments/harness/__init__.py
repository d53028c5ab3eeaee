"""What every experiment shares: flags, training loop, checkpoints, results, plots."""
