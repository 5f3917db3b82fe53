"""Which recipes count as the same run, and how a difference is named."""

from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.configs.identity import differences, recipe_hash, summary
from bigbatch.configs.load import builtin_recipes, change_recipe, load_recipe, parse_recipe
from bigbatch.configs.schema import Recipe


def test_the_hash_sees_what_reaches_a_weight_and_nothing_else():
    digits = recipe_hash(load_recipe("digits"))
    for same in ("log.wandb=off", "checkpoint.keep=9", "data.workers=7", "name=x"):
        assert recipe_hash(load_recipe("digits", [same])) == digits
    sharded = load_recipe("digits", ["reduction=overlapped", "backend=zero1"])
    assert recipe_hash(sharded) == recipe_hash(load_recipe("digits", ["reduction=overlapped"]))
    for other in ("seed=1", "optimizer.lr=1", "micro_batch=32", "data.image_size=28"):
        assert recipe_hash(load_recipe("digits", [other])) != digits


def test_a_teacher_is_no_part_of_the_hash_but_what_is_learned_from_it_is():
    """Checkpoints know it by its weights, as they know data by its index."""
    taught = load_recipe("digits", ["distill.teacher=a"])
    assert recipe_hash(taught) != recipe_hash(load_recipe("digits"))
    for same in ("teacher=b", "cache=kept", "cache_gb=0"):
        assert differences(taught, change_recipe(taught, [f"distill.{same}"])) == []
    for other in (
        "weight=0.5",
        "temperature=2",
        "members=all",
        "outputs=float16",
        "name=logits",
        "hint={layer: layer3}",
    ):
        changed = change_recipe(taught, [f"distill.{other}"])
        assert len(differences(taught, changed)) == 1
        assert recipe_hash(changed) != recipe_hash(taught)


def test_what_learns_is_part_of_the_run_and_each_of_its_keys():
    weights = load_recipe("digits", ["model.checkpoint=w.safetensors"])
    head = change_recipe(weights, ["transfer={name: head}"])
    assert recipe_hash(head) != recipe_hash(weights)
    gradual = change_recipe(weights, ["transfer={name: gradual, every: 1 epochs}"])
    for other in (
        "every=2 epochs",
        "stages=1",
        "stage_decay=0.5",
        "rates={head: 2}",
        "name=frozen",
        "name=head",
    ):
        keys = [f"transfer.{other}", *["transfer.stages=2"] * (other == "name=frozen")]
        changed = change_recipe(gradual, keys)
        assert len(differences(gradual, changed)) == 1
        assert recipe_hash(changed) != recipe_hash(gradual)


def test_the_hash_does_not_see_a_default_that_is_written_out():
    plain = load_recipe("digits")
    written = parse_recipe(plain.model_dump(mode="json"), "digits")
    assert recipe_hash(written) == recipe_hash(plain)


def test_a_key_that_a_version_adds_changes_no_hash():
    before = {name: recipe_hash(load_recipe(name)) for name in builtin_recipes()}

    class Later(Recipe):
        novelty: float = 0.5

    for name, known in before.items():
        tree = load_recipe(name).model_dump(mode="json")
        assert recipe_hash(Later.model_validate(tree)) == known
        assert recipe_hash(Later.model_validate(tree | {"novelty": 0.6})) != known


def test_kinds_of_a_part_that_are_all_defaults_have_different_hashes():
    options = ["sampling=uniform", "sampling=balanced", "sampling=label_shuffling"]
    hashes = {recipe_hash(load_recipe("cifar10-resnet18", [f"data.{o}"])) for o in options}
    kinds = ["constant", "cosine", "polynomial"]
    hashes |= {recipe_hash(load_recipe("digits", [f"schedule={{name: {k}}}"])) for k in kinds}
    assert len(hashes) == len(options) + len(kinds)


DIGITS = load_recipe("digits")
CHANGES = [
    "seed=3",
    "seed=4",
    "optimizer={name: sgd, lr: 2}",
    "optimizer.momentum=0.8",
    "schedule={name: cosine}",
    "schedule.warmup=0 steps",
    "data.sampling=uniform",
    "clip={name: adaptive}",
    "clip=null",
    "evaluate.every=1 epochs",
    "log.every=3",
    "data.workers=3",
    "recovery.stall_s=9",
    "recovery.max_rollbacks=2",
    "augment.crop={}",
    "augment.crop=null",
    "backend=ddp",
    "average=null",
    "average={name: ema, half_life: 1 epochs}",
]
some_changes = st.lists(st.sampled_from(CHANGES), max_size=4)


@given(some_changes, some_changes)
@settings(max_examples=60, deadline=None)
def test_hashes_agree_exactly_where_nothing_differs(one, other):
    a, b = change_recipe(DIGITS, one), change_recipe(DIGITS, other)
    assert (recipe_hash(a) == recipe_hash(b)) == (differences(a, b) == [])
    assert len(differences(a, b)) == len(differences(b, a))


def test_differences_name_each_key_and_both_values():
    digits = load_recipe("digits")
    assert differences(digits, digits) == []
    other = load_recipe("digits", ["seed=4", "optimizer.lr=1", "log.every=3", "data.workers=5"])
    assert differences(digits, other) == [
        "seed = 3 there, 4 here",
        "optimizer.lr = 2.0 there, 1.0 here",
    ]
    clipped = load_recipe("digits", ["clip={name: norm, limit: 1}"])
    assert differences(digits, clipped) == [
        'clip = null there, {"name": "norm", "limit": 1.0} here'
    ]


def test_of_a_part_of_another_kind_the_kind_is_named():
    other = load_recipe("digits", ["optimizer={name: adamw, lr: 0.001}"])
    assert differences(load_recipe("digits"), other) == [
        'optimizer.name = "lars" there, "adamw" here'
    ]


def test_a_summary_names_five_and_counts_the_rest():
    assert summary(list("abcde")) == "a; b; c; d; e"
    assert summary(list("abcdefg")) == "a; b; c; d; e; and 2 more"
