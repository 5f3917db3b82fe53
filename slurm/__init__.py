"""The sbatch templates; launcher/slurm/script.py renders them, and people edit them by hand."""
