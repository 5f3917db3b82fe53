"""Betas and weight decay where the batch changes, against formulas by step, in float64."""

from typing import Any

import numpy as np
import pytest
import torch

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.schema import Recipe
from bigbatch.trainers.optim import (
    build_optimizer,
    load_optimizer_state,
    optimizer_state_by_name,
    set_by_batch,
    set_lr,
)

# Two steps of 64, three of 128, three of 512, one of 64.
BATCHES = [64, 64, 128, 128, 128, 512, 512, 512, 64]
PIECES = (
    "[{batch: 64, until: 128 samples}, {batch: 128, until: 512 samples}, "
    "{batch: 512, until: 2048 samples}, {batch: 64}]"
)
RATE = 0.05


def recipe_of(optimizer: str, **rules: str) -> Recipe:
    said = "".join(f", {key}: {value}" for key, value in rules.items())
    return load_recipe(
        "digits",
        [
            f"global_batch={{name: stages, pieces: {PIECES}{said}}}",
            *("micro_batch=64", f"optimizer={optimizer}", "schedule={name: constant}"),
        ],
        say=None,
    )


class Trained:
    """A small model, and its optimizer as the loop sets it in each step."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(0)
        self.recipe = recipe
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).double()
        self.optimizer = build_optimizer(self.model, recipe.optimizer)

    def step(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        batch = BATCHES[step]
        rules = self.recipe.global_batch
        assert not isinstance(rules, int)
        set_lr(self.optimizer, rules.lr_factor(batch))
        set_by_batch(self.optimizer, rules, batch, BATCHES[max(0, step - 1)])
        for p in self.model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        self.optimizer.step()


def by_formula(
    recipe: Recipe, betas: str, decay: str, rate: str, *, coupled: bool = False
) -> list[Any]:
    """Adam by hand: moments whose weights add up to 1 - the product of the betas so far."""
    model = Trained(recipe).model
    found = []
    for number, p in enumerate(model.parameters()):
        w, m, v, kept1, kept2 = p.detach().numpy().copy(), 0.0, 0.0, 1.0, 1.0
        for step, batch in enumerate(BATCHES):
            generator = torch.Generator().manual_seed(step)
            grads = [
                torch.randn(q.shape, generator=generator, dtype=q.dtype) for q in model.parameters()
            ]
            g = grads[number].numpy()
            k = batch / 64
            power = k if betas == "power" else 1.0
            b1, b2 = 0.9**power, 0.95**power
            lr = RATE * {"none": 1.0, "linear": k, "sqrt": k**0.5}[rate]
            wd = 0.1 * (k * RATE / lr if decay == "timescale" else 1.0) * (p.ndim > 1)
            g = g + wd * w if coupled else g
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            kept1, kept2 = kept1 * b1, kept2 * b2
            if betas == "none":  # as torch has it: of the betas of now, which never change
                kept1, kept2 = 0.9 ** (step + 1), 0.95 ** (step + 1)
            w = w * (1 - (0 if coupled else lr * wd))
            w = w - lr * (m / (1 - kept1)) / (np.sqrt(v / (1 - kept2)) + 1e-8)
        found.append(w)
    return found


@pytest.mark.parametrize("resumed", [2, 5, 6])
@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("adamw", {"betas": "power", "weight_decay": "timescale", "lr": "sqrt"}),
        ("adamw", {"betas": "power"}),
        ("adamw", {"weight_decay": "timescale"}),
        ("adamw", {"weight_decay": "timescale", "lr": "linear"}),
        ("adamw", {}),
        ("adam", {"betas": "power", "lr": "sqrt"}),
    ],
)
def test_each_step_is_the_formula_s_also_where_it_is_resumed(
    name: str, rules: dict[str, str], resumed: int
) -> None:
    """Resumed at a change, before the step that makes it, and after it."""
    recipe = recipe_of(
        f"{{name: {name}, lr: {RATE}, betas: [0.9, 0.95], weight_decay: 0.1}}", **rules
    )
    trained = Trained(recipe)
    for step in range(len(BATCHES)):
        if step == resumed:
            state = optimizer_state_by_name(trained.optimizer, trained.model)
            weights = trained.model.state_dict()
            trained = Trained(recipe)
            trained.model.load_state_dict(weights)
            load_optimizer_state(trained.optimizer, trained.model, *state)
        trained.step(step)
    expected = by_formula(
        recipe,
        rules.get("betas", "none"),
        rules.get("weight_decay", "none"),
        rules.get("lr", "none"),
        coupled=name == "adam",
    )
    for p, w in zip(trained.model.parameters(), expected, strict=True):
        # torch counts steps in float32
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=2e-6, atol=1e-9)


def test_lamb_and_the_rest_of_muon_have_the_same_betas_and_their_product() -> None:
    lamb = "{name: lamb, lr: 0.05, betas: [0.9, 0.95]}"
    for optimizer in (lamb, f"{{name: muon, lr: 0.05, rest: {lamb}}}"):
        trained = Trained(recipe_of(optimizer, betas="power"))
        units = 0
        for step, batch in enumerate(BATCHES):
            trained.step(step)
            units += batch // 64
            groups = [g for g in trained.optimizer.param_groups if "betas" in g]
            assert groups
            for group in groups:
                assert group["betas"] == pytest.approx((0.9 ** (batch / 64), 0.95 ** (batch / 64)))
                for p in group["params"]:
                    t = float(trained.optimizer.state[p]["step"])
                    # beta^k to the t-th power is the product of all betas so far.
                    assert t == pytest.approx(units * 64 / batch, rel=1e-6)


def test_muon_and_its_rest_decay_by_samples() -> None:
    rest = "{name: adamw, lr: 0.01, weight_decay: 0.3}"
    optimizer = f"{{name: muon, lr: 0.05, weight_decay: 0.2, rest: {rest}}}"
    trained = Trained(recipe_of(optimizer, weight_decay="timescale", lr="sqrt"))
    for step, batch in enumerate(BATCHES):
        trained.step(step)
        decays = sorted({g["weight_decay"] for g in trained.optimizer.param_groups})
        assert decays == pytest.approx([d * (batch / 64) ** 0.5 for d in (0.0, 0.2, 0.3)])


@pytest.mark.parametrize(
    ("optimizer", "rules", "says"),
    [
        ("{name: sgd, lr: 1}", {"betas": "power"}, "betas: power .* optimizer is sgd; set it to n"),
        ("{name: lion, lr: 1}", {"betas": "power"}, "optimizer is lion"),
        ("{name: adamw, lr: 1}", {"lr": "adascale"}, "adascale is a rule for sgd"),
        ("{name: muon, lr: 1, rest: {name: sgd, lr: 1}}", {"betas": "power"}, "with rest sgd"),
        ("{name: adamw, lr: 1}", {"weight_decay": "timescale"}, "has no optimizer.weight_decay"),
        (
            "{name: sgd, lr: 1, weight_decay: 0.1}",
            {"weight_decay": "timescale"},
            "apart from the gradient, of adamw, lion and muon; sgd decays in another way",
        ),
        (
            "{name: muon, lr: 1, weight_decay: 1, rest: {name: lamb, lr: 1, weight_decay: 1}}",
            {"weight_decay": "timescale"},
            "lamb decays in another way",
        ),
    ],
)
def test_a_rule_without_a_base_is_refused(optimizer: str, rules: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe_of(optimizer, **rules)
