"""Recipes: inheritance, overrides, hashes, and what bad ones are told."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.configs.durations import Length, parse
from bigbatch.configs.errors import UserError, reason_of
from bigbatch.configs.load import (
    builtin_recipes,
    change_recipe,
    dump_recipe,
    load_recipe,
    parse_recipe,
    read_yaml,
)
from bigbatch.configs.schedules import Cosine

FIVE_LINES = """\
data: {path: shards/mine}
model: {name: resnet18}
optimizer: {name: sgd, lr: 0.1}
duration: 5 epochs
global_batch: 64
"""


def test_every_built_in_recipe_loads_and_survives_a_round_trip(tmp_path):
    assert "digits" in builtin_recipes()
    for name in builtin_recipes():
        recipe = load_recipe(name)
        (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
        again = parse_recipe(read_yaml(tmp_path / "again.yaml"), "again")
        assert again == recipe


def test_five_lines_are_a_recipe_named_after_its_file(tmp_path):
    (tmp_path / "mine.yaml").write_text(FIVE_LINES)
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.name == "mine"
    assert recipe.micro_batches == 1


def test_base_is_merged_key_by_key_and_overrides_come_last(tmp_path):
    (tmp_path / "base.yaml").write_text(FIVE_LINES)
    child = "base: base.yaml\nmodel: {options: {drop_rate: 0.5}}\noptimizer: {lr: 0.2}\n"
    (tmp_path / "child.yaml").write_text(child)
    recipe = load_recipe(tmp_path / "child.yaml", ["optimizer.momentum=0.8", "seed=3"])
    assert (recipe.name, recipe.model.name, recipe.seed) == ("child", "resnet18", 3)
    assert recipe.model.options == {"drop_rate": 0.5}
    assert (recipe.optimizer.lr, recipe.optimizer.momentum) == (0.2, 0.8)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("off", "off"), ("yes", "yes"), ("true", True), ("False", False)),
        *(("1e-4", 1e-4), ("1.5", 1.5), (".5e3", 500.0), ("2.", 2.0), ("-1E6", -1e6)),
        *(("12", 12), ("1.2.3", "1.2.3"), ("e5", "e5"), ("12 epochs", "12 epochs")),
    ],
)
def test_plain_values_are_read_as_yaml_1_2_reads_them(tmp_path, text, value):
    (tmp_path / "x.yaml").write_text(f"x: {text}\n")
    read = read_yaml(tmp_path / "x.yaml")["x"]
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lrr=2", ["optimizer.lrr", "did you mean lr?", "momentum"]),
        ("schedul.cycles=2", ["did you mean schedule?"]),
        ("optimizer.lr=-1", ["optimizer.lr = -1", "greater than 0"]),
        ("optimizer.lr=.nan", ["optimizer.lr", "finite"]),
        ("optimizer.lr=1e999", ["optimizer.lr", "finite"]),
        ("micro_batch=60", ["256", "60", "divides"]),
        ("duration=90", ["90", "one number and one unit", "'90 epochs'"]),
        ("duration=9 weeks", ["9 weeks", "one unit"]),
        ("augment.crop={scale: [0, 1]}", ["augment.crop.scale", "greater than 0"]),
        ("optimizer={name: adam, lr: 1, betas: [0.9, 1]}", ["optimizer.betas.1", "less than 1"]),
        (
            "recovery.corruption.digest_every=often",
            ["recovery.corruption.digest_every = 'often': Input should be a", ", or 'ledger'"],
        ),
        ("data.sampling=fair", ["data.sampling = 'fair': there are uniform, balanced"]),
        ("optimizer=adamm", ["optimizer = 'adamm': did you mean adam? there are sgd, lars"]),
        ("augment.ops=[{name: augmax}]", ["augment.ops.0 = 'augmax': did you mean augmix?"]),
        (
            "clip=1.0",
            ["clip = 1.0: write its kind, KIND or {name: KIND, ...}; there are norm, val"],
        ),
        ("augment.ops=[3]", ["augment.ops.0 = 3: write its kind, ", "there are rotate, shear"]),
        ("augment.ops=3", ["augment.ops = 3: a list is written [...], as in augment.ops=[3]"]),
        (
            "data.progressive=16",
            ["data.progressive = 16: write its keys, ", "there are after, mul"],
        ),
        ("model.norm={}", ["model.norm: says no `name`; there are group, layer"]),
        ("data.sampling={name: balanced, x: 1}", ["data.sampling.x", "unknown key"]),
        ("schedule.name=cosin", ["cosin", "did you mean cosine?"]),
        ("augment.mean=[0.1, 0.2]", ["augment.mean", "data.channels = 1"]),
        ("name=../../etc", ["name", "../../etc"]),
        ("seed=" + "9" * 5000, ["seed"]),
        ("optimizer", ["key=value"]),
        ("optimizer..lr=1", ["key=value"]),
        ("model.options=!!python/object/apply:os.system ['true']", ["not valid YAML"]),
        ("model=[1, 2", ["not valid YAML"]),
    ],
)
def test_bad_values_name_the_place_the_rule_and_the_remedy(override, words):
    with pytest.raises(UserError) as caught:
        load_recipe("digits", [override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["backend=zero3"], ["zero3", "set backend to fsdp2"]),
        (["backend=zero1", "reduction=exact"], ["exact", "overlapped", "ddp"]),
        (["backend=zero2", "optimizer={name: novograd, lr: 1}"], ["novograd", "lamb", "ddp"]),
        (["backend=fsdp2", "optimizer={name: adafactor, lr: 1}"], ["adafactor", "muon", "ddp"]),
        (["backend=fsdp2", "clip={name: adaptive}"], ["adaptively", "norm", "ddp"]),
    ],
)
def test_what_is_not_exact_in_pieces_is_refused_with_the_remedy(overrides, words):
    with pytest.raises(UserError) as caught:
        load_recipe("digits", ["reduction=overlapped", *overrides])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "no mapping"),
        ("seed: 1\nseed: 2\n", "written twice"),
        ("1: 2\n", "not a name"),
        ("base: loop.yaml\n", "circle"),
        ("base: [digits]\n", "base is"),
        ("base: nowhere\n", "no recipe 'nowhere'"),
        ("a: &a [*a]\n", "not valid YAML"),
        ("\x00", "not valid YAML"),
        ("x: " + "[" * 3000, "not valid YAML"),
        ("seed: 1\n" * 200_000, "larger than"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, words):
    path = tmp_path / "loop.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        load_recipe(path)


def test_a_missing_recipe_lists_the_near_one():
    with pytest.raises(UserError, match="did you mean digits"):
        load_recipe("digit")


@given(st.text(max_size=200))
def test_any_text_is_a_recipe_error_or_a_recipe(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("fuzz") / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(UserError):
        load_recipe(path)


@given(st.text(max_size=60))
def test_any_override_is_a_user_error_or_a_recipe(text):
    with contextlib.suppress(UserError):  # anything else is a defect
        assert load_recipe("digits", [text]).global_batch > 0


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("90 epochs", Length(90, "epochs")),
        ("1 epoch", Length(1, "epochs")),
        ("2000 steps", Length(2000, "steps")),
        ("1.2M samples", Length(1.2e6, "samples")),
        ("0.5 epochs", Length(0.5, "epochs")),
    ],
)
def test_durations(text, length):
    assert parse(text) == length
    assert parse(str(length)) == length


@pytest.mark.parametrize(
    "key",
    [
        "duration",
        "evaluate.every",
        "checkpoint.every",
        "checkpoint.keep_every",
        "schedule={name: step, every: %s}",
        "schedule={name: exponential, rate: 0.5, every: %s}",
        "schedule={name: natural_exponential, rate: 0.5, every: %s}",
        "schedule={name: inverse_time, rate: 0.5, every: %s}",
        "schedule={name: triangular, rise: %s}",
        "schedule={name: polynomial, length: %s}",
        "schedule={name: sequence, pieces: [{length: %s, schedule: {name: constant}}, "
        "{schedule: {name: cosine}}]}",
    ],
)
@pytest.mark.parametrize("zero", ["0 steps", "0 epochs", "0.0k samples"])
def test_an_interval_of_nothing_is_refused(key, zero):
    change = key % zero if "%" in key else f"{key}={zero}"
    with pytest.raises(UserError, match=r"0 \w+ is no time at all; write a longer one"):
        load_recipe("digits", [change])


@pytest.mark.parametrize("key", ["log.every", "log.details_every", "checkpoint.keep"])
def test_a_count_of_nothing_is_refused(key):
    with pytest.raises(UserError, match=f"{key} = 0: .*greater than or equal to 1"):
        load_recipe("digits", [f"{key}=0"])


def test_a_warmup_may_be_nothing_and_a_tiny_interval_is_a_step():
    assert load_recipe("digits", ["schedule.warmup=0 steps"]).schedule.warmup.steps(256, 9) == 0
    assert parse("0.000000000001 epochs").steps(256, 1000) == 1


@given(st.integers(1, 10**6), st.integers(1, 10**5), st.integers(1, 200))
def test_whole_epochs_cover_every_sample(samples, batch, epochs):
    steps = Length(epochs, "epochs").steps(batch, samples)
    assert (steps - 1) * batch < epochs * samples <= steps * batch


def test_a_change_names_no_kind_where_the_recipe_leaves_it_to_the_default(tmp_path: Path) -> None:
    """`submit --vary schedule.warmup=...` of a recipe that says nothing of a schedule."""
    file = tmp_path / "plain.yaml"
    file.write_text(
        "duration: 10 steps\ndata: {path: shards/digits, image_size: 8, channels: 1}\n"
        "augment: {mean: [0.5], std: [0.5]}\nmodel: {name: resnet10t}\n"
        "optimizer: {name: sgd, lr: 0.1}\n"
    )
    changed = change_recipe(load_recipe(file), ["schedule.warmup=2 steps"])
    assert changed.schedule == Cosine(name="cosine", warmup=Length(2, "steps"))
    constant = change_recipe(load_recipe(file), ["schedule.name=constant"])
    assert constant.schedule.name == "constant"


def test_a_file_that_is_not_there_is_called_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: digits\n")
    with pytest.raises(
        UserError, match=r"^no file '.*mine2\.yaml' here \(.*\); there are mine\.yaml$"
    ):
        load_recipe(tmp_path / "mine2.yaml")
    with pytest.raises(UserError, match=r"^no file 'nowhere/mine2\.yaml' here \([^;]*\)$"):
        load_recipe("nowhere/mine2.yaml")


def test_a_size_is_a_side_or_height_and_width() -> None:
    """Two equal sides are one, so that recipes which mean the same have one hash."""
    square = load_recipe("digits", ["data.image_size=[32, 32]"])
    assert square == load_recipe("digits", ["data.image_size=32"])
    recipe = load_recipe("digits", ["data.image_size=[32, 256]"])
    assert recipe.data.image_size == recipe.eval_size == (32, 256)
    assert recipe.model_dump(mode="json")["data"]["image_size"] == [32, 256]
    assert parse_recipe(recipe.model_dump(mode="json"), "again") == recipe
    assert load_recipe("digits", ["evaluate.image_size=48"]).eval_size == 48


def test_a_reason_is_never_empty_and_says_nothing_twice(tmp_path: Path) -> None:
    """`tune` printed "[Errno 2] No such file or directory: 'space.yaml'" behind the name."""
    with pytest.raises(UserError) as raised:
        read_yaml(tmp_path / "gone.yaml")
    said = f"cannot read {tmp_path / 'gone.yaml'}: No such file or directory; give the path of a"
    assert str(raised.value).startswith(said)
    assert reason_of(AssertionError()) == "AssertionError"
    assert reason_of(OSError()) == "OSError"
    assert reason_of(ValueError(" why ")) == "why"
