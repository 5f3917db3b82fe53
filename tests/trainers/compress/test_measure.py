"""Sizes, counts, times and scores, against what is known."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bigbatch.trainers.compress.measure import counts, milliseconds, scores, sizes
from bigbatch.trainers.evaluation.accuracy import wilson
from bigbatch.trainers.evaluation.outcomes import outcomes


def test_sizes_are_those_of_the_file_and_of_gzip(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 4, 200_000).astype(np.uint8).tobytes()
    (tmp_path / "a").write_bytes(content)
    found = sizes(tmp_path / "a")
    assert found["bytes"] == len(content)
    assert abs(found["gzip_bytes"] - len(gzip.compress(content, 6))) < 64


def test_counts_of_a_convolution_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(256, 2)
    )
    with torch.no_grad():
        model[0].weight[0] = 0
        model[2].bias.fill_(1)
    assert counts(model, 3, 8) == {
        "parameters": 108 + 514,
        "nonzero": 81 + 514,
        "flops": 2 * (108 * 64 + 512),
    }


def test_runs_take_turns_and_the_first_round_does_not_count() -> None:
    said: list[str] = []
    times = milliseconds([lambda: said.append("a"), lambda: said.append("b")], 9)
    rounds = ["".join(said[i : i + 2]) for i in range(0, 20, 2)]
    assert {*rounds} == {"ab", "ba"}
    assert len(said) == 20
    assert times.shape == (2, 9)
    assert (times >= 0).all()


def test_scores_before_and_after() -> None:
    labels = np.array([0, 1, 1, 0, 1])
    before = np.eye(2)[[0, 1, 0, 0, 0]] * 0.8 + 0.1
    after = np.eye(2)[[0, 1, 1, 1, 1]] * 0.8 + 0.1
    found = scores(outcomes(after, labels), outcomes(before, labels))
    assert found["accuracy"] == 0.8
    assert found["interval"] == wilson(4, 5)
    assert found["change"] == pytest.approx(0.2)
    low, high = found["change_interval"]
    assert -1 <= low < 0.2 < high <= 1
    assert found["agreement"] == pytest.approx(0.4)
