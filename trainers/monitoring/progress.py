"""The progress of a run on the terminal. Free of torch."""

import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from bigbatch.configs.judged import judged_in
from bigbatch.configs.terminal import Terminal

_SMOOTHING = 0.9  # weight of the past in the images/s shown: about ten steps


class Progress:
    """One live line on a terminal; in a file or a pipe, a plain line now and then.

    Plain lines come 10 s apart at the earliest (or at each 20th of the run, where that
    takes longer) and a minute apart at the latest, and at the first and the last step.
    """

    def __init__(
        self,
        name: str,
        total_steps: int,
        start_step: int,
        console: Console | None = None,
        work: Callable[[int], float] = float,
    ) -> None:
        """`work` is what so many finished steps take, by which the time that is left is told."""
        self._name = name
        self._total = total_steps
        self._work = work
        self._step = start_step
        self._console = console or Terminal()
        self._first: tuple[int, float] | None = None  # step and time of the first finished step
        self._seconds_per_image = 0.0
        self._shown: dict[str, str] = {}
        self._line_at = (float("-inf"), start_step)  # time and step of the last plain line
        self._bar: Bar | None = None
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                console=self._console,
                refresh_per_second=4,
                expand=True,
            )
            self._task = self._bar.add_task(
                name, total=total_steps, completed=start_step, text="starting"
            )
            self._bar.start()

    def train(self, step: int, values: Mapping[str, float]) -> None:
        """Show one finished step's loss, lr and images_per_s."""
        now = time.monotonic()
        self._step = step
        self._first = self._first or (step, now)
        if values.get("images_per_s", 0) > 0:
            newest = 1 / values["images_per_s"]
            # Times are averaged, not rates: one fast step must not outweigh a slow one.
            past = self._seconds_per_image or newest
            self._seconds_per_image = _SMOOTHING * past + (1 - _SMOOTHING) * newest
        for key, form in (("loss", ".4f"), ("lr", ".3g")):
            if key in values:
                self._shown[key] = f"{key} {values[key]:{form}}"
        if self._bar:
            self._bar.update(self._task, completed=step, text=self._text(now))
        elif self._plain_line_due(now):
            self._line_at = (now, step)
            share = step / self._total
            self._print(f"{self._name} {step}/{self._total} ({share:.0%}) {self._text(now)}")

    def evaluation(self, split: str, values: Mapping[str, float]) -> None:
        """Show the score of an evaluation beside the training figures from now on."""
        if judge := judged_in(values):
            self._shown[split] = f"{split} {judge.said(values[judge.key])}"
        if self._bar:
            self._bar.update(self._task, text=self._text(time.monotonic()))

    def phase(self, text: str) -> None:
        """Show what is being done between the steps, until the next one."""
        if self._bar:
            self._bar.update(self._task, text=text)
        elif self._step >= self._total:  # after the last step no line would tell otherwise
            self._print(f"{self._name} {text}")

    def warn(self, text: str) -> None:
        """Print a warning above the line."""
        (self._bar.console if self._bar else self._console).print(
            f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True
        )

    def close(self) -> None:
        if self._bar:
            self._bar.update(self._task, text=self._text(time.monotonic()))
            self._bar.stop()

    def _plain_line_due(self, now: float) -> bool:
        seconds, steps = now - self._line_at[0], self._step - self._line_at[1]
        if self._step >= self._total or seconds >= 60:
            return True
        return seconds >= 10 and steps * 20 >= self._total

    def _text(self, now: float) -> str:
        parts = [text for key, text in self._shown.items()]
        if self._seconds_per_image:
            parts.append(f"{1 / self._seconds_per_image:,.0f} img/s")
        if self._first and self._first[0] < self._step < self._total:
            step, since = self._first
            here, done = self._work(self._step), self._work(step)
            left = (now - since) / (here - done) * (self._work(self._total) - here)
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds as 42 s, 3 min 20 s, 2 h 5 min or 3 d 4 h."""
    whole = round(seconds)
    for unit, size, below, smaller in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {below}"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
