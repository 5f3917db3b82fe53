"""Optimizers: LARS and LAMB of our own, all others from torch.optim and pytorch_optimizer."""
