"""Outcomes by sample: kept bit for bit, joined by key, compared as brute force does."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from bigbatch.configs import files
from bigbatch.data.rng import uniforms
from bigbatch.trainers.evaluation import by_sample
from bigbatch.trainers.evaluation.by_sample import (
    OUTCOMES,
    BySample,
    compare_by_sample,
    read_outcomes,
    write_outcomes,
)
from bigbatch.trainers.evaluation.outcomes import Outcomes, outcomes
from bigbatch.trainers.evaluation.paired import DRAWS
from bigbatch.trainers.recovery.stored import measure
from tests.helpers.predictions import predictions

N, CLASSES = 60, ("cat", "dog", "owl", "yak")
KEYS = [f"k{i:03d}" for i in range(N)]
MEMBERS, LABELS = predictions(N, len(CLASSES), members=2)


def kept(
    folder: Path, member: int, rows: Any = slice(None), classes: Any = CLASSES, labels: Any = LABELS
) -> BySample:
    """What is written of some rows, in their order, and read again."""
    found = outcomes(MEMBERS[member][rows], labels[rows])
    return read_outcomes(folder, write_outcomes(folder, np.array(KEYS)[rows], classes, found))


def test_what_is_written_is_read_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = outcomes(MEMBERS[0], LABELS)
    whole = write_outcomes(tmp_path / "whole", KEYS, CLASSES, found)
    monkeypatch.setattr(by_sample, "_ROWS", 7)
    digest = write_outcomes(tmp_path / "new" / "e", KEYS, CLASSES, found)
    assert digest != whole  # other row groups
    rows = pq.read_table(tmp_path / "new" / "e" / OUTCOMES).to_pylist()
    assert rows[17] == {
        "key": "k017", "target": CLASSES[LABELS[17]], "label": CLASSES[found.predicted[17]],
        "p_target": MEMBERS[0][17, LABELS[17]],
    }  # fmt: skip
    for folder, sha256 in ((tmp_path / "whole", whole), (tmp_path / "new" / "e", digest)):
        again = read_outcomes(folder, sha256)
        assert again.keys.to_pylist() == KEYS
        assert (again.correct == found.correct).all()
        assert (again.losses == found.losses).all()
        assert [path.name for path in folder.iterdir()] == [OUTCOMES]


def test_classes_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """As ImageNet's two cranes: the other one is a wrong answer."""
    found = outcomes(np.array([[0.9, 0.1], [0.9, 0.1]]), np.array([0, 1]))
    own = read_outcomes(tmp_path, write_outcomes(tmp_path, ["a", "b"], ("crane", "crane"), found))
    assert own.targets.to_pylist() == ["crane #0", "crane #1"]
    assert own.correct.tolist() == [True, False]


def by_hand(a: BySample, b: BySample) -> dict[str, Any]:
    """The same by dictionaries, sums, counted coins, and samples drawn one by one."""
    ours = dict(zip(a.keys.to_pylist(), zip(a.correct, a.losses, strict=True), strict=True))
    theirs = dict(zip(b.keys.to_pylist(), zip(b.correct, b.losses, strict=True), strict=True))
    both = sorted(ours.keys() & theirs.keys())
    n = len(both)
    result: dict[str, Any] = {"samples": {"both": n, "A": len(ours) - n, "B": len(theirs) - n}}
    for place, name in enumerate(("accuracy", "nll")):
        one, other = ([float(side[k][place]) for k in both] for side in (ours, theirs))
        means = []
        for draw in range(DRAWS):
            picked = [int(u * n) for u in uniforms((n,), 0, "bootstrap", draw).tolist()]
            means.append(math.fsum(other[i] - one[i] for i in picked) / n)
        means.sort()
        ends = []
        for share in (0.025, 0.975):  # between the two order statistics beside it
            at = share * (DRAWS - 1)
            low = math.floor(at)
            ends.append(means[low] + (at - low) * (means[low + 1] - means[low]))
        figures = (math.fsum(one) / n, math.fsum(other) / n)
        result[name] = dict(zip("AB", figures, strict=True))
        result[name] |= {"difference": figures[1] - figures[0], "interval": ends}
    first = sum(bool(ours[k][0]) and not theirs[k][0] for k in both)
    second = sum(bool(theirs[k][0]) and not ours[k][0] for k in both)
    coins, few = first + second, min(first, second)
    tail = sum(Fraction(math.comb(coins, k), 2**coins) for k in range(few + 1))
    p = float(min(Fraction(1), 2 * tail))
    return result | {"mcnemar": {"only_A": first, "only_B": second, "p_value": p}}


