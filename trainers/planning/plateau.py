"""Reduction on a plateau, as a pure function of the evaluations so far. Free of torch."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bigbatch.configs.files import iter_jsonl
from bigbatch.configs.judged import SCORES
from bigbatch.configs.schedules import Plateau

_LEAST = 1e-8  # torch makes no smaller reduction


class Evaluation(NamedTuple):
    """What an evaluation of the validation split after `step` finished steps found."""

    step: int
    scores: Mapping[str, float | None]  # by metric; None or NaN: no finite value


Evaluations = Sequence[Evaluation]


def plateau(
    config: Plateau,
    evaluations: Evaluations,
    start: int,
    step: int,
    place: Callable[[int], int] = lambda step: step,
) -> float:
    """The factor of the step that follows `step` finished ones.

    Evaluations after more than `start` and at most `step` steps count. No state is kept, so
    a resumed run that reads the same evaluations gives the same factors. Values equal
    torch's ReduceLROnPlateau, stepped once at each evaluation. `place` is where in the schedule
    an evaluation's step stands.
    """
    sign = -SCORES[config.metric].sign
    factor, best, bad, cooldown = 1.0, math.inf, 0, 0
    for at, scores in evaluations:
        if not start < place(at) <= step:
            continue
        found = scores.get(config.metric)
        value = math.nan if found is None else sign * found
        if value < _to_beat(config, best, sign):
            best, bad = value, 0
        else:
            bad += 1
        if cooldown > 0:
            cooldown, bad = cooldown - 1, 0
        if bad > config.patience:
            lower = max(factor * config.factor, config.final)
            factor = lower if factor - lower > _LEAST else factor
            cooldown, bad = config.cooldown, 0
    return factor


def _to_beat(config: Plateau, best: float, sign: float) -> float:
    """`best` less the least improvement that counts; of a metric to maximise, both negated."""
    if config.threshold_mode == "abs":
        return best - config.threshold
    return best * (1.0 - sign * config.threshold)


def read_evaluations(metrics: Path, step: int) -> list[Evaluation]:
    """The evaluations of the validation split up to `step`, from metrics.jsonl."""
    return [
        Evaluation(record["step"], {k: record[k] for k in SCORES if k in record})
        for record in iter_jsonl(metrics, b'"eval"')
        if record.get("kind") == "eval"
        and record.get("split") == "val"
        and isinstance(record.get("step"), int)
        and record["step"] <= step
    ]
