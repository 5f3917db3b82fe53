"""The registry of runs, their logs, and what they could not read."""
