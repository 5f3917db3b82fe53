"""What a run's directory says of one of its steps: where to begin, and what was recorded of it.

Step N is the one that makes N finished steps, as records of metrics.jsonl, checkpoints and `fork`
count them; inside the loop it has the number N - 1. Nothing here writes. Free of torch.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bigbatch.configs.decisions import recipe_of
from bigbatch.configs.errors import UserError
from bigbatch.configs.files import iter_jsonl
from bigbatch.configs.json_text import parse_json
from bigbatch.configs.rundir import RunDir
from bigbatch.configs.schema import Recipe
from bigbatch.configs.targets import learns_targets
from bigbatch.trainers.planning.plateau import Evaluation, read_evaluations
from bigbatch.trainers.recovery.rollback import Range, is_skipped
from bigbatch.trainers.recovery.stored import (
    STATE,
    CorruptCheckpoint,
    list_checkpoints,
    step_of,
    verify,
)

Record = dict[str, Any]
USUAL_STEPS = 20  # before a step, by whose records it is judged
# What an event has to number for it to be read: of one that somebody has damaged nothing is taken.
_NUMBERED = {
    "start": ("step",),
    "rollback": ("first", "last"),
    "non_finite": ("step",),
    "spike": ("step",),
}


@dataclass(frozen=True)
class Past:
    """Step `step` of a run, to be replayed from the state after `start` finished steps."""

    run: RunDir
    recipe: Recipe
    step: int
    start: int
    checkpoint: Path | None  # None: the model as it was built
    skipped: tuple[Range, ...]  # steps, as counted before them, that make no update
    attempts: tuple[Record, ...]  # start events, oldest first, those that others redid cut off
    records: dict[int, Record] = field(default_factory=dict)  # "train", of all that is replayed
    gradients: dict[int, Record] = field(default_factory=dict)  # likewise
    usual: tuple[float, ...] = ()  # gradient norms of the last recorded steps before
    evaluations: tuple[Evaluation, ...] = ()  # of the validation split, up to `step`
    confusions: dict[int, Any] = field(default_factory=dict)  # what these confused, if recorded
    refused: bool = False  # the run made no update in this step, for it went wrong there
    undone: bool = False  # a rollback went back from this step: the run has another try on record
    notes: tuple[str, ...] = ()  # what a user should know, such as a damaged checkpoint

    def attempt(self, step: int) -> Record:
        """The start event of the attempt that made a step; {} where none is recorded."""
        before = [event for event in self.attempts if event["step"] < step]
        return before[-1] if before else {}

    def attempts_until(self, step: int) -> list[Record]:
        """The start events of the attempts that made the replayed steps up to this one."""
        first = self.attempt(self.start + 1)
        later = [e for e in self.attempts if self.start < e["step"] < step]
        return [event for event in (first, *later) if event]


@dataclass
class _Events:
    """What events.jsonl says of steps, in its order."""

    rollbacks: list[Record] = field(default_factory=list)
    attempts: list[Record] = field(default_factory=list)
    wrong: dict[int, Record] = field(default_factory=dict)  # by step: it made no update
    redone: int | None = None  # of what comes after so many steps, records are of a later try
    later: list[Range] = field(default_factory=list)  # what was stepped over since

    def add(self, event: Record) -> None:
        kind = event["kind"]
        if kind == "start":
            self.attempts = [e for e in self.attempts if e["step"] < event["step"]] + [event]
        elif kind == "rollback":
            self.rollbacks.append(event)
            self.add_wrong(int(event["last"]) + 1, event)
        elif kind == "non_finite":
            self.add_wrong(int(event["step"]) + 1, event)
        elif kind == "spike" and event.get("refused"):
            self.add_wrong(int(event["step"]), event)

    def add_wrong(self, step: int, event: Record) -> None:
        self.wrong[step] = {**self.wrong.get(step, {}), **event}


def find_past(
    run: RunDir, step: int, *, start: int | None = None, before_rollback: bool = False
) -> Past:
    """How step `step` of `run` can be replayed: from the checkpoint after `start` finished steps,
    or the newest one before the step; without any from the model as it was built.

    `before_rollback`: the step as it was when the run went back from it, or from one after it.
    Raises UserError, with the remedy, where the step is out of reach.
    """
    recipe = recipe_of(run)
    if recipe.data.stream is not None:
        raise UserError(
            f"{run.name} trains on data.stream, whose samples are drawn anew at each start: no "
            "step of it can be had again; index the tars and set data.path"
        )
    if learns_targets(recipe):
        raise UserError(
            f"{run.name} learns targets (loss {recipe.loss.name}), and only steps of classifiers "
            "are made again, by replay, diff and audit --fraction; `bigbatch audit` and `bigbatch "
            "diff --ledgers` go by what is on record"
        )
    events = _read_events(run, step, before_rollback)
    skipped = [_range(event) for event in events.rollbacks]
    _check_reach(run, step, events)
    origin = run.forked_from
    first = origin["at"] if origin else 0
    if step <= first:
        raise UserError(
            f"step {step} is none of {run.name}, which branched off {(origin or {}).get('run')} "
            f"after step {first}: replay it there"
        )
    found, checkpoint, notes = _find_start(run, step, start, skipped, events.later)
    # A branch steps over what its parent had: its own events do not say so, its checkpoints do.
    skipped += [steps for steps in _over(checkpoint) if steps not in skipped]
    stands = step if events.redone is None else min(step, events.redone)
    kinds: dict[str, dict[int, Record]] = {"train": {}, "gradients": {}, "confusion": {}}
    for record in iter_jsonl(run.metrics, b'"train"', b'"gradients"', b'"confusion"'):
        if _is_sound(record) and record["step"] <= stands:
            kinds[record["kind"]][record["step"]] = record
    train = kinds["train"]
    norms = [number(train[s].get("grad_norm")) for s in sorted(train) if s < step][-USUAL_STEPS:]
    records = {s: record for s, record in train.items() if s > found}
    wrong = events.wrong.get(step)
    refused = step not in records and wrong is not None and not is_skipped(skipped, step - 1)
    if refused and wrong is not None:
        records[step] = {k: wrong[k] for k in ("loss", "grad_norm") if k in wrong}
    return Past(
        run,
        recipe,
        step,
        found,
        checkpoint,
        tuple(skipped),
        tuple(events.attempts),
        records,
        kinds["gradients"],
        tuple(norm for norm in norms if norm is not None),
        tuple(read_evaluations(run.metrics, step)),
        {s: record["matrix"] for s, record in kinds["confusion"].items()},
        refused,
        before_rollback,
        tuple(notes),
    )


def whence(
    runs: tuple[RunDir, RunDir], step: int, after: int | None
) -> tuple[int, tuple[Past, Past]]:
    """How step `step` of two runs that are the same after step `after` can be replayed on both.

    Returns after how many finished steps to begin to compare, and each run's past, from its newest
    checkpoint up to there. Raises UserError where a step of one of them is out of reach.
    """
    if runs[0].recipe().precision != runs[1].recipe().precision:
        raise UserError("the runs have different precisions, which one process cannot both have")
    branched = [origin["at"] for run in runs if (origin := run.forked_from) is not None]
    same = max(after or 0, *branched, 0)
    found = []
    for run in runs:
        begin = find_past(run, same + 1)
        past = find_past(run, step, start=begin.start)
        found.append(replace(past, notes=begin.notes))
    return same, (found[0], found[1])


def beginnings(run: RunDir) -> list[int]:
    """After how many steps a replay can begin: checkpoints that verify, and 0 but in a branch."""
    skipped = [_range(event) for event in _read_events(run, 0, False).rollbacks]
    found = set() if run.forked_from is not None else {0}
    for path in list_checkpoints(run.checkpoints):
        if not _is_of_try(path, skipped, []):
            continue
        try:
            verify(path)
        except CorruptCheckpoint:
            continue
        found.add(step_of(path))
    return sorted(found)


def _read_events(run: RunDir, step: int, before_rollback: bool) -> _Events:
    """The events; with `before_rollback` those up to the rollback that undid `step`, itself out."""
    events = _Events()
    words = (b'"start"', b'"rollback"', b'"non_finite"', b'"spike"')
    undone: list[Range] = []
    found = False
    for event in iter_jsonl(run.events, *words):
        kind = event.get("kind")
        numbers = _NUMBERED.get(kind) if isinstance(kind, str) else None
        if numbers is None or not all(type(event.get(name)) is int for name in numbers):
            continue
        if found:
            if kind == "start":
                redone = int(event["step"])
                events.redone = redone if events.redone is None else min(redone, events.redone)
            elif kind == "rollback":
                events.later.append(_range(event))
            continue
        if before_rollback and kind == "rollback":
            undone.append([number + 1 for number in _range(event)])
            if undone[-1][0] <= step <= undone[-1][1]:
                events.add_wrong(undone[-1][1], event)
                events.later.append(_range(event))
                found = True
                continue
        events.add(event)
    if before_rollback and not found:
        known = ", ".join(f"{first} to {last}" for first, last in undone)
        raise UserError(
            f"{run.name} went back from no step {step}: "
            + (f"its rollbacks undid steps {known}" if known else "it had no rollback")
            + "; leave out --before-rollback"
        )
    return events


def _is_sound(record: Record) -> bool:
    """Whether a record of metrics.jsonl has the form of its kind; others are none."""
    if type(record.get("step")) is not int:
        return False
    match record.get("kind"):
        case "train":
            return True
        case "gradients":
            norms = record.get("norms")
            return isinstance(norms, dict) and all(
                norm is None or number(norm) is not None for norm in norms.values()
            )
        case "confusion":
            return isinstance(record.get("matrix"), list)
    return False


def number(value: Any) -> float | None:
    """A recorded value as a float; None where it is no number."""
    try:
        return float(value) if type(value) in (int, float) else None
    except OverflowError:
        return None


def _range(rollback: Record) -> Range:
    return [int(rollback["first"]), int(rollback["last"])]


def _check_reach(run: RunDir, step: int, events: _Events) -> None:
    newest = iter_jsonl(run.metrics, b'"train"', newest_first=True)
    recorded = next((r["step"] for r in newest if r.get("kind") == "train" and _is_sound(r)), 0)
    saved = [step_of(path) for path in list_checkpoints(run.checkpoints)[:1]]
    last = max([recorded, *saved, *events.wrong])
    if not last:
        raise UserError(f"{run.path} has finished no step yet; train it first")
    if not 1 <= step <= last:
        raise UserError(
            f"{run.name} has no step {step}: its steps are 1 to {last:,}, where step N is the one "
            "that record N of metrics.jsonl is of"
        )


def _find_start(
    run: RunDir, step: int, start: int | None, skipped: list[Range], later: list[Range]
) -> tuple[int, Path | None, list[str]]:
    """Finished steps, the checkpoint after them, and what is wrong with newer ones."""
    branched = run.forked_from is not None
    there = [path for path in list_checkpoints(run.checkpoints) if step_of(path) < step]
    usable = [path for path in there if _is_of_try(path, skipped, later)]
    if start is not None and start not in [0, *map(step_of, usable)]:
        have = ", ".join(str(step_of(path)) for path in reversed(usable)) or "none"
        raise UserError(
            f"--from {start}: before step {step} of {run.name} there are checkpoints after steps "
            f"{have}" + ("" if branched else ", and 0, the model as it was built")
        )
    notes: list[str] = []
    for path in usable:
        if start is not None and step_of(path) != start:
            continue
        try:
            verify(path)
        except CorruptCheckpoint as error:
            if start is not None:
                raise UserError(f"{error}; leave out --from, or name another one") from None
            notes.append(f"{error}; going from an older one")
            continue
        return step_of(path), path, notes
    if branched:
        kept = ", ".join(str(step_of(p)) for p in reversed(list_checkpoints(run.checkpoints)))
        raise UserError(
            f"step {step} of {run.name} is out of reach: no checkpoint before it verifies (there "
            f"are those after steps {kept or 'none'}), and a branch has no beginning of its own; "
            "branch off its parent again with `bigbatch fork` and checkpoint.keep_every set"
        )
    return 0, None, notes


def _is_of_try(path: Path, skipped: list[Range], later: list[Range]) -> bool:
    """Whether a checkpoint's weights stepped over all of `skipped` that lies before it, and over
    nothing of `later`."""
    over, step = _over(path), step_of(path)
    if any(steps in over for steps in later if steps[0] < step):
        return False
    return all(steps in over for steps in skipped if steps[0] < step)


def _over(path: Path | None) -> list[Range]:
    """What a checkpoint has stepped over."""
    try:
        over = [] if path is None else parse_json((path / STATE).read_bytes()).get("over", [])
    except (OSError, ValueError, AttributeError):
        return []  # `verify` says what is wrong with it
    return list(over)
