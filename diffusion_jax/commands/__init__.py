"""What the command line does: train, sample, evaluate."""
