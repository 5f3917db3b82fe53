"""Files over their bases and commands over files: another kind of a part, in any order."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.configs.errors import UserError
from bigbatch.configs.layers import merge
from bigbatch.configs.load import change_recipe, load_recipe
from bigbatch.configs.notices import notice
from bigbatch.configs.schema import Recipe


def load(name: str | Path, *overrides: str) -> tuple[Recipe, list[str]]:
    said: list[str] = []
    return load_recipe(name, overrides, said.append), said


def test_naming_another_model_keeps_what_is_said_of_it() -> None:
    before = load_recipe("cifar10-resnet18").model
    recipe, said = load("cifar10-resnet18", "model.name=resnet34")
    assert recipe.model == before.model_copy(update={"name": "resnet34"})
    assert (recipe.model.stem, recipe.model.channels_last) == ("small", True)
    assert said == []  # a model has the same keys whatever its name
    pretrained = ("model.pretrained=true", "model.name=resnet50")
    for order in itertools.permutations(pretrained):
        assert load("cifar10-resnet18", *order)[0].model.pretrained


def test_naming_another_optimizer_keeps_what_it_has_too_and_says_the_rest() -> None:
    recipe, said = load("digits", "optimizer.name=adamw")
    assert recipe.optimizer.model_dump(exclude_unset=True) == {
        "name": "adamw", "lr": 2.0, "weight_decay": 1e-4
    }  # fmt: skip
    assert said == [
        "optimizer is now adamw, not lars: dropped momentum=0.9, trust_coefficient=0.003; "
        "kept lr=2.0, weight_decay=0.0001"
    ]
    assert load("digits", "optimizer.name=lars", "optimizer.lr=1")[1] == []
    # Nothing that a default says counts as kept: LARS has an eps of 0.
    assert load_recipe("digits", ["optimizer.name=adam"]).optimizer.eps == 1e-8
    changed = change_recipe(load_recipe("digits"), ["optimizer.name=adam"], None)
    assert changed.optimizer.eps == 1e-8


def test_a_file_over_its_base_keeps_and_says_the_same(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "base: cifar10-resnet18\noptimizer: {name: lamb}\ndata: {sampling: {name: tempered}}\n"
    )
    (tmp_path / "own.yaml").write_text("base: mine.yaml\ndata: {sampling: balanced}\n")
    recipe, said = load(tmp_path / "mine.yaml")
    assert (recipe.optimizer.lr, recipe.lr_scale) == (0.1, 4.0)
    assert said == [
        "optimizer is now lamb, not sgd: dropped nesterov=true; "
        'kept lr=0.1, scale={"rule": "linear", "base_batch": 128}, weight_decay=0.0005'
    ]
    assert load(tmp_path / "own.yaml", "data.sampling.name=uniform")[1] == said
    alpha = ("data.sampling.alpha=0.2", "data.sampling=tempered")
    for order in itertools.permutations(alpha):
        assert load(tmp_path / "own.yaml", *order)[0].data.sampling.alpha == 0.2  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["imagenet-resnet50-lars-4k", "imagenet-vit-s16-lamb"])
def test_of_our_own_files_nothing_is_said(name: str) -> None:
    assert load(name)[1] == []


def test_a_part_that_the_command_writes_as_a_whole_replaces_another_kind() -> None:
    recipe, said = load("digits", "optimizer={name: adamw, lr: 0.001}")
    assert recipe.optimizer.weight_decay == 0  # type: ignore[union-attr]  # not LARS's
    assert said == [
        "optimizer is now adamw, not lars: dropped momentum=0.9, weight_decay=0.0001, "
        "trust_coefficient=0.003"
    ]
    same = load_recipe("digits", ["optimizer={name: lars, lr: 1}"])
    assert same.optimizer.weight_decay == 1e-4  # type: ignore[union-attr]
    earlier = ["optimizer.weight_decay=0.1", "optimizer={name: adamw, lr: 0.001}"]
    assert load_recipe("digits", earlier).optimizer.weight_decay == 0.1  # type: ignore[union-attr]


def test_of_two_kinds_that_the_command_writes_as_a_whole_the_last_counts() -> None:
    """They were merged, and the first one's keys refused as unknown to the second."""
    growing = "global_batch={name: doubling, start: 128, every: 2 epochs, most: 512}"
    stages = "global_batch={name: stages, pieces: [{batch: 128, until: 2 epochs}, {batch: 256}]}"
    for first, last, kind in ((growing, stages, "stages"), (stages, growing, "doubling")):
        recipe = load_recipe("cifar10-resnet18", [first, last])
        assert recipe == load_recipe("cifar10-resnet18", [last])
        assert recipe.global_batch.name == kind  # type: ignore[union-attr]
    both = ["optimizer={name: muon, lr: 0.02, rest: {name: lamb, lr: 0.01}}"]
    both += ["optimizer.rest={name: sgd, lr: 0.5, nesterov: true, momentum: 0.9}"]
    assert load_recipe("digits", both).optimizer.rest.name == "sgd"  # type: ignore[union-attr]
    third = "optimizer={name: muon, lr: 0.03, rest: {name: sgd, lr: 0.5}}"
    for between in ("optimizer={name: sgd, lr: 1}", "optimizer={name: adamw, lr: 1}"):
        recipe = load_recipe("digits", [both[0], between, third])
        assert recipe == load_recipe("digits", [third])
    single = [
        "optimizer={name: sgd, lr: 1, nesterov: true, momentum: 0.9}",
        "optimizer.weight_decay=0.1",
    ]
    recipe = load_recipe("digits", [*single, "optimizer={name: adamw, lr: 0.001}"])
    assert recipe.optimizer.name == "adamw"
    assert recipe.optimizer.weight_decay == 0.1  # what is given by itself stays, in whatever order
    same = ["optimizer={name: sgd, lr: 1}", "optimizer={name: sgd, momentum: 0.5}"]
    assert load_recipe("digits", same).optimizer.lr == 1


