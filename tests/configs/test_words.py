"""Plurals and ranges, and that nobody writes them by hand where one may be meant."""

import pytest

from bigbatch.configs.words import plural, span


@pytest.mark.parametrize(
    ("count", "noun", "said"),
    [
        (1, "class", "1 class"),
        (10, "class", "10 classes"),
        (0, "shard", "0 shards"),
        (1024, "micro-batch", "1,024 micro-batches"),
        (2, "process", "2 processes"),
        (2, "entry", "2 entries"),
        (2, "key", "2 keys"),
        (2, "pass", "2 passes"),
        (1.0, "epoch", "1 epoch"),
        (0.5, "epoch", "0.5 epochs"),
        (1797, "sample", "1,797 samples"),
    ],
)
def test_plural(count: float, noun: str, said: str) -> None:
    assert plural(count, noun) == said


def test_a_span_of_one_number_is_that_number() -> None:
    assert span(4500, 4500) == "4,500"
    assert span(1, 4500) == "1 to 4,500"
