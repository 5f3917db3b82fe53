"""evaluation.json: whatever is written is read back, and nothing else is."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.trainers.evaluation.conformal import fit_sets
from bigbatch.trainers.evaluation.record import EVALUATION, WORST, read_evaluation, write_evaluation
from bigbatch.trainers.evaluation.statistics import summarise
from bigbatch.trainers.evaluation.words import in_words
from tests.helpers.predictions import predictions, small_predictions

ABOUT = {"source": "shards/test", "notes": [], "member_names": ["a", "b", "c"], "tta": "none"}
COST = {"flops_per_image": 1820, "parameters": 12345, "images_per_s": 99.5, "peak_memory": 2**30}


def evaluation(seed: int = 0) -> dict[str, Any]:
    """One that has everything."""
    members, labels = predictions(200, 8, seed=seed)
    p = members.mean(axis=0)
    sets = [fit_sets(p, labels, 0.9, "lac")]
    said = summarise(
        labels, p, members, names="abc", temperature=0.8, sets=sets, reject_below=0.4, best="b"
    )
    return ABOUT | said | {"mistakes_drawn": 7, "cost": COST}


WHOLE = evaluation()


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from leaves(inner, (*path, key))


def test_what_is_written_is_read_and_said(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "test", WHOLE)
    found = read_evaluation(tmp_path / "test")
    assert found["nll"] == WHOLE["nll"]
    assert found["members"]["against_best"]["best"] == "b"
    assert "q_statistic" not in found["members"]
    said = in_words(found)
    assert said == in_words(WHOLE)
    pair, temperature, rejection, sets, cost = said
    assert temperature.startswith(f"temperature {WHOLE['temperature']:.3f}, in the ensemble's nll")
    assert pair.startswith("ensemble minus b: ")
    difference = WHOLE["accuracy"] - WHOLE["members"]["each"][1]["accuracy"]
    assert f"{100 * difference:+.2f} points" in pair
    assert f"{WHOLE['rejection']['accuracy']:.2%} of them right" in rejection
    assert f"{WHOLE['conformal'][0]['mean_size']:.2f} classes" in sets
    assert cost == (
        "cost: 0.00182 MFLOPs an image, 12,345 parameters, 100 images/s, peak memory 1,024 MiB"
    )


@settings(max_examples=12, deadline=None)
@given(small_predictions(members=2), st.sampled_from([0.01, 1.0, 3.0]))
def test_no_summary_is_refused(
    tmp_path_factory: pytest.TempPathFactory, drawn: Any, temperature: float
) -> None:
    members, labels = drawn
    said = summarise(
        labels, members.mean(axis=0), members, names="ab", temperature=temperature, reject_below=0.5
    )
    folder = tmp_path_factory.mktemp("e")
    write_evaluation(folder, ABOUT | said)
    assert in_words(read_evaluation(folder))


def test_one_hot_rows_that_rounding_leaves_above_one_are_no_damage(tmp_path: Path) -> None:
    p = np.array([[np.nextafter(1, 2), 0.0]] * 3)
    said = summarise(np.zeros(3, np.int64), p)
    assert min(said["nll"], said["brier"]) < 0
    write_evaluation(tmp_path, ABOUT | said)
    assert read_evaluation(tmp_path)["accuracy"] == 1


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(leaves(WHOLE))[1:]), st.sampled_from(
    [None, [], {}, "x", -1, 2, 1e300, True, [[]], [1], 10**30, "delete"]
))  # fmt: skip
def test_whatever_is_changed_is_refused_in_a_line_or_can_be_said(
    tmp_path_factory: pytest.TempPathFactory, path: tuple[str | int, ...], value: Any
) -> None:
    content = copy.deepcopy(WHOLE)
    inner: Any = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    if value == "delete":
        del inner[path[-1]]
    folder = tmp_path_factory.mktemp("e")
    (folder / EVALUATION).write_text(json.dumps(content))
    try:
        found = read_evaluation(folder)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert len(in_words(found)) >= 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "Invalid JSON"),
        (b"[]", "should be an object"),
        (b"\xff\xfe", "Invalid JSON"),
        (b"[" * 100_000, "Invalid JSON"),
        (json.dumps(WHOLE | {"nll": float("nan")}).encode(), "nll: Input should be a finite"),
        (json.dumps(WHOLE | {"accuracy": "0.9"}).encode(), "accuracy: Input should be a valid n"),
        (json.dumps(WHOLE | {"samples": 0}).encode(), "samples: Input should be greater than"),
        (json.dumps({k: v for k, v in WHOLE.items() if k != "source"}).encode(), "source: Field r"),
    ],
)
def test_damage_is_said_in_a_line(tmp_path: Path, text: bytes, reason: str) -> None:
    (tmp_path / EVALUATION).write_bytes(text)
    with pytest.raises(ValueError, match=reason) as caught:
        read_evaluation(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_picture_of_other_mistakes_goes(tmp_path: Path) -> None:
    (tmp_path / WORST).write_bytes(b"a picture")
    write_evaluation(tmp_path, WHOLE)
    assert (tmp_path / WORST).exists()
    write_evaluation(tmp_path, WHOLE | {"mistakes_drawn": 0})
    assert not (tmp_path / WORST).exists()
