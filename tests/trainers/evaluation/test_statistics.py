"""The dictionary of an evaluated split: its figures, what changes none, and strict JSON."""

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.trainers.evaluation import outcomes as module
from bigbatch.trainers.evaluation.calibration import fit_temperature, tempered
from bigbatch.trainers.evaluation.conformal import fit_sets
from bigbatch.trainers.evaluation.diversity import calibrated_curve, halves
from bigbatch.trainers.evaluation.metrics import confusion, score
from bigbatch.trainers.evaluation.statistics import Statistics, summarise
from tests.helpers.predictions import predictions, small_predictions

NAMES = ("cycle-01", "cycle-02", "cycle-03")


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves of a tree of plain values by their paths."""
    if isinstance(value, dict):
        items = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list):
        items = [(str(i), inner) for i, inner in enumerate(value)]
    else:
        return {path: value}
    return {k: v for key, inner in items for k, v in flat(inner, f"{path}/{key}").items()}


def test_the_figures_of_an_ensemble():
    members, labels = predictions(400, 8)
    held, rest = halves(400)
    ensemble = members.mean(axis=0)
    temperature = fit_temperature(ensemble[held], labels[held])
    rule = fit_sets(tempered(ensemble[held], temperature), labels[held], 0.9, "aps")
    said = summarise(
        labels[rest], ensemble[rest], members[:, rest],
        names=NAMES, temperature=temperature, sets=[rule], best="cycle-02",
        independent_nll=calibrated_curve(members[:, rest], labels[rest]),
    )  # fmt: skip
    served = tempered(ensemble[rest], temperature)
    scores = score(served, labels[rest])
    assert {key: said[key] for key in scores} == scores
    before = score(ensemble[rest], labels[rest])
    assert {k: said["before_temperature"][k] for k in ("nll", "brier", "ece")} == {
        k: before[k] for k in ("nll", "brier", "ece")
    }
    assert said["temperature"] == temperature
    assert said["nll"] < said["before_temperature"]["nll"]
    assert said["accuracy_interval"][0] < said["accuracy"] < said["accuracy_interval"][1]
    assert said["accuracy"] < said["top5"] <= 1
    right = np.diag(confusion(labels[rest], served.argmax(1), served.shape[1]))
    assert said["recall"] == pytest.approx(right / np.bincount(labels[rest]))
    assert said["balanced_accuracy"] == pytest.approx(np.mean(said["recall"]))
    assert sum(said["reliability"]["count"]) == said["samples"] == 200
    (sets,) = said["conformal"]
    assert sets["coverage"] == rule.sets(served)[np.arange(200), labels[rest]].mean()
    assert sets["mean_size"] == pytest.approx(rule.sets(served).sum(axis=1).mean())
    of_members = said["members"]
    for row, p in zip(of_members["each"], members[:, rest], strict=True):
        scores = score(p, labels[rest])
        del scores["balanced_accuracy"]  # a row of members has none
        assert {key: row[key] for key in scores} == scores
    last = of_members["by_number"][-1]
    assert last["accuracy"] == said["accuracy"]
    assert last["nll"] == pytest.approx(said["before_temperature"]["nll"])
    versus = of_members["against_best"]
    assert (versus["best"], versus["chosen_on"]) == ("cycle-02", "other samples")
    difference = said["accuracy"] - of_members["each"][1]["accuracy"]
    assert versus["accuracy"]["difference"] == pytest.approx(difference)
    low, high = versus["accuracy"]["interval"]
    assert low < difference < high
    counts = versus["mcnemar"]
    assert (counts["only_ensemble"] - counts["only_member"]) / 200 == pytest.approx(difference)
    assert said["deep_ensemble_equivalent"]["members"] == pytest.approx(3)


def test_in_pieces_as_at_once(monkeypatch):
    members, labels = predictions(60, 6)
    ensemble = members.mean(axis=0)
    rule = fit_sets(ensemble[:20], labels[:20], 0.8)
    options: dict[str, Any] = {"temperature": 0.7, "sets": [rule]}
    whole = summarise(labels, ensemble, members, names=NAMES, **options)
    monkeypatch.setattr(module, "_NUMBERS", 40)
    pieces = Statistics(6, members=NAMES, **options)
    for i in range(0, 60, 7):
        rows = slice(i, i + 7)
        pieces.add(labels[rows], ensemble[rows], members[:, rows])
    assert flat(pieces.summary()) == pytest.approx(
        {k: v for k, v in flat(whole).items() if k != "/deep_ensemble_equivalent"}
    )
    rows = pieces.confusion()
    matrix = np.zeros((6, 6), np.int64)
    matrix[rows[:, 0], rows[:, 1]] = rows[:, 2]
    assert (matrix == confusion(labels, tempered(ensemble, 0.7).argmax(1), 6)).all()


def test_the_order_of_members_only_moves_their_rows():
    members, labels = predictions(150, 4)
    order = [2, 0, 1]
    ensemble = members.mean(axis=0)
    one = summarise(labels, ensemble, members, names=NAMES)
    other = summarise(labels, ensemble, members[order], names=[NAMES[i] for i in order])
    of_one, of_other = one.pop("members"), other.pop("members")
    assert one == other
    assert [of_one["each"][i] for i in order] == of_other["each"]
    assert of_one["against_best"] == of_other["against_best"]
    for key in ("disagreement", "q_statistic", "double_fault"):
        moved = np.array(of_one[key], float)[np.ix_(order, order)]
        assert moved == pytest.approx(np.array(of_other[key], float), nan_ok=True)
    for a, b in zip(of_one["by_number"], of_other["by_number"], strict=True):
        assert flat(a) == pytest.approx(flat(b))


def test_the_order_of_classes_only_moves_their_rows():
    (p,), labels = predictions(150, 7, members=1)
    new = np.random.default_rng(0).permutation(7)
    moved = np.empty_like(p)
    moved[:, new] = p
    one, other = summarise(labels, p), summarise(new[labels], moved)
    assert one.pop("recall") == [other["recall"][i] for i in new]
    assert one.pop("class_samples") == [other["class_samples"][i] for i in new]
    for said in (one, other):
        del said["mistakes"]
    del other["recall"], other["class_samples"]
    assert flat(one) == pytest.approx(flat(other))


def test_one_member_is_the_ensemble():
    members, labels = predictions(50, 3, members=1)
    said = summarise(labels, members[0], members, names=["only"])
    versus = said["members"]["against_best"]
    assert (versus["best"], versus["chosen_on"]) == ("only", "these samples")
    assert versus["accuracy"] == versus["nll"] == {"difference": 0.0, "interval": [0.0, 0.0]}
    assert versus["mcnemar"]["p_value"] == 1.0
    assert said["members"]["disagreement"] == [[0.0]]
    assert len(said["members"]["by_number"]) == 1


@settings(max_examples=12)
@given(small_predictions(members=2), st.booleans())
def test_strict_json_of_whatever_there_is(drawn, all_right):
    members, labels = drawn
    if all_right:
        labels = members.mean(axis=0).argmax(axis=1)
    rule = fit_sets(members[0], labels, 0.999)  # too few samples: an infinite threshold
    said = summarise(
        labels, members.mean(axis=0), members,
        names=["a", "b"], temperature=0.5, sets=[rule], independent_nll=[0.5],
    )  # fmt: skip
    assert json.loads(json.dumps(said, allow_nan=False)) == said
    assert said["top5"] is None
    assert said["conformal"][0]["threshold"] is None
    assert said["conformal"][0]["coverage"] == 1
    assert said["deep_ensemble_equivalent"]["members"] is None
    absent = set(range(members.shape[2])) - set(labels.tolist())
    assert {c for c, recall in enumerate(said["recall"]) if recall is None} == absent


def test_answers_below_a_threshold_are_not_counted():
    p, labels = np.array([[0.9, 0.1], [0.3, 0.7], [0.4, 0.6]]), np.array([0, 0, 0])
    for below, coverage, accuracy in ((0.0, 1.0, 1 / 3), (0.7, 2 / 3, 0.5), (0.95, 0.0, None)):
        found = summarise(labels, p, reject_below=below)["rejection"]
        assert (found["below"], found["coverage"], found["accuracy"]) == (below, coverage, accuracy)
        assert (found["accuracy_interval"] is None) == (accuracy is None)


def test_what_is_not_given_is_null():
    (p,), labels = predictions(30, 3, members=1)
    said = summarise(labels, p.astype(np.float32))
    for key in ("members", "conformal", "rejection", "temperature", "before_temperature"):
        assert said[key] is None


def test_what_does_not_fit_together_is_refused():
    members, labels = predictions(10, 3)
    statistics = Statistics(3, members=NAMES)
    with pytest.raises(ValueError, match="3 classes and 0 members"):
        statistics.add(labels, members[0])
    with pytest.raises(ValueError, match="2 members"):
        statistics.add(labels, members[0], members[:2])
    with pytest.raises(ValueError, match="2 classes"):
        statistics.add(labels, members[0, :, :2], members)
    with pytest.raises(ValueError, match="need samples"):
        statistics.summary()
    with pytest.raises(ValueError, match="sum to 1"):
        statistics.add(labels, np.log(members[0]), members)


def test_many_classes_need_no_square():
    """A hundred thousand classes: the square would be 80 GB."""
    labels = np.array([0, 99_999])
    p = np.full((2, 100_000), 0.1 / 99_999)
    p[[0, 1], [0, 5]] = 0.9
    said = summarise(labels, p, p[None], names=["a"])
    assert said["mistakes"] == [[99_999, 5, 1]]
    assert said["balanced_accuracy"] == 0.5


def test_memory_is_that_of_a_few_chunks(monkeypatch):
    monkeypatch.setattr(module, "_NUMBERS", 2**14)  # 128 KB
    generator = np.random.default_rng(0)
    members = generator.random((2, 1000, 1000)).astype(np.float32)
    members /= members.sum(axis=2, keepdims=True)
    ensemble, labels = members[0].astype(np.float64), generator.integers(0, 1000, 1000)
    rule = fit_sets(ensemble[:50], labels[:50], 0.5, "aps")
    tracemalloc.start()
    summarise(labels, ensemble, members, names=["a", "b"], temperature=0.8, sets=[rule])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < ensemble.nbytes / 2  # of which most are the sums of 1,000 classes
