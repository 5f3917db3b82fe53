"""Runs as jobs of SLURM: the script, its submission, the queue."""
