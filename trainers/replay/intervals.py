"""Which stretches of a run an audit makes again, and how likely it is to meet what is wrong.

Free of torch. An interval is all steps from one checkpoint to the next: the state at its begin and
the one at its end are both on the disk. The draw is one without replacement, so that the number
of tampered intervals among the drawn ones is hypergeometric.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import read_json
from bigbatch.configs.rundir import RunDir
from bigbatch.data.rng import uniforms
from bigbatch.trainers.replay.past import beginnings


@dataclass(frozen=True)
class Interval:
    """Steps first + 1 to last, from the state after `first` finished steps."""

    first: int
    last: int

    @property
    def steps(self) -> int:
        return self.last - self.first


def intervals(run: RunDir, lines: Mapping[int, Any]) -> list[Interval]:
    """All of them, in order; `lines` of the ledger that no checkpoint comes after are the last.

    UserError where there is none.
    """
    ends = beginnings(run)
    if lines and ends and max(lines) > ends[-1]:
        ends.append(max(lines))
    found = [Interval(first, last) for first, last in pairwise(ends)]
    if not found:
        raise UserError(
            f"{run.path} has no step that can be computed again: it has finished none, or no "
            "checkpoint before one verifies; without --fraction the files alone are checked"
        )
    return found


def draw(every: Sequence[Interval], fraction: float, name: str, seed: int) -> list[Interval]:
    """A share of the intervals, rounded up, in order; which ones follows from name and seed."""
    count = drawn_of(len(every), fraction)
    places = np.argsort(uniforms((len(every),), seed, "audit", name), kind="stable")[:count]
    return [every[place] for place in sorted(places.tolist())]


def drawn_of(total: int, fraction: float) -> int:
    return min(total, max(1, math.ceil(round(total * fraction, 9))))


def detection(total: int, drawn: int, tampered: int) -> float:
    """The chance that at least one of `tampered` intervals is among those drawn:
    1 - C(total - tampered, drawn) / C(total, drawn)."""
    missed = Fraction(math.comb(total - tampered, drawn), math.comb(total, drawn))
    return float(1 - missed)


def identity(run: RunDir) -> str:
    """What a run is called in a draw, wherever it lies: its first name, and when it was made."""
    manifest = read_json(run.manifest) or {}
    return f"{manifest.get('name', run.name)} {manifest.get('created', '')}"
