"""What a worker, and a command on its way to be one, make of signals."""

import os
import signal
import subprocess
import sys

import pytest

from bigbatch.trainers.recovery.signals import CAUGHT, SAVED, StopFlag


@pytest.mark.parametrize("number", CAUGHT)
def test_each_of_them_is_a_reason_to_save(number: signal.Signals) -> None:
    """SIGHUP, of a closed terminal, ended a run of one rank without a word."""
    flag = StopFlag()
    assert not flag
    os.kill(os.getpid(), number)
    assert flag.signal == number
    flag.close()
    assert {signal.getsignal(n) for n in CAUGHT} == {signal.SIG_IGN}


def test_nohup_stays_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    flag = StopFlag()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not flag
    flag.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_before_there_is_anything_to_save_a_start_ends_at_once_and_says_so(
    number: signal.Signals,
) -> None:
    program = (
        "import os; from bigbatch.launcher.start import hold_signals; hold_signals(None); "
        f"os.kill(os.getpid(), {int(number)}); print('deaf')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (SAVED, "")
    assert f"{number.name} before training began" in done.stderr


@pytest.mark.parametrize(("command", "status"), [("resume", SAVED), ("runs", -signal.SIGTERM)])
def test_while_the_command_line_is_imported_a_start_answers_too(command: str, status: int) -> None:
    """Which takes a second on a busy file system, in which one ended without a word."""
    program = (
        f"import os, signal, sys; sys.argv = ['bigbatch', '{command}', 'a']; "
        "import bigbatch.launcher.cli; loaded = 'click' in sys.modules; "
        "os.kill(os.getpid(), signal.SIGTERM) if not loaded else print('late')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "")
    assert ("SIGTERM before training began; nothing was lost" in done.stderr) == (status > 0)


def test_of_a_launcher_s_ranks_the_worker_answers() -> None:
    """In a program of its own: a signal that one thread holds goes to another one of a process."""
    program = """
import os, signal
from bigbatch.launcher.env import Peers
from bigbatch.launcher.start import hold_signals
from bigbatch.trainers.recovery.signals import StopFlag
hold_signals(Peers("torchrun", rank=0, local_rank=0, size=2, job=None))
for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
    os.kill(os.getpid(), number)  # waits
flag = StopFlag()
assert flag
flag.close()
print("answered")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "answered\n"), done.stderr


def test_outside_the_loop_a_process_that_waits_ends_by_itself() -> None:
    """A rank that waited for a killed one ignored SIGTERM until it was killed, as did the end of a
    run: nobody looks at the flag there."""
    program = """
import os, signal, sys, time
from bigbatch.trainers.recovery import signals
signals._PATIENCE_S = 0.2
flag = signals.StopFlag()
if sys.argv[1] == "end":
    flag.begin()
    os.kill(os.getpid(), signal.SIGTERM)
    assert flag
    time.sleep(0.5)  # the loop saves, and is at its last step
    flag.rest()
else:
    os.kill(os.getpid(), signal.SIGUSR2)
for _ in range(10**9):
    pass
"""
    for place, said in (
        ("start", "SIGUSR2 before the first step; nothing was lost"),
        ("end", "SIGTERM after the last step; `bigbatch resume` writes what is missing"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, place], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (SAVED, f"bigbatch: {said}\n")
