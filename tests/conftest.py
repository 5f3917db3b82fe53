"""Fixtures that several folders use."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Its limit of 0.2 s an example is one on a busy machine.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
# What is imported and collected stays to the end: there is nothing in it to look for, now or later.
gc.disable()
# One thread a process: the tests start many, and results must not depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# A shell's background job ignores SIGINT, nohup SIGHUP, and both hand that on to the processes that
# tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.freeze()
    gc.enable()


_SIGNALS = {
    n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
}


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A worker that a test, or a fixture of a whole module, runs in this process leaves signals
    ignored, as its own end wants it; processes that later tests start would inherit that."""
    _restore_signals()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    _restore_signals()
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    # A StopFlag that was left open would end this process at the next signal that a test sends it.
    assert signal.set_wakeup_fd(-1) == -1, "a StopFlag was left open"


def _restore_signals() -> None:
    for number, handler in _SIGNALS.items():
        signal.signal(number, handler)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that a test starts in this process are forked from the process that all tests have for
    it: to start one for each takes longer than most runs."""
    from bigbatch.launcher import child
    from tests.helpers.warm import Shared

    monkeypatch.setattr(child, "start_parent", Shared)


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a second or two; the words between a report's plots do not need it."""
    monkeypatch.setattr("bigbatch.trainers.report.plots.curves", lambda history: [])
    for name in ("phases", "trust", "noise", "members", "confusion"):
        monkeypatch.setattr(f"bigbatch.trainers.report.plots.{name}", lambda *parts: "")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scikit-learn's digits as `bigbatch shard` leaves them. Nothing may change them."""
    from bigbatch.data.writing.shard import shard

    folder = tmp_path_factory.mktemp("shards") / "digits"
    shard("digits", folder, progress=False)
    return folder
