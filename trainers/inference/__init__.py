"""Trained members over data: forward passes, predictions and evaluations."""
