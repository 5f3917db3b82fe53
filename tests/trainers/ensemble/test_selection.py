"""Greedy selection against a slow one, and cross-fitting against memory."""

import math
from dataclasses import replace
from itertools import combinations_with_replacement, permutations

import numpy as np
import pytest

from bigbatch.configs.errors import UserError
from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.ensemble.fit import fit_stack, fit_temperature, fit_weights
from bigbatch.trainers.ensemble.held_out import FitData
from bigbatch.trainers.ensemble.selection import (
    CrossFitted,
    Fitted,
    cross_fit,
    fit_ensemble,
    gate,
    select_greedily,
)
from bigbatch.trainers.evaluation.metrics import nll, softmax
from tests.trainers.ensemble.held_out_samples import reordered, samples


def slow_score(data, bag, score):
    """Of a list of member numbers, from the definition; higher is better."""
    p = np.mean([softmax(data.logits[m]) for m in bag], axis=0)
    if score == "accuracy":
        return round(len(data.labels) * (p.argmax(1) == data.labels).mean())
    return math.fsum(np.log(p[np.arange(len(p)), data.labels])) / len(p)


def slow_selection(data, rounds, score):
    """Caruana et al. 2004, written down once more: a list of members."""
    members = range(len(data.logits))
    by_score = sorted(members, key=lambda m: -slow_score(data, [m], score))
    bag = max((by_score[: n + 1] for n in members), key=lambda b: slow_score(data, b, score))
    way = [bag]
    while len(bag) < rounds:
        bag = max(([*bag, m] for m in members), key=lambda b: slow_score(data, b, score))
        way.append(bag)
    return max(way, key=lambda b: slow_score(data, b, score))


@pytest.mark.parametrize("seed", range(6))
def test_selection_is_the_slow_one(seed):
    data = samples(4, 60, seed=seed, quality=(1.0, 1.5, 2.0))
    expected = slow_selection(data, 12, "nll")
    weights = select_greedily(data, rounds=12).weights
    assert weights == pytest.approx(np.bincount(expected, minlength=4) / len(expected))


@pytest.mark.parametrize("seed", range(6))
def test_selection_by_accuracy_is_as_good_as_the_slow_one(seed):
    """Accuracies tie often, so members may differ: the greedy value at each size may not."""
    data = samples(4, 60, seed=seed, quality=(1.0, 1.5, 2.0))
    canonical = sorted(range(4), key=lambda m: data.logits[m].tobytes())
    data = reordered(data, canonical)  # in which ties of the slow one go to the same member
    expected = slow_selection(data, 8, "accuracy")
    weights = select_greedily(data, rounds=8, score="accuracy").weights
    assert weights == pytest.approx(np.bincount(expected, minlength=4) / len(expected))


@pytest.mark.parametrize("score", ["nll", "accuracy"])
def test_no_ensemble_of_that_size_is_much_better(score):
    """All multisets of up to six of three members, tried."""
    data = samples(3, 60, seed=1, quality=(1.0, 1.4, 1.8))
    whole = select_greedily(data, rounds=6, score=score)
    p = whole.apply(data.logits)
    found = -nll(p, data.labels) if score == "nll" else (p.argmax(1) == data.labels).sum()
    best = max(
        slow_score(data, list(bag), score)
        for size in range(1, 7)
        for bag in combinations_with_replacement(range(3), size)
    )
    singles = [slow_score(data, [m], score) for m in range(3)]
    assert max(singles) <= found <= best + 1e-12
    assert found >= best - (0.005 if score == "nll" else 1)


def test_the_order_of_members_changes_no_bit_of_a_selection():
    data = samples(4, 80)
    for options in ({"rounds": 9}, {"bags": 5, "score": "accuracy", "rounds": 6}):
        weights = select_greedily(data, **options).weights
        for order in permutations(range(4)):
            found = select_greedily(reordered(data, order), **options).weights
            assert found == tuple(weights[m] for m in order)


