"""Space files: what is allowed, and messages for what is not."""

import json
from pathlib import Path

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.space import load_space, override

GOOD = """
objectives: [accuracy, seconds]
parameters:
  optimizer.lr: {type: float, low: 1e-3, high: 10, log: true}
  schedule.cycles: {type: int, low: 1, high: 4}
  optimizer.momentum: {type: choice, choices: [0.8, 0.9]}
  loss: {type: choice, choices: [{label_smoothing: 0.1}, {label_smoothing: 0.0}]}
"""


def load(tmp_path: Path, text: str, *overrides: str):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return load_space(path, "digits", overrides)


def test_a_good_file(tmp_path: Path) -> None:
    space = load(tmp_path, GOOD)
    assert space.objectives == ["accuracy", "seconds"]
    assert list(space.parameters) == [
        *("optimizer.lr", "schedule.cycles", "optimizer.momentum", "loss")
    ]
    assert space.parameters["optimizer.lr"].ends == (1e-3, 10)


@pytest.mark.parametrize(
    "value", [1e-5, 3, True, None, "3 epochs", "off", {"name": "norm", "limit": 1.5}]
)
def test_overrides_keep_their_values(value) -> None:
    key = {str: "duration", dict: "clip"}.get(type(value), "model.options")
    if key == "model.options":
        recipe = load_recipe("digits", [override("model.options", {"some_option": value})])
        assert recipe.model.options["some_option"] == value
    elif key == "clip":
        recipe = load_recipe("digits", [override(key, value)])
        assert recipe.clip is not None
        assert json.loads(recipe.clip.model_dump_json()) == value
    elif value != "off":
        assert str(load_recipe("digits", [override(key, value)]).duration) == value


LR = "parameters: {optimizer.lr: {type: float, low: 1, high: 2"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no mapping; write lines of"),
        ("parameters: {}", r"parameters: .*at least 1 item.*such as optimizer\.lr: {type: float"),
        ("objectives: [accuracy]", "parameters: missing; write recipe keys with their ranges"),
        ("parameters: {optimizer.lr: [0.1, 1]}", "write recipe keys with their ranges, such as"),
        (LR + ", step: 5}}", "step 5 is longer than the way from 1 to 2"),
        (LR + "}}\nobjectives: [speed]", "objectives"),
        (LR + "}}\nobjectives: [nll, nll]", "name each one once"),
        (LR + "}}\nobjective: nll", "objective: unknown key"),
        (LR + ", hi: 3}}", r"optimizer\.lr\.hi: unknown key; valid keys: type, low, high"),
        (LR + ", log: true, step: 0.1}}", "exclude each other"),
        ("parameters: {optimizer.lr: {type: float, low: 2, high: 1}}", "low 2 is not below high 1"),
        ("parameters: {optimizer.lr: {type: float, low: 0, high: 1, log: true}}", "above 0"),
        ("parameters: {optimizer.lr: {type: float, low: .nan, high: 1}}", "finite"),
        ("parameters: {optimizer.lr: {type: flaot, low: 0, high: 1}}", "'float', 'int', 'choice'"),
        ("parameters: {schedule.cycles: {type: int, low: 1.5, high: 3}}", "integer"),
        ("parameters: {loss: {type: choice, choices: [{}]}}", "at least 2"),
        ("parameters: {seed: {type: choice, choices: [1, 1]}}", "written twice"),
        # What the recipe itself refuses, at either end, before anything starts.
        ("parameters: {optimizer.lrs: {type: float, low: 1, high: 2}}", "did you mean lr"),
        ("parameters: {optimizer.lr: {type: float, low: -1, high: 2}}", "greater than 0"),
        (
            "parameters: {optimizer.momentum: {type: float, low: 0.9, high: 2}}",
            "less than or equal",
        ),
        ("parameters: {micro_batch: {type: choice, choices: [64, 48]}}", "not a multiple"),
        ("[1]", "holds no mapping"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load(tmp_path, text)


def test_the_commands_own_changes_count(tmp_path: Path) -> None:
    text = "parameters: {schedule.final: {type: float, low: 0, high: 0.1}}"
    load(tmp_path, text, "schedule={name: cosine}")
    with pytest.raises(UserError, match="unknown key"):
        load(tmp_path, text, "schedule={name: one_cycle, start: 0.1}", "schedule={name: constant}")
