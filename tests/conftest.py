"""Fixtures that several folders use."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# One thread a process: the tests start many, and results must not depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# A shell's background job ignores SIGINT, nohup SIGHUP, and both hand that on to the processes that
# tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A worker that a test runs in this process leaves signals ignored, as its own end wants it;
    processes that later tests start would inherit that."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scikit-learn's digits as `bigbatch shard` leaves them. Nothing may change them."""
    from bigbatch.data.writing.shard import shard

    folder = tmp_path_factory.mktemp("shards") / "digits"
    shard("digits", folder, progress=False)
    return folder
