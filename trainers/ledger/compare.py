"""Two runs against each other: recipes, data, and the first step at which their ledgers part.

Free of torch. Equal means equal bits; there is no tolerance.
"""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from bigbatch.configs.decisions import recipe_of
from bigbatch.configs.errors import UserError
from bigbatch.configs.identity import differences, tree_differences
from bigbatch.configs.json_text import parse_json
from bigbatch.configs.rundir import RunDir
from bigbatch.configs.schema import Recipe
from bigbatch.configs.words import plural
from bigbatch.trainers.ledger.lines import DIGESTS, Ledger, Step, read_ledger
from bigbatch.trainers.planning.inputs import open_inputs

SAME, DIFFERS, NOT_COMPARABLE = 0, 1, 2  # exit statuses
_PLACES = ("in A", "in B")
_NAMED = 5  # samples
NOT_AGAIN = "not made again, so not looked at below its digests"
# What a digest that differs first in a step means: all before it in that step are the same.
MEANINGS = {
    "keys": "other samples, in other places of the step, or other files under their names",
    "loss": "the same samples give another loss: their pixels, augmentation or masks, the weights "
    "before the step, or how the device computes",
    "gradient": "the same loss gives another gradient: the backward pass, or its sum over ranks",
    "weights": "the update: the same gradient makes other weights, by another rate, momentum, "
    "decay or clipping",
    "optimizer": "the optimizer's state: the same gradient and weights leave another one",
    "buffers": "running statistics: all else is the same",
}
# Of a start's line: what has to be the same for bits to be.
_ENVIRONMENT = ("device", "torch", "cuda", "cudnn", "threads", "isa", "tf32", "variables")
_DATA = ("data_hash", "order_hash", "teacher_hash")


@dataclass(frozen=True)
class Parting:
    """The first step whose lines differ."""

    step: int  # finished steps
    after: int | None  # the step before it that both have, and is the same; None: there is none
    digests: tuple[str, ...]  # that differ, in the order in which a step makes them
    samples: tuple[str, ...] = ()  # what is known of samples that differ
    replay: str | None = None  # the command that makes it again; None: of a stream none can

    @property
    def first(self) -> str:
        return self.digests[0]


@dataclass(frozen=True)
class Comparison:
    """Two runs compared; `status` is the exit status of `bigbatch diff`."""

    status: int
    verdict: str
    recipe: list[str]
    data: list[str]
    versions: list[str]
    environment: list[str]
    steps: list[int]  # the first and the last of those compared; empty: none
    compared: int
    beyond: dict[str, int]  # by "A" and "B": steps after the last common one
    parting: Parting | None = None
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        found = asdict(self)
        if self.parting is not None:
            found["parting"] |= {"first": self.parting.first}
        return found


def compare(a: RunDir, b: RunDir) -> Comparison:
    """Compare two runs. UserError where one of them is no run."""
    recipes = recipe_of(a), recipe_of(b)
    recipe = differences(*recipes, _PLACES)
    versions = tree_differences(_versions(a), _versions(b), _PLACES)
    try:
        ledgers = read_ledger(a.ledger), read_ledger(b.ledger)
    except UserError as error:
        why = f"not comparable: {error}"
        return Comparison(NOT_COMPARABLE, why, recipe, [], versions, [], [], 0, {"A": 0, "B": 0})
    common = sorted(ledgers[0].steps.keys() & ledgers[1].steps.keys())
    notes = [
        f"the chain of {ledger.path} does not hold: {ledger.broken}; what follows is not compared"
        for ledger in ledgers
        if ledger.broken is not None
    ]
    last = common[-1] if common else 0
    beyond = {n: sum(s > last for s in x.steps) for n, x in zip("AB", ledgers, strict=True)}
    parting = _part(ledgers, common)
    starts = _starts(ledgers, common if parting is None else [parting.step])
    data = [line for key in _DATA for line in _different(starts, (key,))]
    environment = list(_different(starts, _ENVIRONMENT))
    if not all(r.reduction == "exact" for r in recipes):
        environment += _different(starts, ("world", "backend"))
    else:
        notes += [
            f"{line}, which changes no bit with reduction: exact"
            for line in _different(starts, ("world",))
        ]
    if parting is not None and parting.first == "keys":
        parting = replace(parting, samples=tuple(differing_samples(*recipes, parting.step - 1)))
    if parting is not None and recipes[0].data.stream is None:
        command = f"bigbatch replay {shlex.quote(str(a.path))} --step {parting.step}"
        parting = replace(parting, replay=command)
    status, verdict = _verdict(
        common, parting, [*recipe, *data], environment, any(x.broken for x in ledgers)
    )
    return Comparison(
        status,
        verdict,
        recipe,
        data,
        versions,
        environment,
        [common[0], common[-1]] if common else [],
        len(common) if parting is None else common.index(parting.step) + 1,
        beyond,
        parting,
        notes,
    )


