"""The output of all ranks of a run, merged by time: RUN/logs/rank-NNNNN.log.

Each line there starts with its time. What else is said stands without times in slurm-*.out,
and comes last: by SLURM itself, and by ranks that failed before they had a log.
"""

import heapq
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click

from bigbatch.configs.printable import printable
from bigbatch.configs.rundir import RunDir

_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z) (.*)")
_RANK = re.compile(r"rank-\d{1,9}\.log")
_COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "bright_cyan", "bright_green")
_POLL_S = 0.3


class Line(NamedTuple):
    time: str  # UTC; empty for what SLURM says
    rank: int  # -1: SLURM
    text: str


def read(run: RunDir, ranks: Sequence[int] = ()) -> Iterator[Line]:
    """All lines of all ranks, or of `ranks`, in order of time."""
    sources = [_lines(path.open(errors="replace"), _rank(path)) for path in _files(run, ranks)]
    seen: set[str] = set()
    for line in heapq.merge(*sources, key=lambda line: line.time):
        seen.add(line.text)
        yield line
    if not ranks:
        yield from _of_slurm(run, seen)


def follow(
    run: RunDir,
    ranks: Sequence[int] = (),
    ended: Callable[[], bool] | None = None,
    past: int | None = None,
) -> Iterator[Line]:
    """The lines so far, or the last `past` of them, then new ones until the run has ended.

    New lines of one look at the files are in order of time; ranks and files may appear late.
    """
    if ended is None:
        ended = _Ended(run)
    offsets: dict[Path, int] = {}
    seen: set[str] = set()
    while True:
        last = ended()  # asked before reading: what is written until then is still read
        found: list[Line] = []
        for path in _files(run, ranks):
            whole, offsets[path] = _new_text(path, offsets.get(path, 0))
            found += _lines(whole.splitlines(), _rank(path))
        seen |= {line.text for line in found}
        found.sort(key=lambda line: line.time)
        yield from found if past is None else found[max(0, len(found) - past) :]
        past = None
        if last:
            yield from [] if ranks else _of_slurm(run, seen)
            return
        time.sleep(_POLL_S)


def last(lines: Iterable[Line], count: int) -> Iterator[Line]:
    yield from deque(lines, maxlen=count)


def paint(line: Line) -> str:
    text = printable(line.text)
    if line.rank < 0:
        return click.style(f"slurm    {text}", "red")
    clock = line.time[11:23]
    return click.style(f"{clock} {line.rank:>4} ", _COLOURS[line.rank % len(_COLOURS)]) + text


class _Ended:
    """Whether a run has ended; asked rarely, because SLURM may have to be asked."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._next = 0.0
        self._answer = False

    def __call__(self) -> bool:
        from bigbatch.launcher.runs.registry import has_ended

        if time.monotonic() >= self._next:
            self._answer = has_ended(self._run)
            self._next = time.monotonic() + 2.0
        return self._answer


def _files(run: RunDir, ranks: Sequence[int]) -> list[Path]:
    found = sorted(p for p in (run.path / "logs").glob("rank-*.log") if _RANK.fullmatch(p.name))
    return [path for path in found if not ranks or _rank(path) in ranks]


def _rank(path: Path) -> int:
    return int(path.stem.removeprefix("rank-"))


def _lines(text: Iterable[str], rank: int) -> Iterator[Line]:
    """A line that lost its time (a full disk cuts) takes that of the one before."""
    now = ""
    for line in text:
        match = _LINE.fullmatch(line.rstrip("\n"))
        now = match[1] if match else now
        yield Line(now, rank, match[2] if match else line.rstrip("\n"))


def _new_text(path: Path, offset: int) -> tuple[str, int]:
    """The whole lines after a byte offset, and where they end."""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    return whole.decode(errors="replace"), offset + len(whole)


def _of_slurm(run: RunDir, seen: set[str]) -> Iterator[Line]:
    """What slurm-*.out holds besides what the ranks said, which is in there as well."""
    for path in sorted(run.path.glob("slurm-*.out")):
        for line in path.read_text(errors="replace").splitlines():
            if line not in seen:
                yield Line("", -1, line)
