"""What a recipe may say of transfer, and what it may not."""

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe

WEIGHTS = "model.checkpoint=w.safetensors"


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["transfer={name: head}"], "transfer = head freezes weights to start from, and there are"),
        (["transfer={name: frozen, stages: 1}"], "or leave transfer out"),
        (["transfer={name: gradual, every: 1 epochs}"], "set model.pretrained or model.checkpoint"),
        (["transfer={name: all}"], "everything learns at one rate anyway; leave transfer out"),
        ([WEIGHTS, "transfer={name: frozen}"], "nothing is frozen; give stages: K or layers"),
        ([WEIGHTS, "transfer={name: frozen, stages: 0}"], "greater than or equal to 1"),
        ([WEIGHTS, "transfer={name: gradual}"], "transfer.every: missing"),
        ([WEIGHTS, "transfer={name: gradual, every: 0 steps}"], "is no time at all"),
        ([WEIGHTS, "transfer={name: head, stages: 1}"], "transfer.stages: unknown key"),
        ([WEIGHTS, "transfer={name: half}"], "transfer.* 'half'"),
        (["transfer={name: all, stage_decay: 1.5}"], "less than or equal to 1"),
        (["transfer={name: all, rates: {head: 0}}"], "greater than 0"),
        (
            ["transfer={name: all, stage_decay: 0.5}", "optimizer={name: sgd, lr: 1, "
             "layer_decay: 0.9}"],
            "optimizer.layer_decay = 0.9 both lower the rate from the top down",
        ),
        (
            ["transfer={name: all, stage_decay: 0.5}", "optimizer={name: lbfgs, lr: 1}"],
            "lbfgs has one for all of it",
        ),
        (
            [WEIGHTS, "transfer={name: gradual, every: 1 steps}", "optimizer={name: lbfgs, lr: 1}"],
            "lbfgs has one for all of it",
        ),
        (
            [
                *(WEIGHTS, "transfer={name: gradual, every: 1 steps}", "reduction=overlapped"),
                *("optimizer={name: muon, lr: 0.1, rest: {name: adamw, lr: 0.1}}", "backend=zero1"),
            ],
            "leaves layers out of muon's steps, which on zero1",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(keys: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_recipe("digits", keys)


@pytest.mark.parametrize("transfer", ["{name: head}", "{name: frozen, layers: [layer1, stem]}"])
def test_lbfgs_takes_what_is_frozen_for_good(transfer: str) -> None:
    keys = [WEIGHTS, f"transfer={transfer}", "optimizer={name: lbfgs, lr: 1}", "clip=null"]
    recipe = load_recipe("digits", keys)
    assert recipe.transfer is not None
