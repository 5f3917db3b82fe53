"""Worker processes that never outlive their parent."""

import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

# spawn: a process that has started threads (pyarrow, torch) must not be forked.
CONTEXT = mp.get_context("spawn")


def process_pool(
    workers: int, initializer: Callable[..., None] | None = None, *arguments: Any
) -> ProcessPoolExecutor:
    """A pool of `workers` fresh processes, each of which first calls initializer(*arguments).

    Give it its tasks inside `uninterrupted()`.
    """
    return ProcessPoolExecutor(
        workers, CONTEXT, initializer=_start, initargs=(initializer, arguments)
    )


def map_all(function: Callable[[T], R], items: Sequence[T], workers: int) -> list[R]:
    """function(item) of each item, in order, by `workers` processes."""
    with process_pool(min(workers, len(items))) as pool:
        with uninterrupted():
            results = pool.map(function, items)
        return list(results)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the body, in which a pool starts its processes.

    It is for the parent, which then stops its workers: they inherit the mask and never see
    it, not even while they import. And a worker that was started but not yet noted by the
    executor would be waited for at exit, for ever.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start(initializer: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    # A parent killed by SIGKILL cannot stop its workers, and an idle one would wait for ever
    # on a queue that no one fills, so each watches its parent.
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*arguments)


def _die_with_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
