"""How a rank's errors end it: the exit status and the message of each kind, in one table."""

import sys
from collections.abc import Callable
from pathlib import Path

from bigbatch.configs.errors import UserError, is_refused
from bigbatch.configs.redact import message
from bigbatch.trainers.engine import Engine, is_lost_peer
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
    known = _explain(error, engine, run)
    if known is None:
        raise error
    status, text = known
    if text is not None:
        print(f"bigbatch: {text}", file=sys.stderr, flush=True)
    return status


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