@pytest.mark.parametrize("key", ["optimizer=adamw", "optimizer.name=adamw"])
def test_a_part_may_be_written_by_its_name_alone(key: str) -> None:
    recipe, said = load("digits", key)
    assert (recipe.optimizer.name, recipe.optimizer.lr) == ("adamw", 2.0)
    assert said[0].endswith("kept lr=2.0, weight_decay=0.0001")


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("schedule", "cosine"),
        ("model", "resnet18"),
        ("model.norm", "instance"),
        ("model.init.weights", "he"),
        ("loss", "hinge"),
        ("loss.class_weights", "effective_number"),
        ("data.sampling", "uniform"),
        ("regularise.sharpness", "sam"),
    ],
)
def test_any_part_may_be_written_by_its_name_alone(tmp_path: Path, place: str, kind: str) -> None:
    keys = ["data.sampling={name: uniform}"]
    assert load_recipe("digits", [*keys, f"{place}={kind}"]) == load_recipe(
        "digits", [*keys, f"{place}.name={kind}"]
    )
    tree: object = kind
    for part in reversed(place.split(".")):
        tree = {part: tree}
    assert isinstance(tree, dict)
    written = {"base": "digits", "name": "digits", **tree}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(written))
    from_file = load_recipe(tmp_path / "mine.yaml", keys)
    assert from_file == load_recipe("digits", [*keys, f"{place}={kind}"])
    assert load_recipe("digits", ["loss.class_weights=none"]).loss.class_weights is None  # type: ignore[union-attr]


def test_free_options_called_name_are_no_kind() -> None:
    options = ["model.options={name: a, x: 1}", "model.options.name=b"]
    assert load("digits", *options)[0].model.options == {"drop_rate": 0.1, "name": "b", "x": 1}


def test_what_the_command_gives_is_never_dropped() -> None:
    for order in itertools.permutations(["optimizer.trust_coefficient=1", "optimizer.name=adamw"]):
        with pytest.raises(UserError, match=r"optimizer\.trust_coefficient: unknown key"):
            load_recipe("digits", order)


