"""Combinations against sums written out, and what holds for all of them."""

import dataclasses
import json
import math
import tracemalloc
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.special import log_softmax as scipy_log_softmax
from scipy.special import softmax as scipy_softmax

from bigbatch.trainers.ensemble.combination import (
    METHODS,
    TIE,
    Combination,
    selective_score,
)
from bigbatch.trainers.ensemble.trees import Trees
from bigbatch.trainers.evaluation import outcomes
from bigbatch.trainers.evaluation.metrics import softmax

WEIGHTS = (0.5, 0.3, 0.2)


def logits_of(members=3, samples=40, classes=4, seed=0, scale=3.0):
    generator = np.random.default_rng(seed)
    return (scale * generator.normal(size=(members, samples, classes))).astype(np.float32)


def stack_of(members=3, classes=4, seed=1):
    generator = np.random.default_rng(seed)
    coefficients = generator.normal(size=(classes, members * classes)).tolist()
    intercepts = tuple(generator.normal(size=classes).tolist())
    return Combination("stack", coefficients=tuple(map(tuple, coefficients)), intercepts=intercepts)


def trees_of(members=3, classes=4, seed=2):
    """Two trees a class, each of a root, an inner node and three leaves."""
    generator = np.random.default_rng(seed)
    count, features = 2 * classes, members * classes
    feature, left, right = [], [], []
    for root in range(0, 5 * count, 5):
        asked = generator.integers(0, features, 2).tolist()
        feature += [asked[0], asked[1], -1, -1, -1]
        left += [root + 1, root + 3, 0, 0, 0]
        right += [root + 2, root + 4, 0, 0, 0]
    number = generator.normal(size=5 * count) - np.tile([2, 2, 0, 0, 0], count)
    return Trees(
        features,
        tuple(generator.normal(size=classes).tolist()),
        tuple(range(0, 5 * count, 5)),
        tuple(k % classes for k in range(count)),
        *map(tuple, (feature, number.tolist(), left, right)),
    )


def walked(trees, row):
    """Scores of one row of features, node by node."""
    scores = list(trees.baseline)
    for node, output in zip(trees.roots, trees.outputs, strict=True):
        while trees.feature[node] >= 0:
            below = row[trees.feature[node]] <= trees.number[node]
            node = trees.left[node] if below else trees.right[node]
        scores[output] += trees.number[node]
    return scores


def changed(whole, **changes):
    return dataclasses.replace(whole, **changes)


def of(method, members=3, classes=4):
    if method == "stack":
        return stack_of(members, classes)
    if method == "boost":
        return Combination("boost", trees=trees_of(members, classes))
    weights = np.random.default_rng(members).dirichlet(np.ones(members)).tolist()
    return Combination(method, weights=tuple(weights) if method == "weights" else None)


def written_out(combination, logits):
    """The definition, sample by sample and class by class, summed exactly."""
    p = scipy_softmax(logits.astype(np.float64), axis=2)
    members, samples, classes = logits.shape
    rows = []
    for n in range(samples):
        match combination.method:
            case "mean":
                row = [math.fsum(p[:, n, c]) / members for c in range(classes)]
            case "weights":
                row = [math.fsum(combination.weights * p[:, n, c]) for c in range(classes)]
            case "logits":
                means = [math.fsum(logits[:, n, c].tolist()) / members for c in range(classes)]
                row = scipy_softmax(means)
            case "vote":
                votes = Counter(max(range(classes), key=lambda c: m[n, c]) for m in logits)
                mean = [math.fsum(p[:, n, c]) / members for c in range(classes)]
                row = [(votes[c] + TIE * mean[c]) / (members + TIE) for c in range(classes)]
            case "stack":
                inputs = np.concatenate([scipy_log_softmax(m[n].astype(float)) for m in logits])
                rules = zip(combination.coefficients, combination.intercepts, strict=True)
                row = scipy_softmax([math.fsum(a * inputs) + b for a, b in rules])
            case "boost":
                inputs = np.concatenate([scipy_log_softmax(m[n].astype(float)) for m in logits])
                row = scipy_softmax(walked(combination.trees, inputs))
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("method", METHODS)
def test_as_written_out(method):
    logits = logits_of()
    np.testing.assert_allclose(
        of(method).apply(logits), written_out(of(method), logits), rtol=1e-12, atol=1e-300
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_members_changes_no_bit(method):
    logits, whole = logits_of(4, samples=50), of(method, 4)
    expected = whole.apply(logits)
    for order in permutations(range(4)):
        permuted = whole
        if method == "weights":
            permuted = changed(whole, weights=tuple(whole.weights[m] for m in order))
        if method == "stack":
            blocks = np.array(whole.coefficients).reshape(4, 4, 4)[:, order].reshape(4, 16)
            permuted = changed(whole, coefficients=tuple(map(tuple, blocks.tolist())))
        if method == "boost":
            places = np.arange(16).reshape(4, 4)[list(order)].ravel().tolist()
            moved = tuple(-1 if f < 0 else places.index(f) for f in whole.trees.feature)
            permuted = changed(whole, trees=changed(whole.trees, feature=moved))
        assert permuted.apply(logits[list(order)]).tobytes() == expected.tobytes()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), method=st.sampled_from(METHODS), temperature=st.sampled_from([0.3, 1, 7]))
