"""What decides and what is reported stay apart."""

from collections import Counter

import numpy as np
import pytest

from bigbatch.configs.errors import UserError
from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.ensemble.fit import (
    fit_boosted,
    fit_joined,
    fit_rejection,
    fit_stack,
    fit_temperature,
    fit_weights,
)
from bigbatch.trainers.ensemble.held_out import (
    FitData,
    ReportData,
    fold_of,
    report,
)
from bigbatch.trainers.ensemble.selection import (
    cross_fit,
    fit_ensemble,
    gate,
    select_greedily,
)
from tests.trainers.ensemble.held_out_samples import samples, to_report


@pytest.mark.parametrize("name", ["test", "TEST", " Test "])
def test_a_test_split_is_nothing_to_fit_on(name):
    with pytest.raises(UserError, match="validation split"):
        samples(split=name)


FITS = {
    "fit_weights": fit_weights,
    "fit_temperature": lambda data: fit_temperature(data, Combination()),
    "fit_rejection": lambda data: fit_rejection(data, Combination(), 0.9),
    "fit_stack": fit_stack,
    "fit_boosted": fit_boosted,
    "fit_joined": lambda data: fit_joined(data.logits[0], data),
    "gate": lambda data: gate(data, 0.1),
    "select_greedily": select_greedily,
    "cross_fit": lambda data: cross_fit(data, fit_ensemble),
    "fit_ensemble": fit_ensemble,
}


@pytest.mark.parametrize("name", FITS)
def test_no_fit_takes_what_is_reported(name):
    with pytest.raises(TypeError, match="not ReportData"):
        FITS[name](to_report())


@pytest.mark.parametrize("name", FITS)
def test_nothing_is_fitted_on_no_samples(name):
    with pytest.raises(UserError, match=r"no sample"):
        FITS[name](samples(n=0))


def test_a_sample_that_decided_is_not_reported():
    fitted_on, data = samples(), to_report()
    p = report(Combination(), fitted_on, data)
    assert p.tobytes() == Combination().apply(data.logits).tobytes()
    keys = [*data.keys[:-1], fitted_on.keys[7]]
    leaky = ReportData(data.logits, data.labels, keys, "test")
    with pytest.raises(UserError, match=r"1 samples, such as 'val/00007', are in 'val'.* 'test'"):
        report(Combination(), fitted_on, leaky)


LOGITS, LABELS, KEYS = np.zeros((2, 3, 4), np.float32), np.array([0, 1, 3]), ["a", "b", "c"]


@pytest.mark.parametrize(
    ("logits", "labels", "keys", "said"),
    [
        (LOGITS[0], LABELS, KEYS, r"shape \(3, 4\)"),
        (LOGITS[:0], LABELS, KEYS, r"shape \(0, 3, 4\)"),
        (np.float32([0, np.nan])[:, None, None] + LOGITS, LABELS, KEYS, "member 1 has a logit"),
        (LOGITS, LABELS[:2], KEYS, "3 samples, labels of shape"),
        (LOGITS, LABELS, KEYS[:2], "2 keys do not belong together"),
        (LOGITS, LABELS + 1, KEYS, "labels 1 to 4; they must be 0 to 3"),
        (LOGITS, LABELS - 1, KEYS, "labels -1 to 2"),
        (LOGITS, LABELS, ["a", "b", "a"], "'a' is 2 times in 'val'"),
    ],
)
def test_what_cannot_belong_together_is_refused(logits, labels, keys, said):
    for data in (FitData, ReportData):
        with pytest.raises(ValueError, match=said):
            data(logits, labels, keys, "val")


def test_folds_go_by_key_and_by_nothing_else():
    data = samples(n=103)
    fold = dict(zip(data.keys, fold_of(data, 5, seed=3).tolist(), strict=True))
    order = np.random.default_rng(1).permutation(103)
    shuffled = data.rows(order)
    assert shuffled.keys == [data.keys[i] for i in order]
    again = dict(zip(shuffled.keys, fold_of(shuffled, 5, seed=3).tolist(), strict=True))
    assert again == fold
    other = fold_of(data, 5, seed=4).tolist()
    assert other != list(fold.values())


@pytest.mark.parametrize("folds", [2, 3, 5, 10])
def test_folds_are_even_and_stratified(folds):
    data = samples(n=106, classes=7)
    fold = fold_of(data, folds, seed=0)
    sizes = np.bincount(fold, minlength=folds)
    assert sizes.max() - sizes.min() <= 1
    for label in range(7):
        shares = Counter(fold[data.labels == label].tolist())
        assert max(shares.values()) - min(shares[f] for f in range(folds)) <= 1


def test_folds_want_samples():
    with pytest.raises(UserError, match="121 folds of 120 samples"):
        fold_of(samples(), 121, 0)
    with pytest.raises(UserError, match="1 folds of"):
        fold_of(samples(), 1, 0)
