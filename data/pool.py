"""Worker processes that never outlive their parent."""

import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

# spawn: a process that has started threads (pyarrow, torch) must not be forked.
CONTEXT = mp.get_context("spawn")


def process_pool(
    workers: int, initializer: Callable[..., None] | None = None, *arguments: Any
) -> ProcessPoolExecutor:
    """A pool of `workers` fresh processes, each of which first calls initializer(*arguments)."""
    return ProcessPoolExecutor(
        workers, CONTEXT, initializer=_start, initargs=(initializer, arguments)
    )


def _start(initializer: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    # A parent killed by SIGKILL cannot stop its workers, and an idle one would wait for ever
    # on a queue that no one fills, so each watches its parent.
    threading.Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then stops us
    if initializer is not None:
        initializer(*arguments)


def _die_with_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
