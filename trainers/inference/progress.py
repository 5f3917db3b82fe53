"""Images done, images a second and the time left, on standard error; rank 0 speaks for all."""

import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from bigbatch.configs.terminal import Terminal
from bigbatch.trainers.engine import Engine


class Progress:
    """A bar where standard error is a terminal, else a line at the end of each tenth."""

    def __init__(self, title: str, total: int, engine: Engine) -> None:
        self._title, self._total, self._world = title, total, engine.world
        self._done = self._said = 0
        self._started = time.monotonic()
        self._console = Terminal(stderr=True)
        self._speaks = engine.rank == 0 and total > 0
        self._bar: Bar | None = None
        if self._speaks and self._console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
            )
            rate = TextColumn("{task.fields[rate]}")
            self._bar = Bar(*columns, rate, TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task(title, total=total, rate="")

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def advance(self, images: int) -> None:
        """This rank has done so many; the others as many, as far as can be told."""
        self._done = min(self._total, self._done + images * self._world)
        if self._bar:
            rate = self._done / (time.monotonic() - self._started)
            self._bar.update(self._task, completed=self._done, rate=f"{rate:,.0f} img/s")
        elif self._speaks and self._done * 10 // self._total > self._said:
            self._said = self._done * 10 // self._total
            text = f"{self._title} {self._done:,}/{self._total:,} ({self._done / self._total:.0%})"
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()
