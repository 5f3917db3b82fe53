"""Recipes with options of every family, drawn at random: each is proven, or refused in words.

BIGBATCH_RANDOM_RECIPES=200 python -m pytest -m slow tests/launcher/test_random_recipes.py

draws as many as that; a few are drawn without it.
"""

import os
import random
from functools import cache
from pathlib import Path

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.schema import Recipe
from bigbatch.launcher.prove import prove

COUNT = int(os.environ.get("BIGBATCH_RANDOM_RECIPES", "4"))
BASE = (
    *("model={name: test_resnet}", "data.image_size=32", "data.workers=0", "log.wandb=off"),
    *("global_batch=64", "micro_batch=16", "duration=9 steps", "schedule={name: cosine}"),
    *("reduction=exact", "augment={mean: [0.3], std: [0.4]}", "evaluate.every=99 steps"),
)
# Each family's choices; an empty one leaves the recipe as it is. Several of OPS are drawn. There is
# no instance norm: it wants maps larger than those with which this network ends.
FAMILIES: dict[str, tuple[str, ...]] = {
    "loss": (
        *("", "{label_smoothing: 0.1}", "{class_weights: balanced}", "{name: poly1}"),
        *("{name: bce}", "{name: bce, over_classes: mean}", "{name: focal_sigmoid}"),
        *("{name: focal_softmax, class_weights: {name: effective_number, beta: 0.99}}",),
        *("{name: hinge}", "{name: ramp}", "{name: logit_adjusted}", "{name: ldam}"),
        *("{name: large_margin}", "{name: arcface}", "{name: cosface}", "{name: center}"),
        *("{name: confusion_cost}", "{class_weights: balanced, class_weights_from: 2 steps}"),
    ),
    "augment.mixup": ("0", "0", "0.2"),
    "augment.cutmix": ("", "", "1.0"),
    "augment.crop": ("", "{}"),
    "augment.flip": ("", "0.5"),
    "augment.affine": ("", "{degrees: 10, scale: 0.1}"),
    "augment.jitter": ("", "{brightness: 0.4, contrast: 0.4}"),
    "model.norm": (
        *("", "", "{name: group, groups: 4}", "{name: layer}"),
        *("{name: filter_response}", "{name: batch_renorm, ramp_steps: 2}"),
        "{name: ghost_batch, samples: 8}",
    ),
    "model.head": ("", "", "{name: cosine, scale: 16}", "{name: linear, feature_norm: layer}"),
    "model.attention": (
        "",
        "",
        "{name: se, stages: [2]}",
        "{name: cbam, stages: [3]}",
        "{name: scse, stages: [1]}",
    ),
    "model.pool": ("", "", "{name: generalised_mean}", "{name: stochastic}"),
    "model.activation": ("", "", "SiLU", "PReLU"),
    "model.weight_standardization": ("", "true"),
    "model.recompute": ("", "", "true"),
    "model.options": ("", "{drop_rate: 0.2}"),
    "model.init": ("", "{weights: {name: he}}", "{weights: {name: orthogonal}, bias: 0.1}"),
    "optimizer": (
        *("{name: sgd, lr: 0.05, nesterov: true}", "{name: adamw, lr: 0.001}"),
        *("{name: lars, lr: 0.5}", "{name: lamb, lr: 0.01}", "{name: lion, lr: 0.0003}"),
        "{name: muon, lr: 0.1, momentum: 0.6, rest: {name: lamb, lr: 0.03}}",
        "{name: sgd, lr: 0.05, momentum_schedule: "
        "{name: constant, warmup: 4 steps, warmup_start: 0.5}}",
    ),
    "clip": ("null", "{name: norm, limit: 1}"),
    "average": (
        *("", "{name: ema, half_life: 3 steps}"),
        "{name: swa, start: 1 steps, every: 1 steps}",
    ),
    "data.sampling": ("uniform", "uniform", "balanced"),
    "augment.class_strength": ("", "", "{alpha: 1, least: 0.1}"),
    "data.repeats": ("", "", "2"),
    "data.image_size": ("", "", "", "[24, 40]"),
    "evaluate.crop_mode": ("", "", "squash"),
    "data.progressive": ("", "", "{start: 16, until: 2 steps, multiple: 8}"),
    "evaluate.image_size": ("", "", "40"),
    "regularise": (
        *("", "", "{l1: 1e-5}", "{max_norm: 3}", "{drop_connect: 0.2}", "{input_noise: 0.1}"),
        *("{sharpness: {name: sam}}", "{sharpness: {name: asam}, input_noise: 0.1}"),
    ),
    "model.joined_stages": ("", "", "[layer1, layer3]"),
    "transfer": ("", "", "{name: all, stage_decay: 0.7}", "{name: all, rates: {head: 3}}"),
}
OPS = (
    *("{name: rotate, degrees: 15}", "vertical_flip", "{name: pad_crop, padding: 2}"),
    *("perspective", "blur"),
    *("invert", "solarize", "posterize", "equalize", "autocontrast", "sharpen", "noise"),
    *("randaugment", "{name: autoaugment, policy: cifar10}", "trivialaugment"),
)


def drawn(seed: int) -> list[str]:
    """Keys of a recipe, from the seed alone; they may contradict each other."""
    chance = random.Random(f"recipe {seed}")
    keys = [f"seed={seed}"]
    for key, choices in FAMILIES.items():
        if choice := chance.choice(choices):
            keys.append(f"{key}={choice}")
    ops = chance.sample(OPS, chance.randint(0, 3)) + ["erasing"] * chance.randint(0, 1)
    return [*keys, f"augment.ops=[{', '.join(ops)}]"]


@cache
def recipes(digits: Path, count: int) -> list[Recipe]:
    """The first of those drawn that contradict nothing; the others are refused as users' errors."""
    found: list[Recipe] = []
    for seed in range(100 * count):
        try:
            found.append(load_recipe("digits", [*BASE, f"data.path={digits}", *drawn(seed)], None))
        except UserError:
            continue
        if len(found) == count:
            break
    return found


def test_every_choice_is_drawn_in_recipes_that_are_taken(digits: Path) -> None:
    """Of each family and operation each choice, so that none of them is refused always."""
    missing = {(key, c) for key, choices in FAMILIES.items() for c in choices if c} | set(OPS)
    for seed in range(3000):
        keys = drawn(seed)
        there = {tuple(key.split("=", 1)) for key in keys} | {op for op in OPS if op in keys[-1]}
        if not there & missing:
            continue
        try:
            load_recipe("digits", [*BASE, f"data.path={digits}", *keys], None)
        except UserError:
            continue
        missing -= there
        if not missing:
            break
    assert missing == set()


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("number", range(COUNT))
def test_a_random_recipe_is_proven(digits: Path, tmp_path: Path, number: int) -> None:
    """Two steps and more on one and two ranks, and killed and resumed: the same weights."""
    recipe = recipes(digits, COUNT)[number]
    results = prove(recipe, tmp_path, steps=3, ranks=(1, 2), say=lambda text: None)
    assert [result.difference for result in results] == [0.0, 0.0], recipe
    assert all(result.passed for result in results)
