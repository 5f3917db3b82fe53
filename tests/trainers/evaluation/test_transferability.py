"""The rule of transfer, and nearest neighbours against scikit-learn's."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from bigbatch.trainers.evaluation.transferability import Measured, advise, in_words, measure

NEAR = Measured(200, 64, 0.9, (0.85, 0.94), 0.1, 0.89)


def drawn(count: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = random.integers(0, 5, count)
    centres = random.normal(size=(5, 12))
    features = centres[labels] + noise * random.normal(size=(count, 12)) + 3.0
    return features.astype(np.float32), labels


@pytest.mark.parametrize("count", [7, 600])  # within a block, and over several
@pytest.mark.parametrize("noise", [0.1, 2.0])
def test_neighbours_are_scikit_learns(count: int, noise: float) -> None:
    features, labels = drawn(count, noise)
    found = measure(features, labels)
    centred = features - features.mean(0)
    nearest = KNeighborsClassifier(1, metric="cosine", algorithm="brute")
    if count < 100:
        said = cross_val_predict(nearest, centred, labels, cv=LeaveOneOut())
    else:  # the first neighbour is the sample itself
        _, order = nearest.fit(centred, labels).kneighbors(centred, 2)
        said = labels[order[:, 1]]
    assert found.accuracy == pytest.approx((said == labels).mean())
    same = np.triu(labels[:, None] == labels[None], 1).sum()
    assert found.chance == pytest.approx(same / (count * (count - 1) / 2))
    expected = (found.accuracy - found.chance) / (1 - found.chance)
    assert found.similarity == pytest.approx(max(0, expected))
    right = round(found.accuracy * count)
    found_interval = binomtest(right, count).proportion_ci(method="wilson")
    assert found.interval == pytest.approx(tuple(found_interval), abs=1e-4)


def test_features_that_say_nothing_are_no_nearer_than_chance() -> None:
    random = np.random.default_rng(1)
    labels = random.integers(0, 4, 2000)
    found = measure(random.normal(size=(2000, 8)).astype(np.float32), labels)
    assert found.similarity < 0.08
    one = measure(np.ones((3, 2), np.float32), np.zeros(3, np.int64))
    assert (one.chance, one.similarity) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("each", "similarity", "size", "keys"),
    [
        (20, 0.9, "small", ["transfer={name: head}"]),
        (20, 0.2, "small", ["transfer={name: head}", "model.joined_stages=[c, d]"]),
        (
            100,
            0.5,
            "large",
            ["transfer={name: gradual, every: 1 epochs, stage_decay: 0.385}"],
        ),
        (100, 0.49, "large", ["transfer=null"]),
    ],
)
def test_the_four_cases(each: int, similarity: float, size: str, keys: list[str]) -> None:
    measured = replace(NEAR, similarity=similarity)
    found = advise(measured, [each, each, 0, 10 * each], 100, ["a", "b", "c", "d"])
    assert found["size"] == size
    assert found["similarity"] == ("similar" if similarity >= 0.5 else "different")
    assert (found["classes"], found["samples_of_a_class"], found["keys"]) == (3, each, keys)
    text = "\n".join(in_words(found, "mine"))
    assert all(key in text for key in keys)
    assert "agree in 90.0% (85.0% to 94.0%) of 200 samples, by chance in 10.0%" in text


def test_an_interval_across_the_border_is_said() -> None:
    found = advise(replace(NEAR, interval=(0.5, 0.6), similarity=0.5), [10], 100, [])
    assert not found["clear"]
    assert "the interval leaves it open" in "\n".join(in_words(found, "mine"))
    assert advise(NEAR, [10], 100, [])["clear"]