def in_words(found: Comparison, runs: tuple[RunDir, RunDir]) -> list[str]:
    """What was found, a line each, but for the verdict."""
    lines = [f"A {runs[0].path}", f"B {runs[1].path}", ""]
    unknown = [] if found.steps else ["not known without a step in both ledgers"]
    for title, some in (
        ("recipe", found.recipe),
        ("data", found.data or unknown),
        ("versions", found.versions),
        ("environment", found.environment or unknown),
    ):
        lines += [f"{title}: {line}" for line in some or ["the same"]]
    lines += [f"note: {note}" for note in found.notes]
    where = f"{found.steps[0]} to {found.steps[1]}" if found.steps else "none"
    lines.append(f"ledgers: steps in both: {where}; compared: {plural(found.compared, 'step')}")
    lines += [
        f"ledgers: {name} goes on for {plural(more, 'step')}"
        for name, more in found.beyond.items()
        if more
    ]
    if (parting := found.parting) is not None:
        since = "" if parting.after is None else f"; step {parting.after} is the same in all"
        lines += ["", f"step {parting.step} differs first in: {parting.first}{since}"]
        lines.append(f"  {MEANINGS[parting.first]}")
        lines += [f"  {sample}" for sample in parting.samples]
        if parting.digests[1:]:
            lines.append(f"  and then in: {', '.join(parting.digests[1:])}")
        if parting.replay is not None:
            lines.append(f"  {parting.replay} looks into it")
    return lines


def _part(ledgers: tuple[Ledger, Ledger], common: Sequence[int]) -> Parting | None:
    """One walk over both, which have been read whole to check their chains."""
    before = None
    for step in common:
        a, b = (ledger.steps[step] for ledger in ledgers)
        if a.packed != b.packed:
            ours, theirs = a.digests, b.digests
            differing = tuple(name for name in DIGESTS if ours[name] != theirs[name])
            return Parting(step, before, differing)
        before = step
    return None


def _starts(
    ledgers: tuple[Ledger, Ledger], steps: Sequence[int]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The lines of the starts that made these steps, of both runs, each pair once."""
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for step in steps:
        pair: tuple[Step, Step] = (ledgers[0].steps[step], ledgers[1].steps[step])
        if not pairs or (pair[0].start, pair[1].start) != pairs[-1]:
            pairs.append((pair[0].start, pair[1].start))
    return pairs


def _different(
    starts: Sequence[tuple[dict[str, Any], dict[str, Any]]], keys: Sequence[str]
) -> list[str]:
    found: dict[str, None] = {}
    for ours, theirs in starts:
        trees = [{key: start.get(key) for key in keys} for start in (ours, theirs)]
        found |= dict.fromkeys(tree_differences(trees[0], trees[1], _PLACES))
    return list(found)


def _verdict(
    common: Sequence[int],
    parting: Parting | None,
    inputs: Sequence[str],
    environment: Sequence[str],
    broken: bool,
) -> tuple[int, str]:
    if not common:
        return NOT_COMPARABLE, "not comparable: no step stands in both ledgers"
    if broken:
        return NOT_COMPARABLE, "not comparable: a ledger whose chain does not hold says nothing"
    if parting is None:
        if inputs:
            return DIFFERS, "recipes or data differ, and no step shows it so far"
        return SAME, "the same, bit for bit"
    if environment:
        return (
            NOT_COMPARABLE,
            f"not comparable: step {parting.step} differs, and so does what computed it",
        )
    return DIFFERS, f"step {parting.step} is the first that differs"


def differing_samples(a: Recipe, b: Recipe, step: int) -> list[str]:
    """Which samples of the step after `step` finished ones differ, as the shards are now."""
    try:
        sides = [_samples(recipe, step) for recipe in (a, b)]
    except UserError as error:
        return [f"which ones cannot be said: {error}"]
    if len(sides[0]) != len(sides[1]):
        return [f"the step has {len(sides[0])} samples in A, {len(sides[1])} in B"]
    found = []
    for place, (ours, theirs) in enumerate(zip(*sides, strict=True)):
        if ours == theirs:
            continue
        what = f"{ours[0]} in A, {theirs[0]} in B"
        if ours[0] == theirs[0]:
            other = "label" if ours[1] != theirs[1] else "file"
            what = f"{ours[0]} has another {other} in A than in B"
        found.append(f"place {place}: {what}")
    if not found:
        return ["the shards are the same now: they were changed since, or could not be read then"]
    more = [f"and {len(found) - _NAMED:,} more"] if len(found) > _NAMED else []
    return found[:_NAMED] + more


def _samples(recipe: Recipe, step: int) -> list[tuple[str, int, int]]:
    """Key, label and CRC-32C of each sample of a step."""
    inputs = open_inputs(recipe)
    order, first = inputs.order, inputs.plan.timeline.first
    if order is None:
        raise UserError("a stream has no order")
    samples = order.samples(np.arange(first(step), first(step + 1)))
    keys, index = order.index.keys(), order.index
    return [(keys[i], int(index.label[i]), int(index.crc[i])) for i in samples.tolist()]


def _versions(run: RunDir) -> dict[str, Any]:
    try:
        manifest = parse_json(run.manifest.read_bytes())
        return {"git": manifest.get("git"), **manifest["versions"]}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
