"""Fixtures that several folders use."""

import os

# One thread a process: the tests start many, and results must not depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
