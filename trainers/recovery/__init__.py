"""What a run survives: checkpoints, rollback, locks, hung and lost ranks."""
