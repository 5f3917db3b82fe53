"""Which of several ranks is wrong, by what each of them found. Free of torch."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


def majority(values: Sequence[T]) -> T | None:
    """The value that more than half of the ranks have; None where no such value is."""
    value, count = Counter(values).most_common(1)[0]
    return value if 2 * count > len(values) else None


def outvoted(values: Sequence[T]) -> list[int]:
    """The ranks whose value is not the majority's; [] where there is no majority."""
    value = majority(values)
    return [] if value is None else [rank for rank, v in enumerate(values) if v != value]


def judge(owner: int, checker: int, own: T, checked: T, again: Sequence[T]) -> list[int]:
    """The ranks that computed a micro-batch wrongly; [] where that cannot be said.

    `own` is what its owner found at first and `checked` what the checker did, which may be the
    same rank; `again` is what each rank found when all computed it once more. Whoever differs from
    the majority of those, then or at first, is wrong. Where there is none, as when two ranks
    differ, a rank that does not repeat itself is, if it is the only one.
    """
    value = majority(again)
    if value is None:
        first = {owner: own, checker: checked}
        unsteady = [rank for rank in first if again[rank] != first[rank]]
        return unsteady if len(unsteady) == 1 else []
    wrong = {rank for rank, v in enumerate(again) if v != value}
    wrong |= {owner} if own != value else set()
    wrong |= {checker} if checked != value else set()
    return sorted(wrong)
