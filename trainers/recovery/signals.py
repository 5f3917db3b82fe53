"""Signals set a flag; the loop acts on it (saves, then exits with SAVED)."""

import ctypes
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], object] | signal.Handlers

SAVED = 75  # EX_TEMPFAIL: saved after a signal, wants to be started again
STALLED = 76  # EX_PROTOCOL: a step hung; the agent starts the ranks again
_PR_SET_PDEATHSIG = 1  # prctl(2)
# A closed terminal (SIGHUP) is a reason to save like any other.
CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)


# How long what is no step may still take once a signal came.
_PATIENCE_S = 3.0


class StopFlag:
    """True once a stop signal came, which the loop acts on. Nothing else happens in the handler.

    Outside the loop, before `begin` and after `rest`, there is nothing to save, and a process may
    wait for long: for a rank that was killed, for a slow disk, for the ensemble of a large split.
    So another thread hears of signals, too, which code that holds the interpreter up does not
    delay, and ends the process where the loop does not begin, or all is done, within seconds.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._looked_at = threading.Event()
        self._when = "before the first step; nothing was lost"
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._former = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, args=(reader,), daemon=True)
        self._thread.start()
        for number in CAUGHT:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._set)  # nohup stays nohup
        # The launcher holds signals back until somebody listens.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def _watch(self, reader: int) -> None:
        while heard := os.read(reader, 1):
            if heard[0] in CAUGHT and not self._looked_at.wait(_PATIENCE_S):
                if os.environ.get("RANK", "0") == "0":
                    name = signal.Signals(heard[0]).name
                    with suppress(OSError):  # a closed terminal
                        os.write(2, f"bigbatch: {name} {self._when}\n".encode())
                os._exit(SAVED)
        os.close(reader)

    def __bool__(self) -> bool:
        return self.signal is not None

    def begin(self) -> None:
        """From now on the loop looks at this flag in each step."""
        self._looked_at.set()

    def rest(self) -> None:
        """The loop has ended, and left a checkpoint of its last step."""
        self._when = "after the last step; `bigbatch resume` writes what is missing"
        self._looked_at.clear()
        if self.signal is not None:  # which came too late for the last step
            os.write(self._writer, bytes([self.signal]))

    def close(self) -> None:
        """Ignore signals from now on: the process ends, with a status that says why."""
        for number in CAUGHT:
            signal.signal(number, signal.SIG_IGN)
        self._looked_at.set()
        signal.set_wakeup_fd(self._former, warn_on_full_buffer=False)
        os.close(self._writer)
        self._thread.join()


def catch(handler: Handler, *numbers: int) -> dict[int, Any]:
    """Let `handler` answer these signals, but for those that are ignored, as SIGHUP under nohup.

    Returns what answered them before.
    """
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


class Stopped(BaseException):
    """A signal asks this process to end: what is temporary is removed on the way out."""

    def __init__(self, number: int) -> None:
        self.status = 128 + number  # as shells have it


def end_at_once() -> None:
    """Let Ctrl-C end this process without a word: while it imports it has nothing to undo."""
    catch(signal.SIG_DFL, signal.SIGINT)


def until_stopped(main: Callable[[], int]) -> int:
    """The status of `main`, which a signal that ends a process ends by Stopped: for what has
    nothing to save."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    try:
        catch(stop, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        return main()
    except Stopped as stopped:
        return stopped.status


def agent_pid() -> int | None:
    """The agent that started this rank, and starts it again; None where another launcher did."""
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


def die_with_agent() -> None:
    """Let the kernel kill this rank when the agent that started it dies, even by SIGKILL.

    A rank that went on alone would write into a run directory that the resumed run owns.
    """
    if agent_pid() is not None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
