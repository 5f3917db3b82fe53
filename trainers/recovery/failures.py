"""How a rank's errors end it: the exit status and the message of each kind, in one table."""

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bigbatch.configs.errors import UserError, is_refused
from bigbatch.configs.files import iter_jsonl
from bigbatch.configs.redact import message, redact
from bigbatch.configs.rundir import RunDir, check_layout, event_record
from bigbatch.trainers.engine import Engine, is_lost_peer
from bigbatch.trainers.engine.determinism import without_form
from bigbatch.trainers.monitoring.jsonl import JsonLines
from bigbatch.trainers.recovery import oom

Told = tuple[int, str] | None  # status and message; None: a defect, which keeps its traceback
Explain = Callable[[Exception, int, Path | None], Told]


def _user_error(error: Exception, rank: int, run: Path | None) -> Told:
    return 2, f"rank {rank}: {message(error)}" if rank else message(error)


def _computation(error: Exception, rank: int, run: Path | None) -> Told:
    if oom.is_out_of_memory(error):
        return 2, oom.explain(error, rank)
    if is_lost_peer(error):  # not this rank's doing: the one that ended, or its agent, says why
        return 1, f"rank {rank} lost another rank"
    return None


def _disk(error: Exception, rank: int, run: Path | None) -> Told:
    if not isinstance(error, OSError) or not is_refused(error):
        return None
    if run is None:
        remedy = "free some space or fix the permissions, then repeat the command"
        return 2, f"{message(error)}; {remedy}"
    return 2, (
        f"cannot go on with {run}: {error}; free some space or fix the permissions, then "
        f"`bigbatch resume {run}` starts from the newest checkpoint and writes what is missing"
    )


# The first kind that an error is of explains it.
TABLE: tuple[tuple[type[Exception], Explain], ...] = (
    (UserError, _user_error),
    (RuntimeError, _computation),
    (MemoryError, _computation),
    (OSError, _disk),
)


def report(error: Exception, engine: Engine | None, run: Path | None = None) -> int:
    """Say what ends this rank, and return its exit status; a defect of ours is raised again.

    `run` is the one that is trained, which may be resumed; None where nothing is.
    """
    error = without_form(error) or error
    known = _explain(error, engine, run)
    if run is not None and (known is None or known[1] is not None):
        _note_failed_start(RunDir(run), str(error) if known is None else str(known[1]))
    if known is None:
        raise error
    status, text = known
    if text is not None:
        print(f"bigbatch: {text}", file=sys.stderr, flush=True)
    return status


def _note_failed_start(run: RunDir, text: str) -> None:
    """Say in events.jsonl that a run ended before its first start could be recorded there.

    Once that is recorded, the log says how each attempt ends (monitoring/log.py).
    """
    with suppress(OSError, UserError):  # what ends the run is said in any case
        check_layout(run)
        noted = iter_jsonl(run.events, b'"start"', b'"end"')
        if not any(e.get("kind") in ("start", "end") for e in noted):
            file = JsonLines(run.events)
            file.append(redact(event_record("end", 0, state="failed", error=text)))
            file.close()


def _explain(
    error: Exception, engine: Engine | None, run: Path | None
) -> tuple[int, str | None] | None:
    """Exit status and message of an error that ends this rank; None for a defect of ours.

    The message is None where another rank tells the user the same.
    """
    rank = 0 if engine is None else engine.rank
    found = next((tell(error, rank, run) for kind, tell in TABLE if isinstance(error, kind)), None)
    if found is None:
        return None
    told_elsewhere = isinstance(error, UserError | OSError) and not (
        engine is None or engine.should_report_error()
    )
    return found[0], None if told_elsewhere else found[1]
