"""Strength of augmentation by class, from the numbers of training samples."""

import numpy as np
import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.trainers.planning.strength import class_strengths
from tests.data.test_order import index_of

CLASSES = ("a", "b", "c", "d")


def strengths(value: str) -> tuple[float, ...] | None:
    recipe = load_recipe("digits", [f"augment.class_strength={value}", "augment.ops=[invert]"])
    return class_strengths(recipe, CLASSES, index_of((100, 25, 0, 4)))


def test_rare_classes_are_augmented_most() -> None:
    assert strengths("null") is None
    found = strengths("{alpha: 0.5, least: 0.25}")
    assert found == pytest.approx((0.25, (4 / 25) ** 0.5, 1, 1))
    assert strengths("{alpha: 1, least: 0}") == pytest.approx((0.04, 0.16, 1, 1))
    assert np.isclose(strengths("{}") or 0, (0.2, 0.4, 1, 1)).all()
    assert strengths("[0.1, 0.2, 0.3, 1]") == (0.1, 0.2, 0.3, 1)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["augment.class_strength={}"], "there are none but geometric ones, which it leaves out"),
        (
            ["augment.class_strength={}", "augment.ops=[rotate]"],
            "it, or add operations, such as randaugment",
        ),
        (["augment.class_strength=[1, 2]", "augment.ops=[invert]"], "less than or equal to 1"),
        (
            ["augment.class_strength={}", "augment.ops=[invert]", "data.stream=[a.tar]"],
            "a stream has no index to count them by; give a list",
        ),
    ],
)
def test_what_it_cannot_be_is_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_recipe("digits", ["augment.jitter=null", *overrides])


def test_a_list_has_a_number_for_each_class() -> None:
    with pytest.raises(UserError, match="class_strength has 2 values, and the data 4 classes"):
        strengths("[1, 0.5]")