def test_null_takes_a_part_away() -> None:
    recipe = load_recipe("digits", ["augment.jitter=null", "augment.jitter.contrast=0.3"])
    assert recipe.augment.jitter is not None
    assert recipe.augment.jitter.brightness == 0.0


OVERRIDES = {
    "optimizer.name": ["lars", "sgd", "adamw", "lamb", "sm3", "lbfgs"],
    "optimizer.lr": [0.1, 3],
    "optimizer.momentum": [0.5],
    "optimizer.weight_decay": [0, 0.1],
    "optimizer.scale.rule": ["sqrt"],
    "schedule.name": ["cosine", "one_cycle", "polynomial", "cycles"],
    "schedule.warmup": ["2 steps"],
    "schedule.power": [3],
    "data.sampling": ["uniform", "tempered"],
    "data.sampling.alpha": [0.2],
    "model.name": ["resnet18"],
    "model.pretrained": ["true"],
    "clip.name": ["norm", "value", "adaptive"],
    "clip.limit": [0.5],
    "ensemble.gate": [0.1],
}
SOME = st.lists(st.sampled_from(sorted(OVERRIDES)), unique=True, max_size=6).flatmap(
    lambda keys: st.tuples(
        *(st.sampled_from(OVERRIDES[k]).map(lambda v, k=k: f"{k}={v}") for k in keys)
    )
)
BASES = ["digits", "cifar10-resnet18", "imagenet-vit-s16-lamb"]


def result(name: str, overrides: Any) -> Any:
    try:
        return load_recipe(name, overrides, None)
    except UserError as error:
        return sorted(str(error).split("\n"))


@given(st.sampled_from(BASES), SOME, st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_the_order_of_the_command_line_does_not_matter(name: str, some: Any, random: Any) -> None:
    shuffled = random.sample(some, len(some))
    found = result(name, some)
    assert result(name, shuffled) == found
    if isinstance(found, Recipe):  # and everything that was written is there
        tree = found.model_dump(mode="json")
        for text in some:
            key, value = text.replace("ensemble.gate", "ensemble.selection_margin").split("=")
            part: Any = tree
            for word in key.split("."):
                part = part[word]
            part = part["name"] if isinstance(part, dict) else part
            assert str(part).lower() == value or float(part) == float(value)


KEYS = st.dictionaries(st.sampled_from("abc"), st.integers(0, 2) | st.none(), max_size=3)
TREE = st.dictionaries(st.sampled_from("abc"), KEYS | st.integers(0, 2), max_size=3)


@given(TREE, TREE, TREE)
def test_merging_is_associative_where_no_part_is_replaced(a: Any, b: Any, c: Any) -> None:
    parts = {k for t in (a, b, c) for k, v in t.items() if isinstance(v, dict)}
    if all(isinstance(t[k], dict) for t in (a, b, c) for k in parts & t.keys()):
        assert merge(merge(a, b), c) == merge(a, merge(b, c))


def test_a_notice_is_said_once_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    notice.cache_clear()
    for _ in range(3):
        load_recipe("digits", ["optimizer.name=sgd"])
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "bigbatch: optimizer is now sgd, not lars: dropped trust_coefficient=0.003; "
        "kept lr=2.0, momentum=0.9, weight_decay=0.0001\n"
    )


def test_parts_in_lists_may_be_written_by_their_names_alone() -> None:
    factors = load_recipe("digits", ["schedule={name: product, factors: [cosine, constant]}"])
    assert [part.name for part in factors.schedule.factors] == ["cosine", "constant"]  # type: ignore[union-attr]
    pieces = "[{length: 1 epochs, schedule: constant}, {schedule: cosine}]"
    sequence = load_recipe("digits", [f"schedule={{name: sequence, pieces: {pieces}}}"])
    assert [piece.schedule.name for piece in sequence.schedule.pieces] == ["constant", "cosine"]  # type: ignore[union-attr]
