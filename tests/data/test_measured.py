"""What a recipe leaves to be measured is a number in each run, and the same one for same shards."""

from pathlib import Path

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.identity import differences, recipe_hash
from bigbatch.configs.load import load_recipe, parse_recipe
from bigbatch.configs.rundir import create_run
from bigbatch.configs.schema import Recipe
from bigbatch.data import measured
from bigbatch.data.measured import as_in, measured_keys, with_measured
from bigbatch.data.writing.pixel_stats import measure


def asking(digits: Path, *overrides: str) -> Recipe:
    keys = (f"data.path={digits}", "augment={mean: measured, std: measured}", *overrides)
    return load_recipe("digits", keys)


def test_a_run_says_the_numbers_that_inspect_says(digits: Path, tmp_path: Path) -> None:
    found = measure(digits, channels=1).recipe(pca=False)["augment"]
    recipe = with_measured(asking(digits))
    assert (recipe.augment.mean, recipe.augment.std) == (found["mean"], found["std"])
    assert 0.2 < found["mean"][0] < 0.5  # no default
    run = create_run(tmp_path / "a", recipe)
    assert run.recipe() == recipe
    # As if the numbers had been written.
    numbers = [f"augment.mean={found['mean']}", f"augment.std={found['std']}"]
    written = load_recipe("digits", [f"data.path={digits}", *numbers])
    assert recipe_hash(written) == recipe_hash(recipe)
    assert measured_keys(asking(digits)) == tuple(numbers)
    assert measured_keys(written) == ()
    assert with_measured(written) is written


def test_one_of_both_may_be_written(digits: Path) -> None:
    recipe = with_measured(asking(digits, "augment.std=[0.5]"))
    assert recipe.augment.std == [0.5]
    assert recipe.augment.mean == with_measured(asking(digits)).augment.mean
    assert measured_keys(asking(digits, "augment.std=[0.5]"))[0].startswith("augment.mean=[0.")


def test_the_same_command_again_is_the_same_run(digits: Path) -> None:
    there, here = with_measured(asking(digits)), asking(digits)
    assert "augment.mean" in differences(there, here)[0]
    assert differences(there, as_in(there, here)) == []
    assert differences(there, as_in(there, asking(digits, "augment.std=[0.5]")))


def test_shards_are_looked_at_once(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_measured(asking(digits))
    monkeypatch.setattr("bigbatch.data.writing.pixel_stats.measure", None)
    assert with_measured(asking(digits, "seed=9")).seed == 9


def test_no_run_is_made_without_numbers(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"measured for a new run alone; write their numbers"):
        create_run(tmp_path / "a", asking(digits))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["data.path=s3://bucket/photos"], "measured reads many images of s3://bucket/photos"),
        (["data.path=nowhere"], "nowhere/train is not a folder"),
    ],
)
def test_what_cannot_be_measured_is_said(digits: Path, keys: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        with_measured(asking(digits, *keys))


def test_images_all_alike_have_no_std(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alike = {"mean": [0.5], "std": [0.0]}
    monkeypatch.setattr(measured, "_measured", lambda *_: alike)
    with pytest.raises(UserError, match=r"mean and std of .*train:\n.*std below 0\.001"):
        with_measured(asking(digits))


def test_a_stream_and_other_words_are_refused(digits: Path) -> None:
    stream = ["data.stream=[a.tar]", "duration=9 steps", "data.sampling=uniform"]
    with pytest.raises(UserError, match="measured looks at the training split, and a stream has"):
        asking(digits, *stream)
    for wrong in ("meassured", "0.5", "[a]", "[.nan]", "[true]", "{}"):
        with pytest.raises(UserError, match=r"augment\.mean: .* is neither a list of numbers"):
            asking(digits, f"augment.mean={wrong}")
    tree = asking(digits).model_dump(mode="json")
    assert parse_recipe(tree, "here") == asking(digits)
