"""Pictures of statistics: what they say, whose colours they take, and odd input."""

import json
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from bigbatch.trainers.evaluation.statistics import summarise
from bigbatch.trainers.report.evaluation_plots import pictures
from tests.helpers.predictions import predictions


def statistics(names: list[str], samples: int = 300, **options: Any) -> dict[str, Any]:
    """As they come back from a file."""
    members, labels = predictions(samples, 6, members=len(names))
    said = summarise(labels, members.mean(axis=0), members, names=names, **options)
    found: dict[str, Any] = json.loads(json.dumps(said))
    return found


def words(svg: str) -> list[str]:
    return [
        "".join(e.itertext()).strip() for e in ElementTree.fromstring(svg).iter() if "text" in e.tag
    ]


def test_figures_stand_in_the_pictures():
    said = statistics(["a", "b", "c"], temperature=0.7)
    reliability, coverage, by_number, disagreement = map(words, pictures(said))
    assert f"Accuracy by confidence, ECE {said['ece']:.3f}" in reliability
    assert f"before: ECE {said['before_temperature']['ece']:.3f}" in reliability
    assert "at temperature 0.7" in reliability
    assert (
        f"80% answered: {said['risk_coverage']['accuracy_at'][1]['accuracy']:.2%} right" in coverage
    )
    of_members = said["members"]
    assert f"{of_members['by_number'][-1]['accuracy']:.2%}" in by_number
    best = max(row["accuracy"] for row in of_members["each"])
    assert f"best member, {best:.2%}" in by_number
    assert f"{of_members['disagreement'][0][1]:.1%}" in disagreement
    assert f"{1 - of_members['each'][2]['accuracy']:.1%}" in disagreement
    assert [w for w in disagreement if w in "abc"] == ["a", "b", "c"] * 2


def test_colours_are_the_pages():
    for svg in pictures(statistics(["a", "b"], temperature=2.0)):
        assert "var(--blue)" in svg
        # Black or white left over would vanish in one of the two modes.
        assert not re.search(r"(fill|stroke): #", svg)


def test_identifiers_differ_between_pictures():
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in pictures(statistics(["a", "b"]))]
    assert sum(map(len, ids)) == len(set.union(*ids))


def test_names_from_outside_stay_text():
    svg = pictures(statistics(["<script>$x$", "b"]))[-1]
    assert "<script" not in svg
    assert "<script>$x$" in words(svg)


@pytest.mark.parametrize("names", [["only"], []])
def test_one_model_has_no_pictures_of_members(names):
    said = statistics(["only"], temperature=0.5)
    if not names:
        said["members"] = None
    assert len(pictures(said)) == 2


def test_many_members_stay_small():
    svg = pictures(statistics([f"run-{i}/a-rather-long-name-of-a-snapshot" for i in range(40)], 30))
    assert len(svg[-1]) < 1_000_000
    assert "\u2026e-of-a-snapshot" in words(svg[-1])


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("right", [True, False])
def test_all_right_and_all_wrong(right):
    p = np.tile([1.0, 0.0], (20, 1))
    said = summarise(np.full(20, 0 if right else 1), p, np.stack([p, p]), names=["a", "b"])
    titles = [words(svg) for svg in pictures(said)]
    assert f"95% answered: {1 if right else 0:.2%} right" in titles[1]
    assert "best member, 100.00%" in titles[2] if right else "best member, 0.00%" in titles[2]