def test_rows_are_probabilities_whatever_the_logits(data, method, temperature):
    shape = data.draw(array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=5))
    numbers = st.floats(-(2.0**99), 2.0**99, width=32) | st.floats(-20, 20, width=32)
    logits = data.draw(arrays(np.float32, shape, elements=numbers))
    if method == "stack":  # within what doubles hold
        logits = np.clip(logits, -1e5, 1e5)
    p = changed(of(method, shape[0], shape[2]), temperature=temperature).apply(logits)
    assert p.shape == shape[1:]
    assert p.dtype == np.float64
    assert p.min() >= 0
    assert p.max() <= 1
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=0, atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(
    arrays(np.float32, (1, 7, 5), elements=st.floats(-300, 300, width=32)),
    st.sampled_from(["mean", "logits", "weights"]),
)
def test_one_member_gives_itself_bit_for_bit(logits, method):
    one = Combination(method, weights=(1.0,) if method == "weights" else None)
    assert one.apply(logits).tobytes() == softmax(logits[0]).tobytes()


def test_one_member_votes_for_its_own_class():
    logits = logits_of(1)
    assert (of("vote", 1).apply(logits).argmax(1) == logits[0].argmax(1)).all()


def test_a_weight_of_one_gives_that_member_bit_for_bit():
    logits = logits_of()
    chosen = Combination("weights", weights=(0.0, 1.0, 0.0)).apply(logits)
    assert chosen.tobytes() == softmax(logits[1]).tobytes()


def test_no_probability_is_above_one():
    """As a float32 mean of members has it: 10 weights of 0.1f add up to 1.0000001."""
    assert np.full(10, 0.1, np.float32).cumsum(dtype=np.float32)[-1] > 1
    logits = np.zeros((10, 1, 3), np.float32)
    logits[:, :, 1] = 200
    for method in METHODS[:4]:
        weights = (0.1,) * 10 if method == "weights" else None
        assert 1 - 1e-15 < Combination(method, weights=weights).apply(logits).max() <= 1
    # In float64 as well: these five, smallest first, make 1.0000000000000002.
    weights = tuple(w / 182 for w in (43, 25, 42, 42, 30))
    assert sum(sorted(weights)) / math.fsum(weights) > 1
    assert Combination("weights", weights=weights).apply(logits[:5]).max() == 1


def test_chunks_change_no_bit_and_no_row_is_lost(monkeypatch):
    logits = logits_of(3, samples=101)
    whole = [of(method).apply(logits) for method in METHODS[:4]]
    monkeypatch.setattr(outcomes, "_NUMBERS", 3 * 4 * 7)  # seven rows, and three at the end
    for method, expected in zip(METHODS[:4], whole, strict=True):
        assert of(method).apply(logits).tobytes() == expected.tobytes()


def test_memory_beside_the_result_does_not_grow_with_samples():
    logits = np.broadcast_to(logits_of(5, 1, 100), (5, 40_000, 100))
    tracemalloc.start()
    result = Combination().apply(logits)
    peak = tracemalloc.get_traced_memory()[1] - result.nbytes
    tracemalloc.stop()
    assert peak < result.nbytes  # 32 MB; all members at once take 160


def test_no_samples_give_no_rows():
    assert Combination().apply(np.zeros((2, 0, 3), np.float32)).shape == (0, 3)


