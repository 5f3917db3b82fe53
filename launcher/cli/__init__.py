"""The command line, a module for each section of its help."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from bigbatch.trainers.recovery.signals import SAVED, catch


def _too_early(number: int, frame: FrameType | None) -> NoReturn:
    told = f"bigbatch: {signal.Signals(number).name} before training began; nothing was lost\n"
    with suppress(OSError):  # a closed terminal
        os.write(2, told.encode())
    os._exit(SAVED)


if sys.argv[1:2] in (["train"], ["resume"]):
    # Before anything else is imported: start.py answers as soon as it knows who started this.
    catch(_too_early, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