def test_bags_see_a_share_of_the_members():
    data = samples(10, 60, quality=(0.1,) * 9 + (9.0,))
    alone = select_greedily(data).weights
    assert alone[9] == 1.0
    bagged = select_greedily(data, bags=40, fraction=0.5).weights
    assert sum(bagged) == pytest.approx(1)
    assert sum(weight > 0 for weight in bagged) > 5  # of bags without the best one
    assert select_greedily(data, bags=40).weights == bagged
    assert select_greedily(data, bags=40, seed=1).weights != bagged
    assert select_greedily(data, bags=3, fraction=1.0).weights == alone


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"bags": 0}, {"fraction": 0}, {"fraction": 1.1}])
def test_what_cannot_be_selected_is_said(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        select_greedily(samples(), **wrong)


def test_the_gate_keeps_what_is_near_the_best():
    data = samples(3, 400)
    accuracies = [(m.argmax(1) == data.labels).mean() for m in data.logits]
    margin = max(accuracies) - sorted(accuracies)[1]
    assert gate(data, 0.0) == (2,)
    assert gate(data, margin) == (1, 2)
    assert gate(data, 1.0) == (0, 1, 2)


def test_no_estimate_is_made_by_a_fit_that_saw_its_sample():
    data, seen = samples(n=97), []

    def fit(part):
        seen.append(set(part.keys))
        return Fitted((0, 1, 2), fit_temperature(part, Combination()))

    found = cross_fit(data, fit, folds=4)
    *parts, last = seen
    assert last == set(data.keys)
    missing = [set(data.keys) - part for part in parts]
    assert set.union(*missing) == set(data.keys)
    assert sum(map(len, missing)) == 97
    for held_out, fitted in zip(missing, found.by_fold, strict=True):
        rows = np.array([key in held_out for key in data.keys])
        p = fitted.apply(data.logits[:, rows])
        assert p.tobytes() == found.probabilities[rows].tobytes()
    assert found.fitted == fit(data)


def test_out_of_fold_figures_of_noise_promise_nothing():
    """Members and labels that know nothing of each other: whatever a fit finds, it made up."""
    generator = np.random.default_rng(0)
    logits = (0.5 * generator.normal(size=(4, 200, 3))).astype(np.float32)
    data = FitData(logits, np.arange(200) % 3, [f"{i}" for i in range(200)], "val")

    def fit(part):
        inner = fit_stack(part, folds=2)
        return Fitted((0, 1, 2, 3), fit_temperature(part, inner))

    found = cross_fit(data, fit, folds=3)
    assert nll(found.fitted.apply(data.logits), data.labels) < math.log(3)
    assert nll(found.probabilities, data.labels) > math.log(3)


@pytest.mark.parametrize(
    "method", ["mean", "logits", "vote", "weights", "greedy", "stack", "boost"]
)
def test_all_of_it_in_order(method):
    data = samples(4, 200, quality=(0.1, 2.0, 2.2, 2.4))
    fitted = fit_ensemble(data, method, margin=0.2, coverage=0.8)
    assert set(fitted.members) <= {1, 2, 3}
    whole = fitted.combination
    assert whole.temperature != 1
    assert whole.weights is None or min(whole.weights) > 0
    p = fitted.apply(data.logits)
    inner = data.of_members(fitted.members)
    assert whole.accepted(p).mean() >= 0.8
    again = fit_temperature(inner, replace(whole, temperature=1.0, reject_below=None))
    assert again.temperature == whole.temperature
    if method == "weights":
        assert fit_weights(inner).weights == pytest.approx(whole.weights, abs=1e-3)


def test_rejection_is_estimated_out_of_fold():
    data = samples(n=200)
    found = cross_fit(data, lambda part: fit_ensemble(part, coverage=0.5))
    assert isinstance(found, CrossFitted)
    assert 0.35 < found.accepted.mean() < 0.65
    confident, rest = found.accepted, ~found.accepted
    right = found.probabilities.argmax(1) == data.labels
    assert right[confident].mean() > right[rest].mean()


def test_an_unknown_method_is_said():
    with pytest.raises(ValueError, match="median"):
        fit_ensemble(samples(), "median")