def test_temperature_is_the_power_of_the_combined_probability():
    logits = logits_of()
    p = Combination().apply(logits) ** (1 / 2.5)
    hot = Combination(temperature=2.5).apply(logits)
    np.testing.assert_allclose(hot, p / p.sum(1, keepdims=True), rtol=1e-13)


def test_a_tie_of_votes_goes_to_the_likelier_class():
    logits = np.log(np.float32([[[0.4, 0.35, 0.25]], [[0.05, 0.9, 0.05]]]))
    p = Combination("vote").apply(logits)[0]
    assert p.argmax() == 1  # of two classes with a vote each
    np.testing.assert_allclose(p, [0.5, 0.5, 0], atol=1e-3)


@pytest.mark.parametrize("members", range(1, 9))
def test_a_majority_is_more_than_half_of_the_members(members):
    """Every number of votes for the first class, the others' divided or united, sure or not."""
    for votes in range(members + 1):
        for strength in (0.1, 50.0):
            logits = np.zeros((members, 2, 9), np.float32)
            logits[:votes, :, 0] = strength
            for member in range(votes, members):
                logits[member, 0, 1 + member % 8] = strength
                logits[member, 1, 1] = strength
            majority = Combination.majority(members)
            expected = [
                max(Counter(row.argmax(-1).tolist()).values()) > members / 2
                for row in logits.swapaxes(0, 1)
            ]
            assert majority.accepted(majority.apply(logits)).tolist() == expected


def test_rejection_and_coverage_by_hand():
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.5, 0.5]])
    labels = np.array([0, 0, 0, 1])
    accepted = Combination(reject_below=0.7).accepted(p)
    assert accepted.tolist() == [True, False, True, False]
    assert selective_score(p, labels, accepted) == {"coverage": 0.5, "accuracy": 0.5}
    assert Combination().accepted(p).all()
    none = Combination(reject_below=1.0).accepted(p)
    assert selective_score(p, labels, none) == {"coverage": 0.0, "accuracy": None}


@settings(max_examples=100, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    temperature=st.floats(1e-300, 1e300),
    reject=st.none() | st.floats(0, 1),
)
def test_json_keeps_every_bit(method, temperature, reject):
    whole = changed(of(method), temperature=temperature, reject_below=reject)
    assert Combination.from_json(json.loads(json.dumps(whole.to_json()))) == whole


DAMAGES = {
    "no mapping": (lambda c: [c], "its content = 'list'"),
    "a key too many": (lambda c: {**c, "extra": 1}, "extra"),
    "a key too few": (lambda c: {k: c[k] for k in c if k != "temperature"}, "temperature"),
    "a key that is no text": (lambda c: {**c, 1: 2}, "'1'"),
    "unknown method": (lambda c: {**c, "method": "median"}, "median"),
    "method of another type": (lambda c: {**c, "method": ["mean"]}, "method"),
    "no weights": (lambda c: {**c, "weights": None}, "weights = None"),
    "empty weights": (lambda c: {**c, "weights": []}, "weights"),
    "weights of sum 1.1": (lambda c: {**c, "weights": [0.5, 0.6]}, "of sum 1"),
    "a negative weight": (lambda c: {**c, "weights": [1.5, -0.5]}, "none below 0"),
    "a weight that is a text": (lambda c: {**c, "weights": ["1"]}, "weights = '1'"),
    "a weight that is a truth": (lambda c: {**c, "weights": [True]}, "weights = True"),
    "a weight that is NaN": (lambda c: {**c, "weights": [math.nan]}, "weights = nan"),
    "a weight beyond doubles": (lambda c: {**c, "weights": [10**400]}, "weights"),
    "weights of another method": (lambda c: {**c, "method": "mean"}, "only for it"),
    "temperature 0": (lambda c: {**c, "temperature": 0}, "above 0"),
    "no temperature": (lambda c: {**c, "temperature": None}, "temperature = None"),
    "a temperature whose inverse is none": (lambda c: {**c, "temperature": 1e-310}, "1e-310"),
    "infinite temperature": (lambda c: {**c, "temperature": math.inf}, "temperature = inf"),
    "threshold above 1": (lambda c: {**c, "reject_below": 1.01}, r"\[0, 1\]"),
    "threshold that is a text": (lambda c: {**c, "reject_below": "0.5"}, "reject_below"),
    "coefficients too": (lambda c: {**c, "coefficients": [[1.0]]}, "coefficients"),
}
STACK_DAMAGES = {
    "no intercepts": (lambda c: {**c, "intercepts": None}, "intercepts = None"),
    "an intercept too few": (lambda c: {**c, "intercepts": c["intercepts"][1:]}, "rows of"),
    "ragged": (lambda c: {**c, "coefficients": [*c["coefficients"][1:], [1.0]]}, "rows of"),
    "cut": (lambda c: {**c, "coefficients": [r[1:] for r in c["coefficients"]]}, "rows of"),
    "a row of null": (lambda c: {**c, "coefficients": [None] * 4}, "rows of"),
    "empty": (lambda c: {**c, "coefficients": []}, "coefficients"),
    "a number for a row": (lambda c: {**c, "coefficients": [1, 2]}, "coefficients = 1"),
    "a text for rows": (lambda c: {**c, "coefficients": "abcd"}, "coefficients = 'abcd'"),
}


