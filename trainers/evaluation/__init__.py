"""Scores of whole splits, each sample once at any world size."""
