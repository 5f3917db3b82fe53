"""What happens inside a run."""
