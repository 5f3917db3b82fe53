"""What benchmarks/chaos.py puts into every process of a run, as its sitecustomize module.

Two faults need a place inside: death at an exact moment of checkpointing, by an audit hook
that sees each file operation, and a clock that jumps. Nothing of bigbatch is touched.
"""

import os
import signal
import sys
import threading
import time

FOLDER = os.environ["BIGBATCH_CHAOS"]
KILL, CLOCK = FOLDER + "/kill", FOLDER + "/clock"


def audit(event: str, arguments: tuple[object, ...]) -> None:
    """Die where the file `kill` says: EVENT, part of the path, end of the path, delay in s."""
    if event not in ("open", "os.mkdir", "os.rename", "shutil.rmtree"):
        return
    path = str(arguments[0])
    if "/checkpoints" not in path:
        return
    try:
        with open(KILL) as file:
            kind, part, end, delay = file.read().split(" ")
    except (OSError, ValueError):
        return
    if event == kind and part in path and path.endswith(end):
        os.unlink(KILL)
        if float(delay):
            threading.Timer(float(delay), os.kill, (os.getpid(), signal.SIGKILL)).start()
        else:
            os.kill(os.getpid(), signal.SIGKILL)


real, read_at, offset = time.time, 0.0, 0.0


def shifted() -> float:
    """time.time(), moved by the seconds in the file `clock`."""
    global read_at, offset
    if time.monotonic() > read_at:
        read_at = time.monotonic() + 0.2
        try:
            with open(CLOCK) as file:
                offset = float(file.read())
        except (OSError, ValueError):
            pass
    return real() + offset


time.time = shifted
sys.addaudithook(audit)
