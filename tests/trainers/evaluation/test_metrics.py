"""Scores against scikit-learn and hand computation."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, log_loss

from bigbatch.trainers.evaluation.metrics import (
    brier,
    calibration_error,
    confusion,
    nll,
    score,
    softmax,
)


@pytest.fixture
def predictions():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 5, 400)
    logits = generator.normal(size=(400, 5)) + 2 * np.eye(5)[labels]
    return softmax(logits), labels


def test_against_scikit_learn(predictions):
    p, labels = predictions
    scores = score(p, labels)
    assert scores["accuracy"] == accuracy_score(labels, p.argmax(1))
    balanced = balanced_accuracy_score(labels, p.argmax(1))
    assert scores["balanced_accuracy"] == pytest.approx(balanced)
    assert scores["nll"] == pytest.approx(log_loss(labels, p))
    assert (
        confusion(labels, p.argmax(1), p.shape[1]) == confusion_matrix(labels, p.argmax(1))
    ).all()


def test_brier_is_the_squared_distance_to_the_label(predictions):
    p, labels = predictions
    assert brier(p, labels) == pytest.approx(((p - np.eye(5)[labels]) ** 2).sum(1).mean())


def test_calibration_error_by_hand():
    # Two of confidence 0.9, one right: gap 0.4; two of 0.6, both right: gap 0.4.
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    assert calibration_error(p, np.array([0, 1, 1, 1])) == pytest.approx(0.4)


def test_a_certain_mistake_has_a_finite_nll():
    assert np.isfinite(nll(np.array([[1.0, 0.0]]), np.array([1])))


def test_softmax_of_huge_logits():
    assert softmax(np.array([[1e4, 0.0]])).tolist() == [[1.0, 0.0]]
