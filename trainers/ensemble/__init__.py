"""Snapshots, and what is made of them."""