def flat(found: dict[str, Any]) -> list[float]:
    return [
        x
        for part in found.values()
        for value in part.values()
        for x in (value if isinstance(value, list) else [value])
    ]


def test_the_comparison_is_that_of_brute_force(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    a = kept(tmp_path / "a", 0, generator.permutation(N)[:50])
    b = kept(tmp_path / "b", 1, generator.permutation(N)[:45])
    found, wanted = compare_by_sample(a, b), by_hand(a, b)
    assert found["samples"] == wanted["samples"]
    assert min(found["samples"].values()) > 0
    assert {k: list(v) for k, v in found.items()} == {k: list(v) for k, v in wanted.items()}
    assert flat(found) == pytest.approx(flat(wanted), rel=1e-9, abs=1e-12)
    low, high = found["nll"]["interval"]
    assert low < found["nll"]["difference"] < high


def test_neither_order_nor_who_is_first_changes_what_is_found(tmp_path: Path) -> None:
    a, b = kept(tmp_path / "a", 0), kept(tmp_path / "b", 1)
    found = compare_by_sample(a, b)
    order = np.random.default_rng(2).permutation(N)
    assert compare_by_sample(a, kept(tmp_path / "c", 1, order)) == found
    assert compare_by_sample(kept(tmp_path / "d", 0, order), kept(tmp_path / "e", 1)) == found
    turned = compare_by_sample(b, a)
    for name in ("accuracy", "nll"):
        assert turned[name]["difference"] == -found[name]["difference"]
        low, high = turned[name]["interval"]
        assert [-high, -low] == pytest.approx(found[name]["interval"], rel=1e-12)
    assert turned["mcnemar"]["p_value"] == found["mcnemar"]["p_value"]
    same = compare_by_sample(a, a)
    assert same["nll"]["interval"] == [0, 0]
    assert same["mcnemar"] == {"only_A": 0, "only_B": 0, "p_value": 1.0}


def test_classes_are_compared_by_their_names(tmp_path: Path) -> None:
    """Numbered the other way round in B, whose probabilities go by its own numbers."""
    a = kept(tmp_path / "a", 0)
    found = outcomes(MEMBERS[0][:, ::-1], len(CLASSES) - 1 - LABELS)
    b = read_outcomes(tmp_path, write_outcomes(tmp_path, KEYS, CLASSES[::-1], found))
    same = compare_by_sample(a, b)
    assert same["accuracy"]["difference"] == same["nll"]["difference"] == 0


def test_other_samples_and_other_targets_are_refused(tmp_path: Path) -> None:
    a = kept(tmp_path / "a", 0, slice(0, 30))
    with pytest.raises(ValueError, match="no key of A is one of B"):
        compare_by_sample(a, kept(tmp_path / "b", 1, slice(30, N)))
    other = LABELS.copy()
    other[[7, 9, 50]] = (other[[7, 9, 50]] + 1) % len(CLASSES)
    b = kept(tmp_path / "c", 1, slice(None, None, -1), labels=other)
    says = (
        f"2 of 30 keys stand for another target in A than in B, such as k007: "
        f"{CLASSES[LABELS[7]]} in A, {CLASSES[other[7]]} in B"
    )
    with pytest.raises(ValueError, match=says):
        compare_by_sample(a, b)


def test_outcomes_of_something_else_are_refused(tmp_path: Path) -> None:
    found = outcomes(MEMBERS[0], LABELS)
    sha256 = write_outcomes(tmp_path, KEYS, CLASSES, found)
    path = tmp_path / OUTCOMES
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not what evaluation\.json was written with"):
        read_outcomes(tmp_path, sha256)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_outcomes(tmp_path, sha256)
    sha256 = write_outcomes(tmp_path, ["twice"] * N, CLASSES, found)
    with pytest.raises(ValueError, match="has a key twice"):
        read_outcomes(tmp_path, sha256)
    pq.write_table(pq.read_table(path).drop(["label"]), path)
    with pytest.raises(ValueError, match="has other columns than key, target, label, p_target"):
        read_outcomes(tmp_path, str(measure(path)["sha256"]))
    path.write_bytes(b"no Parquet")
    with pytest.raises(ValueError, match="is none") as caught:
        read_outcomes(tmp_path, str(measure(path)["sha256"]))
    assert "\n" not in str(caught.value)


def test_a_disk_that_refuses_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: Outcomes = outcomes(MEMBERS[0], LABELS)
    sha256 = write_outcomes(tmp_path, KEYS, CLASSES, found)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        write_outcomes(tmp_path, KEYS[::-1], CLASSES, found)
    assert read_outcomes(tmp_path, sha256).keys[0].as_py() == KEYS[0]
    assert [path.name for path in tmp_path.iterdir()] == [OUTCOMES]
