"""Two runs below their ledgers: the step at which they part, made again on both, and what in it
differs first."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from bigbatch.trainers.engine.determinism import choose_algorithms
from bigbatch.trainers.ledger.compare import Comparison
from bigbatch.trainers.replay.environment import differences
from bigbatch.trainers.replay.past import Past
from bigbatch.trainers.replay.replay import Replay, open_replay
from bigbatch.trainers.replay.traced import (
    SETTINGS,
    STAGES,
    Apart,
    Trace,
    Tracer,
    compare_traces,
)


@dataclass(frozen=True)
class Side:
    """One run's replay."""

    start: int  # finished steps that it began after
    again: bool | None  # all that is on record came out again; None: nothing is
    differs: str | None  # what came out otherwise, the first of it
    reasons: tuple[str, ...]  # in what this machine is another one


@dataclass(frozen=True)
class Below:
    """What two replays found. `step` is None where they are the same in all steps."""

    step: int | None  # finished steps after the first one that differs
    last: int  # up to which they were compared
    sides: tuple[Side, Side]
    stages: tuple[Apart, ...]  # of that step, in order

    @property
    def first(self) -> Apart | None:
        return next((s for s in self.stages if s.differ and s.stage in STAGES), None)

    def as_json(self) -> dict[str, Any]:
        first = self.first
        return asdict(self) | {
            "first": None if first is None else first.stage,
            "stages": [stage._asdict() for stage in self.stages],
        }


def look_below(
    same: int, pasts: tuple[Past, Past], on_step: Callable[[], object] = lambda: None
) -> Below:
    """Make the steps after `same` on both runs, and find the first that differs, and in what.

    Raises UserError where a step cannot be made here.
    """
    last = pasts[0].step
    # What one of them asks of cuBLAS counts only before anything is computed on a GPU.
    choose_algorithms(deterministic=any(p.recipe.determinism == "full" for p in pasts))
    with open_replay(pasts[0], on_step) as replay:
        replay.advance(same)
        tracer = Tracer(replay)
        ours = [tracer.step() for _ in range(same, last)]
        first = _side(pasts[0], replay)
    with open_replay(pasts[1], on_step) as replay:
        replay.advance(same)
        found = _part(Tracer(replay), ours)
        second = _side(pasts[1], replay)
    step, stages = found if found is not None else (None, ())
    return Below(step, last, (first, second), stages)


def _part(tracer: Tracer, ours: list[Trace]) -> tuple[int, tuple[Apart, ...]] | None:
    for trace in ours:
        stages = compare_traces(trace, tracer.step())
        if any(s.differ and s.stage in STAGES for s in stages):
            return trace.step, tuple(stages)
    return None


def _side(past: Past, replay: Replay) -> Side:
    compared, _, differing = replay.compare()
    return Side(
        past.start,
        not differing if compared else None,
        str(differing[0]) if differing else None,
        tuple(differences(past, replay.engine.device)) if differing else (),
    )


def in_words(below: Below) -> list[str]:
    """The findings, a line each."""
    begun = " and ".join(
        f"{name} from step {side.start:,}" for name, side in zip("AB", below.sides, strict=True)
    )
    lines = [f"made again: {begun}"]
    for name, side in zip("AB", below.sides, strict=True):
        if side.again is False:
            lines.append(f"{name} did not come out as recorded: {side.differs}")
            lines += [f"  environment: {reason}" for reason in side.reasons]
    first = below.first
    if below.step is None or first is None:
        lines.append(
            "the replays are the same in all: what differs on record did not come out again here"
        )
        return lines
    lines.append(f"step {below.step:,} differs first in {STAGES[first.stage]}: {_where(first)}")
    if first.stage == "state":
        lines.append(
            "  the ledgers have the same there: `bigbatch audit` says whose checkpoint was changed"
        )
    if first.stage == "update":
        settings = [s for s in below.stages if s.stage == SETTINGS and s.differ]
        lines += [f"  {_where(setting)}" for setting in settings]
    own = [stage for stage in below.stages if stage.stage in STAGES]
    place = own.index(first)
    before = [f"{STAGES[s.stage]} ({s.compared:,})" for s in own[:place] if s.compared]
    if before:
        lines.append(f"  the same before it: {', '.join(before)}")
    lines += [f"  and then in {STAGES[s.stage]}: {_where(s)}" for s in own[place + 1 :] if s.differ]
    return lines


def verdict(below: Below, found: Comparison) -> str:
    """The last line of what is said."""
    first = below.first
    if below.step is None or first is None:
        return (
            f"step {found.parting.step:,} is the first that differs on record"
            if found.parting
            else ""
        )
    return f"step {below.step:,} is the first that differs: {STAGES[first.stage]}"


def _where(apart: Apart) -> str:
    said = str(apart.where)
    if apart.values is not None:
        said += f": {apart.values[0]} in A, {apart.values[1]} in B"
    return said + f" ({apart.differ:,} of {apart.compared:,} differ)"
