"""Who is wrong, by what each rank found."""

import pytest

from bigbatch.trainers.corruption.vote import judge, majority, outvoted


@pytest.mark.parametrize(
    ("values", "value", "wrong"),
    [
        ([7, 7, 7], 7, []),
        ([7, 9, 7], 7, [1]),
        ([9, 7, 7, 8, 7], 7, [0, 3]),
        ([7, 9], None, []),
        ([7, 7, 9, 9], None, []),
        ([7, 8, 9], None, []),
    ],
)
def test_more_than_half_is_a_majority(
    values: list[int], value: int | None, wrong: list[int]
) -> None:
    assert majority(values) == value
    assert outvoted(values) == wrong


@pytest.mark.parametrize(
    ("own", "checked", "again", "wrong"),
    [
        (5, 7, [7, 7, 7], [1]),  # a fault of the owner that went away
        (7, 5, [7, 7, 7], [0]),  # of the checker
        (5, 7, [7, 5, 7], [1]),  # one that stays
        (7, 5, [5, 7, 7], [0]),
        (5, 7, [7, 6, 7], [1]),  # and is another one each time
        (5, 6, [7, 7, 7], [0, 1]),
        (7, 5, [7, 7, 9], [0, 2]),  # found by the way
        (5, 7, [7, 6, 8], [1]),  # no majority, and one that does not repeat itself
        (5, 6, [7, 8, 9], []),
        (5, 7, [7, 7], [1]),  # two ranks
        (7, 5, [7, 7], [0]),
        (5, 7, [7, 5], []),  # each repeats itself
        (5, 7, [7, 6], [1]),
        (5, 7, [6, 5], [0]),
    ],
)
def test_rank_0_has_checked_rank_1(
    own: int, checked: int, again: list[int], wrong: list[int]
) -> None:
    assert judge(1, 0, own, checked, again) == wrong


def test_a_rank_alone_is_wrong_whatever_it_finds_the_third_time() -> None:
    assert judge(0, 0, 5, 7, [7]) == judge(0, 0, 5, 7, [5]) == judge(0, 0, 5, 7, [6]) == [0]
