"""Signals set a flag; the loop acts on it (saves, then exits with SAVED)."""

import ctypes
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

SAVED = 75  # EX_TEMPFAIL: saved after a signal, wants to be started again
STALLED = 76  # EX_PROTOCOL: a step hung; the agent starts the ranks again
_PR_SET_PDEATHSIG = 1  # prctl(2)
# A closed terminal (SIGHUP) is a reason to save like any other.
CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)


class StopFlag:
    """True once a stop signal came. Nothing else happens in the handler."""

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in CAUGHT:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._set)  # nohup stays nohup
        # The launcher holds signals back until somebody listens.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def __bool__(self) -> bool:
        return self.signal is not None

    def close(self) -> None:
        """Ignore signals from now on: the process ends, with a status that says why."""
        for number in CAUGHT:
            signal.signal(number, signal.SIG_IGN)


def catch(handler: Callable[[int, FrameType | None], object], *numbers: int) -> dict[int, Any]:
    """Let `handler` answer these signals, but for those that are ignored, as SIGHUP under nohup.

    Returns what answered them before.
    """
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


class Stopped(BaseException):
    """A signal asks this process to end: what is temporary is removed on the way out."""

    def __init__(self, number: int) -> None:
        self.status = 128 + number  # as shells have it


def raise_stopped() -> None:
    """Let signals that end a process raise Stopped, for what has nothing to save."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    catch(stop, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def agent_pid() -> int | None:
    """The agent that started this rank, and starts it again; None where another launcher did."""
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


def die_with_agent() -> None:
    """Let the kernel kill this rank when the agent that started it dies, even by SIGKILL.

    A rank that went on alone would write into a run directory that the resumed run owns.
    """
    if agent_pid() is not None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
