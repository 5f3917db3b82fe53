"""Progressive resizing: which step sees which size."""

from fractions import Fraction
from math import floor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.trainers.planning.sizes import image_sizes


def sizes(start: object, last: object, after: str, until: str, multiple: int = 32) -> tuple:
    grows = f"{{start: {start}, after: {after}, until: {until}, multiple: {multiple}}}"
    recipe = load_recipe(
        "digits", [f"data.image_size={last}", f"data.progressive={grows}", "duration=200 steps"]
    )
    return image_sizes(recipe, 2560)  # 10 steps of 256 in an epoch


def test_sides_are_those_of_ffcv() -> None:
    """160 to 192 from epoch 65 to 76 of 88, and 96 to 224: multiples of 32."""
    assert sizes(160, 192, "65 steps", "76 steps") == ((0, 160), (71, 192))
    # 96 + 128 (s / 160), rounded at 112, 144, 176 and 208.
    assert sizes(96, 224, "0 steps", "16 epochs") == (
        (0, 96), (20, 128), (60, 160), (100, 192), (140, 224),
    )  # fmt: skip


@given(
    start=st.integers(8, 200),
    more=st.integers(1, 200),
    after=st.integers(0, 100),
    length=st.integers(1, 99),
    multiple=st.integers(1, 64),
)
def test_each_step_has_the_size_of_the_line(
    start: int, more: int, after: int, length: int, multiple: int
) -> None:
    last, until = start + more, after + length
    found = sizes(start, last, f"{after} steps", f"{until} steps", multiple)
    assert found[-1][1] == last
    assert found[0] == (0, start)
    assert [s for s, _ in found] == sorted({s for s, _ in found})
    for step in range(200):
        size = [s for first, s in found if first <= step][-1]
        line = start + Fraction(more * min(max(step - after, 0), length), length)
        nearest = floor(line / multiple + Fraction(1, 2)) * multiple
        wanted = min(max(nearest, start), last)
        assert size == (start if step <= after else last if step >= until else wanted)


def test_a_run_reaches_its_size_or_is_refused() -> None:
    assert image_sizes(load_recipe("digits"), 2560) == ()
    for after, until in (("5 steps", "5 steps"), ("0 steps", "20 epochs")):
        with pytest.raises(UserError, match=r"data.progressive grows from step .* of 200: it has"):
            sizes(96, 224, after, until)
    with pytest.raises(UserError, match=r"data.progressive.start = 64 is no smaller than data.im"):
        sizes(64, 64, "0 steps", "1 epochs")


def test_each_side_of_a_rectangle_grows() -> None:
    assert sizes("[16, 64]", "[32, 256]", "0 steps", "12 steps", 16) == (
        (0, (16, 64)), (1, (16, 80)), (2, (16, 96)), (3, (16, 112)), (4, (16, 128)),
        (5, (16, 144)), (6, (32, 160)), (7, (32, 176)), (8, (32, 192)), (9, (32, 208)),
        (10, (32, 224)), (11, (32, 240)), (12, (32, 256)),
    )  # fmt: skip
