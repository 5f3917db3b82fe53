"""Batch size, rate and GPUs from the gradient noise scale or from measured points."""
