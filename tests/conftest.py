"""Fixtures that several folders use."""

import os
import signal

# One thread a process: the tests start many, and results must not depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# A shell's background job ignores SIGINT, and hands that on to the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
