"""An interval of a run computed again, and compared with all that the run says of it."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from bigbatch.configs.errors import Changed, UserError
from bigbatch.configs.rundir import RunDir
from bigbatch.configs.words import plural
from bigbatch.data.journal import read_journal
from bigbatch.trainers.ledger.audit import Audit, audit
from bigbatch.trainers.ledger.lines import Step, read_ledger
from bigbatch.trainers.planning.inputs import open_inputs
from bigbatch.trainers.replay.certificate import (
    DIFFERS,
    NOT_COMPARABLE,
    SAME,
    Certificate,
    certificate,
)
from bigbatch.trainers.replay.environment import differences, here, ledger_differences
from bigbatch.trainers.replay.intervals import Interval, draw, identity, intervals
from bigbatch.trainers.replay.past import Past, find_past
from bigbatch.trainers.replay.progress import telling
from bigbatch.trainers.replay.replay import KEYS, Difference, Replay, open_replay
from bigbatch.trainers.replay.saved import unlike_saved

_NAMED = 5


@dataclass(frozen=True)
class Recomputed:
    """What came of an interval. There is no tolerance: the same is the same bits."""

    first: int  # finished steps that it began after
    last: int
    outcome: str
    values: int = 0  # compared: of records and of the ledger
    lines: int = 0  # of the ledger
    checkpoint: bool = False  # the state at its end was compared with a checkpoint
    findings: tuple[str, ...] = ()  # what differs, and where
    reasons: tuple[str, ...] = ()  # why it cannot be compared, or may differ by rounding alone

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def recompute(
    run: RunDir, interval: Interval, lines: Mapping[int, Step], on_step: Callable[[], object]
) -> Recomputed:
    """Make the interval's steps again, from the checkpoint at its begin; the run is only read.

    `lines` are those of the ledger, whose starts say what computed them.
    """
    first, last = interval.first, interval.last
    try:
        past = find_past(run, last, start=first)
        with open_replay(past, on_step) as replay:
            replay.advance(last)
            return _judged(replay, past, interval, lines)
    except Changed as error:
        return Recomputed(first, last, DIFFERS, findings=(str(error),))
    except UserError as error:
        return Recomputed(first, last, NOT_COMPARABLE, reasons=(str(error),))


def _judged(
    replay: Replay, past: Past, interval: Interval, lines: Mapping[int, Step]
) -> Recomputed:
    values, count, differing = replay.compare()
    unlike = unlike_saved(past, replay.job.state)
    findings = _first(differing)
    if unlike:
        named = ", ".join(unlike[:_NAMED]) + (", ..." if unlike[_NAMED:] else "")
        findings.append(
            f"checkpoint after step {past.step}: {plural(len(unlike), 'tensor or value')} not as "
            f"recomputed: {named}"
        )
    reasons: dict[str, None] = {}
    if findings:
        reasons |= dict.fromkeys(differences(past, replay.engine.device))
        own = range(interval.first + 1, interval.last + 1)
        starts = [lines[step].start for step in own if step in lines]
        for i, start in enumerate(starts):
            if i == 0 or start is not starts[i - 1]:
                reasons |= dict.fromkeys(ledger_differences(start, replay.engine.device))
    outcome = SAME
    if findings:  # which samples a step has is the same on any machine
        unreadable = _unreadable(past, replay)
        findings = [*unreadable, *findings]
        other_data = unreadable or any(found.name == KEYS for found in differing)
        outcome = NOT_COMPARABLE if reasons and not other_data else DIFFERS
    elif not values and unlike is None:
        outcome = NOT_COMPARABLE
        reasons["nothing of it is on record to compare with"] = None
    return Recomputed(
        interval.first,
        interval.last,
        outcome,
        values,
        count,
        unlike is not None,
        tuple(findings),
        tuple(reasons),
    )


def _first(differing: tuple[Difference, ...]) -> list[str]:
    """The differences of the first step that has any; what comes after follows from it."""
    own = [str(found) for found in differing if found.step == differing[0].step]
    more = len(differing) - len(own)
    return own + ([f"and {plural(more, 'value')} after it"] if more else [])


def _unreadable(past: Past, replay: Replay) -> list[str]:
    """Samples that could be read when the run was trained."""
    known = read_journal(past.run.path)
    found = [entry for entry in read_journal(replay.job.run.path) if entry not in known]
    lines = [
        f"step {entry['step'] + 1}: {entry['shard']} at byte {entry['offset']:,}: {entry['reason']}"
        for entry in found[:_NAMED]
    ]
    more = len(found) - len(lines)
    return lines + ([f"and {plural(more, 'sample')} more"] if more else [])


def audit_again(run: RunDir, fraction: float, seed: int) -> tuple[Audit, Certificate]:
    """Check a run's files, and compute a share of its intervals again, which `seed` draws.

    UserError where there is no ledger, no interval, or the data are not here.
    """
    ledger = read_ledger(run.ledger)
    files = audit(run, ledger)
    every = intervals(run, ledger.steps)
    name = identity(run)
    drawn = draw(every, fraction, name, seed)
    with suppress(Changed):  # which each interval says, as a finding
        open_inputs(run.recipe())
    with telling(f"audit of {run.name}", sum(one.steps for one in drawn)) as on_step:
        found = [recompute(run, one, ledger.steps, on_step).as_json() for one in drawn]
    return files, certificate(
        run,
        ledger,
        files,
        every,
        found,
        {"fraction": fraction, "seed": seed, "name": name},
        here(),
    )
