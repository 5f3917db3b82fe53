"""Risk and coverage against brute force over the order of equals."""

from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.trainers.evaluation.selective import fit_threshold, risk_coverage

ANSWERS = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=30)
FEW = st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6)


def columns(answers):
    return np.array([c / 4 for c, _ in answers]), np.array([right for _, right in answers])


@given(ANSWERS)
def test_points_are_those_of_each_threshold(answers):
    confidence, correct = columns(answers)
    curve = risk_coverage(confidence, correct)
    assert curve.thresholds.tolist() == sorted(set(confidence), reverse=True)
    for threshold, coverage, risk in zip(curve.thresholds, curve.coverage, curve.risk, strict=True):
        answered = confidence >= threshold
        assert coverage == answered.mean()
        assert risk == pytest.approx((~correct)[answered].mean())


@given(FEW)
def test_areas_are_means_over_all_orders_of_equals(answers):
    confidence, correct = columns(answers)
    n = len(answers)
    areas, halfway = [], []
    for order in permutations(range(n)):
        places = list(order)
        if all(confidence[a] >= confidence[b] for a, b in pairwise(places)):
            risks = np.cumsum(~correct[places]) / np.arange(1, n + 1)
            areas.append(risks.mean())
            halfway.append(1 - risks[-(-n // 2) - 1])
    curve = risk_coverage(confidence, correct)
    assert curve.aurc == pytest.approx(np.mean(areas))
    assert curve.accuracy_at(0.5) == pytest.approx(np.mean(halfway))


@given(ANSWERS)
def test_no_confidence_beats_right_answers_first(answers):
    confidence, correct = columns(answers)
    best = risk_coverage(correct.astype(float), correct)
    assert best.excess_aurc == pytest.approx(0, abs=1e-12)
    curve = risk_coverage(confidence, correct)
    assert curve.excess_aurc == pytest.approx(curve.aurc - best.aurc)
    assert curve.excess_aurc >= -1e-12
    assert curve.accuracy_at(1.0) == pytest.approx(correct.mean())


def test_the_drawn_curve_ends_at_all_samples():
    confidence = np.linspace(1, 0, 250)
    coverage, risk = risk_coverage(confidence, np.arange(250) < 200).curve(100)
    assert len(coverage) == 100
    assert coverage[-1] == 1
    assert risk[-1] == pytest.approx(0.2)
    assert (risk[:80] == 0).all()
    few, _ = risk_coverage(confidence[:3], np.ones(3, bool)).curve(100)
    assert few.tolist() == [1 / 3, 2 / 3, 1]


@given(ANSWERS, st.sampled_from([0.0, 0.1, 0.25, 0.5]))
def test_a_threshold_keeps_its_risk_and_none_lower_does(answers, risk):
    confidence, correct = columns(answers)

    def kept(threshold):
        return (~correct)[confidence >= threshold].mean() <= risk

    found = fit_threshold(confidence, correct, risk)
    if found is None:
        assert not any(kept(c) for c in confidence)
    else:
        assert kept(found)
        assert not any(kept(c) for c in confidence[confidence < found])


def test_what_has_no_answer():
    with pytest.raises(ValueError, match="need samples"):
        risk_coverage(np.empty(0), np.empty(0, bool))
    with pytest.raises(ValueError, match="coverage 0"):
        risk_coverage(np.ones(1), np.ones(1, bool)).accuracy_at(0.0)
