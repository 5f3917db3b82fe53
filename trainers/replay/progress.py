"""How far a replay of many steps has come, and the time that is left, on standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bigbatch.configs.terminal import Terminal
from bigbatch.trainers.monitoring.progress import Progress


@contextmanager
def telling(title: str, steps: int) -> Iterator[Callable[[], None]]:
    """Yields what is to be called after each of so many steps."""
    progress = Progress(title, steps, 0, Terminal(stderr=True))
    done = 0

    def on_step() -> None:
        nonlocal done
        done += 1
        progress.train(min(done, steps), {})

    try:
        yield on_step
    finally:
        progress.close()
