"""The live view of a run in the terminal, read from its directory. Free of torch.

It needs no process of the run: it works over a network file system, for a run of another
user, and after the end.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import plotext
from numpy.typing import NDArray
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bigbatch.configs.judged import judged_in
from bigbatch.configs.rundir import RunDir
from bigbatch.configs.terminal import Terminal
from bigbatch.trainers.monitoring.alerts import TITLES
from bigbatch.trainers.monitoring.history import (
    History,
    loss_ceiling,
    read_history,
    smooth,
    straggler,
)
from bigbatch.trainers.monitoring.progress import duration

STALE = 120.0  # seconds without a record after which a run is called silent
_EVENTS = 6  # as many of the newest are shown; the newest alert is always one of them
_ALL = 100  # lines, more than there are
_LEAST = 7  # lines of a plot, its title and axis among them
_STYLES = {"finished": "green", "failed": "red", "stopped": "yellow", "killed": "red"}
_STYLES |= {"running": "cyan"}


def watch(
    run: RunDir,
    *,
    ended: Callable[[], str | None],
    interval: float = 2.0,
    console: Console | None = None,
) -> None:
    """Show a run until it ends or Ctrl-C; one picture of it where there is no terminal.

    `ended` gives the state in which a run has ended, which its files alone cannot tell of a
    killed one, and None before. A stopped run is followed, for it may go on: requeued, or
    resumed by hand. `interval` is in seconds. Raises UserError where `run` is no run directory.
    """
    console = console or Terminal()
    history = read_history(run)
    if not console.is_terminal:
        console.print(picture(run, history, console.width, _ALL, ended()))
        return
    state: str | None = None
    live = Live(console=console, screen=True, auto_refresh=False)
    with suppress(KeyboardInterrupt), live:
        while (state := ended()) in (None, "stopped"):
            live.update(picture(run, history, console.width, console.height, state), refresh=True)
            time.sleep(interval)
            started = time.monotonic()
            history = read_history(run)
            # A run of a million steps takes seconds to read: do not do only that.
            interval = max(interval, 4 * (time.monotonic() - started))
    # The last records came after the last look. This picture stays on the terminal.
    history = read_history(run)
    console.print(picture(run, history, console.width, console.height, state))


def picture(
    run: RunDir, history: History, width: int, height: int, state: str | None = None
) -> RenderableType:
    """The run as it stands, for a terminal of `width` x `height` characters.

    `state` is what is known beside the files.
    """
    age = time.time() - run.metrics.stat().st_mtime if run.metrics.exists() else None
    header, events = _header(history, age, state or history.state), _events(history)
    # Plots take what is left. Where that is little, the last ones go: no event, and no alert.
    left = height - 1 - _lines(header, width) - _lines(events, width)
    columns = 2 if width >= 76 else 1
    rows = max(1, min(4 // columns, left // _LEAST))
    plots = _plots(history, width // columns - 2, max(_LEAST, min(16, left // rows)))
    grid = Table.grid(expand=True)
    for row in range(0, min(len(plots), rows * columns), columns):
        grid.add_row(*plots[row : row + columns])
    return Group(header, grid, events)


def _lines(part: RenderableType, width: int) -> int:
    return len(Terminal(width=width).render_lines(part))


def _header(history: History, age: float | None, state: str) -> RenderableType:
    """Name, state, how far, how fast, how long yet."""
    train, total = history.train, history.total_steps
    title = Text.assemble((history.name, "bold"), "  ", (state, _STYLES.get(state, "")))
    if state == "running" and age is not None and age > STALE:
        title.append(f"  no record for {duration(age)}: stalled, or killed", style="red")
    if state == "stopped":
        title.append("  waiting for it to go on; Ctrl-C leaves")
    cells: list[RenderableType] = []
    if total:
        cells += [ProgressBar(total, history.last_step, width=20), f"{history.last_step}/{total}"]
    cells += [f"{key} {train[key][-1]:.4g}" for key in ("loss", "lr") if key in train]
    for split, columns in history.evals.items():
        if judge := judged_in(columns):
            cells.append(Text(f"{split} {judge.said(float(columns[judge.key][-1]))}"))
    if "images_per_s" in train:
        recent = train["images_per_s"][-20:]
        # The mean time of an image, not of the rate: see Progress.
        cells.append(f"{len(recent) / np.nansum(1 / recent):,.0f} img/s")
    left = seconds_left(history, age) if state == "running" else None
    if left is not None:
        cells.append(f"{duration(left)} left")
    if "mfu" in train:
        cells.append(f"MFU {np.nanmean(train['mfu'][-20:]):.1%}")
    line = Table.grid(padding=(0, 2))
    line.add_row(*cells)
    shares = Text(phase_shares(history), style="dim")
    if slow := straggler(history.slowest):
        shares.append(f"  {slow}", style="yellow")
    return Group(title, line, shares)


def phase_shares(history: History) -> str:
    """The parts of a step lately, such as "model 71%  data 12%"; "" where none are recorded."""
    recent = {
        key.removeprefix("phases."): float(np.nanmean(values[-20:]))
        for key, values in history.train.items()
        if key.startswith("phases.") and np.isfinite(values[-20:]).any()
    }
    total = sum(recent.values())
    parts = sorted(recent.items(), key=lambda part: -part[1])
    return "  ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts if total)


def seconds_left(history: History, age: float | None) -> float | None:
    """From the pace since the newest start, evaluations included; None where unknown."""
    starts = [e for e in history.events if e["kind"] == "start"]
    total = history.total_steps
    if history.state != "running" or not starts or not total or age is None:
        return None
    done = history.last_step - int(starts[-1].get("step", 0))
    if done <= 0:
        return None
    left = total - history.last_step
    if "total_samples" in starts[-1]:  # by images, where steps hold different numbers of them
        done = history.samples - int(starts[-1]["samples"])
        left = int(starts[-1]["total_samples"]) - history.samples
    elapsed = time.time() - age - float(starts[-1]["time"])
    return elapsed / done * left


def _plots(history: History, width: int, height: int) -> Sequence[RenderableType]:
    train = history.train
    if not train:
        return [Panel("no training step yet")]
    drawn = []
    if "loss" in train:
        loss = [("train", train["step"], train["loss"])]
        loss += [(s, c["step"], c["nll"]) for s, c in history.evals.items() if "nll" in c]
        drawn.append(_plot("loss", loss, width, height, (0.0, loss_ceiling(history))))
    judged = {s: judge for s, c in history.evals.items() if (judge := judged_in(c))}
    for judge in dict.fromkeys(judged.values()):
        lines = [(s, c["step"], c[judge.key]) for s, c in history.evals.items() if s in judged]
        drawn.append(_plot(judge.title, lines, width, height))
    for key, title in (("lr", "learning rate"), ("images_per_s", "images per second")):
        if key in train:
            values = smooth(train[key]) if key == "images_per_s" else train[key]
            limits = (0.0, 1.05 * float(np.nanmax(values)))
            drawn.append(_plot(title, [("", train["step"], values)], width, height, limits))
    return drawn


def _plot(
    title: str,
    lines: Sequence[tuple[str, NDArray[np.float64], NDArray[np.float64]]],
    width: int,
    height: int,
    limits: tuple[float, float] | None = None,
) -> Text:
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(width, height)
    plotext.title(title)
    for (label, x, y), colour in zip(lines, ("blue+", "orange+", "green+"), strict=False):
        finite = np.flatnonzero(np.isfinite(y))
        # A character of braille holds two columns of points: more cannot be told apart.
        shown = finite[:: max(1, len(finite) // (2 * width))]
        name = label if len(lines) > 1 else None
        plotext.plot(
            x[shown].tolist(), y[shown].tolist(), marker="braille", color=colour, label=name
        )
    last = int(max(x[-1] for _, x, _ in lines))
    ticks = [round(last * i / 4) for i in range(5)]
    plotext.xlim(0, max(1, last))
    plotext.xticks(ticks, [f"{tick:,}" for tick in ticks])
    if limits and limits[1] > limits[0]:
        plotext.ylim(*limits)
    return Text.from_ansi(plotext.build().rstrip("\n"))


def _events(history: History) -> RenderableType:
    # Checkpoints come and go by the hundred; what else happened must stay in sight.
    told = [event for event in history.events if event["kind"] != "checkpoint"]
    shown = told[-_EVENTS:]
    alerts = [event for event in told[:-_EVENTS] if _is_alert(event)]
    if alerts and not any(map(_is_alert, shown)):
        shown = [alerts[-1], *shown[1:]]
    steps = [f"step {event.get('step', '')}" for event in shown]
    kinds = [str(event["kind"]) for event in shown]
    lines = []
    for event, step, kind in zip(shown, steps, kinds, strict=True):
        known = ("time", "date", "kind", "step", "pid", "agent")
        details = ", ".join(
            f"{k} {v}" for k, v in event.items() if k not in known and v is not None
        )
        clock = str(event.get("date", ""))[11:19]
        line = Text(no_wrap=True, overflow="ellipsis")  # one for each event
        line.append(f"{clock:8}  ", "dim").append(f"{step:{max(map(len, steps))}}  ")
        line.append(f"{kind:{max(map(len, kinds))}}  ", "yellow" if _is_alert(event) else "")
        lines.append(line.append(details, "dim"))
    return Group(*lines)


def _is_alert(event: Mapping[str, Any]) -> bool:
    return event["kind"] in TITLES and event["kind"] != "end"
