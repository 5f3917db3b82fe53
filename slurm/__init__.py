"""The sbatch templates; launcher/slurm.py renders them, and people edit them by hand."""
