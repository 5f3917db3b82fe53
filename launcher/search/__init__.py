"""Searches: rate, micro-batch, hyperparameters; each probe is a real run."""
