"""Fixtures that several folders use."""

import os
import signal
from pathlib import Path

import pytest

# One thread a process: the tests start many, and results must not depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# A shell's background job ignores SIGINT, and hands that on to the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scikit-learn's digits as `bigbatch shard` leaves them. Nothing may change them."""
    from bigbatch.data.writing.shard import shard

    folder = tmp_path_factory.mktemp("shards") / "digits"
    shard("digits", folder, progress=False)
    return folder
