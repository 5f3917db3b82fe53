"""The score that models are judged by."""

import math

import pytest

from bigbatch.configs.judged import ACCURACY, KL, MAE, R2, SCORES, judged_by, judged_in, shown
from bigbatch.configs.load import load_recipe


@pytest.mark.parametrize(
    ("scores", "judge"),
    [
        ({"nll": 0.3, "accuracy": 0.5}, ACCURACY),
        ({"rmse": 2.0, "mae": 1.0, "r2": 0.5}, MAE),
        ({"mode": 0.5, "kl": 0.1}, KL),
        ({"loss": 1.0, "r2": 0.5}, None),
    ],
)
def test_scores_know_by_which_they_are_judged(scores, judge):
    assert judged_in(scores) == judge
    if judge is not None:
        assert shown(judge)[0] == judge
        assert not {score.key for score in shown(judge)} & {
            score.key for other in (ACCURACY, MAE, KL) if other != judge for score in shown(other)
        }


def test_a_classifier_is_judged_by_accuracy():
    assert judged_by(load_recipe("digits")) == ACCURACY


def test_merit_grows_with_what_is_better():
    assert ACCURACY.merit({"accuracy": 0.9}) > ACCURACY.merit({"accuracy": 0.8})
    assert MAE.merit({"mae": 1.0}) > MAE.merit({"mae": 2.0})
    for score in SCORES.values():
        for scores in ({}, {score.key: None}, {score.key: math.nan}):
            assert score.merit(scores) == -math.inf


def test_how_scores_are_written():
    assert (ACCURACY.text(0.98765), ACCURACY.said(0.98765)) == ("98.77%", "98.77%")
    assert (MAE.text(0.00012345), MAE.said(12345.6)) == ("0.0001234", "MAE 1.235e+04")
    assert (R2.text(0.98765), KL.said(0.98765)) == ("0.9877", "KL 0.9877")