def in_trees(**changes):
    return lambda c: {**c, "trees": {**c["trees"], **changes}}


TREE_DAMAGES = {
    "no trees": (lambda c: {**c, "trees": None}, "trees = None"),
    "trees of another kind": (lambda c: {**c, "trees": []}, "trees: must be a mapping"),
    "a column too many": (in_trees(extra=[]), "trees: must be a mapping"),
    "a column of texts": (in_trees(roots=["0"]), "trees: roots must be"),
    "a column that is none": (in_trees(number=1.0), "trees: number must be"),
    "a fraction for a node": (in_trees(left=[0.5]), "trees: left must be"),
    "a NaN": (in_trees(baseline=[math.nan] * 4), "trees: baseline has"),
    "an integer beyond all": (in_trees(right=[10**400]), "trees: right has"),
    "columns cut": (in_trees(left=[1]), "different lengths"),
    "a root that is not there": (in_trees(roots=[40] * 8), "out of range"),
    "a class that is not there": (in_trees(outputs=[4] * 8), "out of range"),
    "a feature that is not there": (in_trees(features=1), "out of range"),
    "a node that leads to itself": (in_trees(left=[0] * 40), "out of range"),
    "a node that leads nowhere": (in_trees(right=[40] * 40), "out of range"),
    "features of half a member": (in_trees(features=13), "of all classes of each member"),
    "features that are a truth": (in_trees(features=True), "features = True"),
    "no class": (in_trees(baseline=[], roots=[], outputs=[]), "of all classes of each member"),
}
WHOLES = {"stack": STACK_DAMAGES, "boost": TREE_DAMAGES, "weights": DAMAGES}


@pytest.mark.parametrize(
    ("method", "name"), [(method, name) for method, names in WHOLES.items() for name in names]
)
def test_damage_is_said(method, name):
    damage, said = WHOLES[method][name]
    plain = json.loads(json.dumps(of(method).to_json()))
    assert Combination.from_json(plain) == of(method)
    with pytest.raises(ValueError, match=said):
        Combination.from_json(damage(plain))


@pytest.mark.parametrize(
    ("logits", "said"),
    [
        (np.zeros((2, 5, 4), np.float32), "logits of 2 members; combined are 3"),
        (np.zeros((3, 5, 7), np.float32), "logits of 7 classes; combined are 4"),
        (np.zeros((5, 4), np.float32), r"shape \(5, 4\)"),
        (np.zeros((0, 5, 4), np.float32), r"shape \(0, 5, 4\)"),
        (np.zeros((3, 5, 4), np.int64), "int64"),
    ],
)
def test_logits_of_another_ensemble_are_refused(logits, said):
    with pytest.raises(ValueError, match=said):
        stack_of().apply(logits)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_is_named(bad, monkeypatch):
    monkeypatch.setattr(outcomes, "_NUMBERS", 3 * 4 * 7)
    logits = logits_of()
    logits[2, 31, 1] = bad
    with pytest.raises(ValueError, match=r"member 2 .* of sample 31"):
        Combination().apply(logits)


def test_how_many_members_it_is_for():
    assert Combination().members is None
    assert Combination("weights", weights=WEIGHTS).members == 3
    for whole in (of("stack", 5), of("boost", 5)):
        assert (whole.members, whole.classes) == (5, 4)
