"""Outcomes against the scores of whole probabilities, scikit-learn and counting by hand."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from sklearn.metrics import top_k_accuracy_score

from bigbatch.trainers.evaluation import outcomes as module
from bigbatch.trainers.evaluation.metrics import score, softmax
from bigbatch.trainers.evaluation.outcomes import join, outcomes, row_chunks
from tests.helpers.predictions import predictions, small_predictions


def test_scores_are_those_of_the_probabilities_bit_for_bit(monkeypatch):
    monkeypatch.setattr(module, "_NUMBERS", 50)  # chunks of seven rows
    (p,), labels = predictions(100, 7, members=1)
    assert outcomes(p, labels).scores() == score(p, labels)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_against_scikit_learn(k):
    (p,), labels = predictions(300, 8, members=1)
    assert outcomes(p, labels).top(k).mean() == top_k_accuracy_score(labels, p, k=k)


@given(small_predictions())
def test_ties_go_to_the_smaller_class(drawn):
    (p,), labels = drawn
    found = outcomes(p, labels)
    for row, label, rank in zip(p, labels, found.rank, strict=True):
        assert np.argsort(-row, kind="stable").tolist().index(label) == rank
    assert (found.top(1) == found.correct).all()


def test_indifference_is_no_hit():
    labels = np.arange(10)
    assert outcomes(np.full((10, 10), 0.1), labels).top(5).sum() == 5


@given(small_predictions())
def test_pieces_join_to_the_whole(drawn):
    (p,), labels = drawn
    parts = join([outcomes(p[i : i + 2], labels[i : i + 2]) for i in range(0, len(p), 2)])
    whole = outcomes(p, labels)
    for name in ("label", "predicted", "confidence", "chosen", "squares", "rank"):
        assert (getattr(parts, name) == getattr(whole, name)).all()


def test_pieces_take_their_numbers_and_no_more():
    """Those of two samples, as 100,000 classes make them, took ten times as much."""
    label, numbers = np.arange(20_000), np.linspace(0, 1, 20_000)

    def piece(first):
        rows = slice(first, first + 2)
        whole, float_ = label[rows], numbers[rows]
        copies = (each.copy() for each in (whole, whole, float_, float_, float_, whole))
        return module.Outcomes(*copies)

    found = module.Collected()
    tracemalloc.start()
    for first in range(0, 20_000, 2):
        found.add(piece(first))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < peak < 2.5 * 48 * 20_000
    assert (found.whole().label == label).all()
    assert (found.whole().squares == numbers).all()
    found.add(piece(0))
    assert len(found.whole()) == 20_002


def test_a_constant_added_to_logits_changes_nothing():
    logits = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    labels = np.arange(50) % 4
    shifted = outcomes(softmax(logits + np.float32(1024)), labels).scores()
    assert shifted == pytest.approx(outcomes(softmax(logits), labels).scores(), abs=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_samples_and_one_class(dtype):
    assert len(outcomes(np.empty((0, 3), dtype), np.empty(0, np.int64))) == 0
    assert outcomes(np.ones((2, 1), dtype), np.zeros(2, np.int64)).scores() == {
        "accuracy": 1.0, "balanced_accuracy": 1.0, "nll": 0.0, "brier": 0.0, "ece": 0.0
    }  # fmt: skip


@pytest.mark.parametrize(
    "row", [[2.0, -1.0], [np.nan, np.nan], [0.5, np.nan], [0.4, 0.4], [np.inf, 0.0]]
)
def test_what_is_no_probability_is_refused(row):
    with pytest.raises(ValueError, match="sum to 1"):
        outcomes(np.array([[0.5, 0.5], row]), np.array([0, 0]))


@pytest.mark.parametrize("labels", [[0], [0, 2], [0, -1]])
def test_labels_that_are_no_class_are_refused(labels):
    with pytest.raises(ValueError, match="from 0 to 1"):
        outcomes(np.full((2, 2), 0.5), np.array(labels))


def test_chunks_cover_each_row_once():
    for rows, width in ((0, 5), (1, 10**9), (3_000_000, 1), (7, 2**19)):
        chunks = list(row_chunks(rows, width))
        assert [0, *(c.stop for c in chunks)] == [*(c.start for c in chunks), rows]
