"""What a recipe that learns numbers or shares may say, and what is refused with its remedy."""

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.judged import KL, MAE, judged_by
from bigbatch.configs.load import load_recipe
from bigbatch.configs.space import load_space
from bigbatch.configs.targets import learns_numbers, learns_targets

PLAIN = ("data.sampling=uniform", "schedule={name: cosine}")


@pytest.mark.parametrize("name", ["l1", "l2", "smooth_l1", "tukey", "kl"])
def test_each_has_its_score(name: str) -> None:
    recipe = load_recipe("digits", [*PLAIN, f"loss={{name: {name}}}"])
    assert learns_targets(recipe)
    assert learns_numbers(recipe) == (name != "kl")
    assert judged_by(recipe) == (KL if name == "kl" else MAE)
    assert not learns_targets(load_recipe("digits"))


@pytest.mark.parametrize(
    ("loss", "changes", "says"),
    [
        ("{name: l2, mean: [1], std: [0]}", [], r"std \[0.0\]: give each target one above 0"),
        ("{name: l2, mean: [1, 2], std: [1]}", [], "mean has 2 numbers and std 1"),
        ("{name: l2, mean: [.nan]}", [], "neither a number for each target nor measured"),
        ("{name: l2, mean: often}", [], "neither a number for each target nor measured"),
        ("{name: l2, class_weights: balanced}", [], "class_weights: unknown key"),
        ("{name: kl, label_smoothing: 0.1}", [], "label_smoothing: unknown key"),
        ("{name: l1}", ["augment.cutmix=1"], "set it to 0 .augment.mixup mixes targets"),
        ("{name: l1}", ["model.head={name: cosine, scale: 8}"], "gives cosines of classes"),
        ("{name: kl}", ["model.init={head_prior: true}"], "starts from the shares of labels"),
        ("{name: kl}", ["log.samples=true"], "set log.samples=false"),
        ("{name: l1}", ["distill={name: soft, teacher: runs/a}"], "takes a classifier's answers"),
        ("{name: tukey}", ["micro_batch=4"], "raise it to 8 or more, or give loss.scale a number"),
        ("{name: l1}", ["schedule={name: plateau}"], "set its metric to mae or rmse or r2"),
        (
            "{name: kl}",
            [
                "schedule={name: sequence, pieces: [{length: 2 epochs, schedule: {name: "
                "constant}}, {schedule: {name: plateau, metric: mae}}]}"
            ],
            "set its metric to kl or mode",
        ),
        ("{name: cross_entropy}", ["schedule={name: plateau, metric: mae}"], "accuracy or nll"),
    ],
)
def test_what_has_no_meaning_is_refused(loss: str, changes: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_recipe("digits", [*PLAIN, f"loss={loss}", *changes])


@pytest.mark.parametrize(
    "changes",
    [
        ["loss={name: tukey, scale: 0.5}", "micro_batch=4"],
        ["loss={name: kl}", "augment.cutmix=1"],
        ["loss={name: l1, mean: 3, std: 2}", "augment.mixup=0.4"],
        ["loss={name: l1}", "schedule={name: plateau, metric: r2}"],
    ],
)
def test_what_has_one_is_not(changes: list[str]) -> None:
    load_recipe("digits", [*PLAIN, *changes])


def test_a_stream_has_no_targets() -> None:
    changes = ["data.stream=[a.tar]", "duration=5 steps", "reduction=overlapped"]
    changes += ["schedule={name: constant}", "evaluate.every=5 steps", "checkpoint.every=5 steps"]
    with pytest.raises(UserError, match="learns targets, which are read from an index"):
        load_recipe("digits", ["data.sampling=uniform", *changes, "loss={name: l2}"])


def test_a_search_looks_for_what_the_loss_has(tmp_path) -> None:
    space = tmp_path / "space.yaml"
    key = "parameters: {optimizer.lr: {type: float, low: 0.1, high: 1}}\n"
    space.write_text(key)
    with pytest.raises(UserError, match="accuracy is no score of loss l1; write mae, rmse, r2 or"):
        load_space(space, "digits", (*PLAIN, "loss={name: l1}"))
    space.write_text(f"objectives: [mae]\n{key}")
    assert load_space(space, "digits", (*PLAIN, "loss={name: l1}")).objectives == ["mae"]
    with pytest.raises(UserError, match="mae is no score of loss cross_entropy"):
        load_space(space, "digits")
