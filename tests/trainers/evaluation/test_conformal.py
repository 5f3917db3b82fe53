"""Sets against MAPIE, brute force, and the coverage that they promise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import BaseEstimator, ClassifierMixin

from bigbatch.trainers.evaluation import outcomes as module
from bigbatch.trainers.evaluation.conformal import ConformalSets, fit_sets
from bigbatch.trainers.evaluation.metrics import softmax
from tests.helpers.predictions import predictions, small_predictions


class Probabilities(ClassifierMixin, BaseEstimator):
    """A classifier whose inputs are its probabilities."""

    def fit(self, x, y):
        self.classes_ = np.arange(x.shape[1])
        return self

    def predict_proba(self, x):
        return x

    def predict(self, x):
        return x.argmax(axis=1)


@pytest.mark.parametrize(("method", "level"), [("lac", 0.9), ("lac", 0.75), ("aps", 0.9)])
def test_sets_against_mapie(method, level):
    from mapie.classification import SplitConformalClassifier

    (p,), labels = predictions(700, 6, members=1)
    held, rest = p[:300], p[300:]
    model = Probabilities().fit(held, labels[:300])
    peer = SplitConformalClassifier(
        model, confidence_level=level, conformity_score=method, prefit=True, random_state=0
    ).conformalize(held, labels[:300])
    last = {"include_last_label": "randomized"} if method == "aps" else {}
    _, wanted = peer.predict_set(rest, conformity_score_params=last)

    def draws(n):  # MAPIE starts the same generator anew each time
        return np.random.RandomState(0).uniform(size=n) if method == "aps" else None

    rule = fit_sets(held, labels[:300], level, method, draws(300))
    assert (rule.sets(rest, draws(400)) == wanted[:, :, 0]).all()


@given(small_predictions(), st.sampled_from([0.1, 0.5, 0.8]), st.booleans())
def test_adaptive_sets_by_brute_force(drawn, level, randomised):
    (p,), labels = drawn
    u = np.random.default_rng(len(p)).random(len(p)) if randomised else np.ones(len(p))

    def score(row, c, u):
        first = sorted(range(len(row)), key=lambda k: (-row[k], k))
        return sum(row[k] for k in first[: first.index(c) + 1]) - u * row[c]

    scores = sorted(score(row, label, v) for row, label, v in zip(p, labels, u, strict=True))
    rank = math.ceil(round((len(p) + 1) * level, 9))
    wanted = scores[rank - 1] if rank <= len(p) else math.inf
    rule = fit_sets(p, labels, level, "aps", u if randomised else None)
    assert rule.threshold == pytest.approx(wanted)
    sets = rule.sets(p, u if randomised else None)
    for row, v, members in zip(p, u, sets, strict=True):
        for c, member in enumerate(members):
            if score(row, c, v) != pytest.approx(rule.threshold):
                assert member == (score(row, c, v) < rule.threshold)
    if not randomised:
        assert sets[np.arange(len(p)), p.argmax(axis=1)].all()  # so none is empty


@pytest.mark.parametrize(
    ("samples", "level", "rank"),
    [(9, 0.9, 9), (99, 0.07, 7), (99, 0.95, 95), (100, 0.9, 91), (8, 0.9, None), (0, 0.5, None)],
)
def test_the_quantile_of_few_samples(samples, level, rank):
    p = np.linspace(1, 0.5, samples)
    rule = fit_sets(np.stack([p, 1 - p], axis=1), np.zeros(samples, np.int64), level)
    assert rule.samples == samples
    if rank is None:
        assert rule.threshold == math.inf
        assert rule.sets(np.array([[1.0, 0.0]])).all()
    else:
        assert rule.threshold == 1 - p[rank - 1]


@pytest.mark.parametrize(("method", "randomised"), [("lac", False), ("aps", False), ("aps", True)])
def test_coverage_is_kept_on_average(method, randomised):
    """For scores without ties it lies between the level and 1 / (n + 1) above it."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(400, 60, 4))
    labels = generator.integers(0, 4, (400, 60))
    covered = []
    for table, label in zip(logits, labels, strict=True):
        p = softmax(table)
        draws = generator.random(60) if randomised else None
        first, second = (None, None) if draws is None else (draws[:30], draws[30:])
        rule = fit_sets(p[:30], label[:30], 0.8, method, first)
        covered.append(rule.sets(p[30:], second)[np.arange(30), label[30:]].mean())
    assert 0.8 - 0.02 < np.mean(covered) < 0.8 + 1 / 31 + 0.02


def test_pieces_give_the_same_rule(monkeypatch):
    (p,), labels = predictions(100, 5, members=1)
    whole = fit_sets(p, labels, 0.9, "aps", np.linspace(0, 0.99, 100))
    monkeypatch.setattr(module, "_NUMBERS", 35)
    assert fit_sets(p, labels, 0.9, "aps", np.linspace(0, 0.99, 100)) == whole


def test_what_does_not_fit_together_is_refused():
    p, labels = np.full((4, 2), 0.5), np.zeros(4, np.int64)
    for level in (0.0, 1.0):
        with pytest.raises(ValueError, match="inside"):
            fit_sets(p, labels, level)
    with pytest.raises(ValueError, match="not randomised"):
        fit_sets(p, labels, 0.5, "lac", np.zeros(4))
    with pytest.raises(ValueError, match="give uniforms"):
        ConformalSets("aps", 0.5, 0.5, 4, randomised=True).sets(p)
    with pytest.raises(ValueError, match="give uniforms"):
        ConformalSets("aps", 0.5, 0.5, 4).sets(p, np.zeros(4))


def test_adaptive_sets_hold_the_label_as_often_as_asked_for_and_the_usual_form_far_more():
    """The usual form: sums up to and with the label, sets up to and with the class that crosses."""
    (p,), labels = predictions(20_000, 10, members=1)
    held, rest, label = p[:10_000], p[10_000:], labels[10_000:]
    rows = np.arange(10_000)
    rule = fit_sets(held, labels[:10_000], 0.9, "aps")
    assert rule.sets(rest)[rows, label].mean() == pytest.approx(0.9, abs=0.01)

    def sums(table):
        order = np.argsort(-table, axis=1)
        reached = np.empty_like(table)
        np.put_along_axis(reached, order, np.take_along_axis(table, order, 1).cumsum(1), 1)
        return reached

    threshold = np.quantile(sums(held)[rows, labels[:10_000]], 0.9)
    usual = sums(rest) - rest < threshold
    assert usual[rows, label].mean() > 0.95
    assert usual.sum() > 1.25 * rule.sets(rest).sum()
