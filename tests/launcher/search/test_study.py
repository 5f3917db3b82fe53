"""Samplers, pruners and the study's file, on functions whose optimum is known."""

import json
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.space import Space
from bigbatch.launcher.search import study
from bigbatch.launcher.search.cma import from_unit, to_unit

NUMBERS = Space.model_validate(
    {
        "objectives": ["nll"],
        "parameters": {
            "optimizer.lr": {"type": "float", "low": 1e-3, "high": 10, "log": True},
            "optimizer.momentum": {"type": "float", "low": 0.0, "high": 1.0},
        },
    }
)
GRID = Space.model_validate(
    {
        "parameters": {
            "optimizer.momentum": {"type": "float", "low": 0.8, "high": 1.0, "step": 0.1},
            "clip": {"type": "choice", "choices": [None, {"name": "value", "limit": 1}]},
            "seed": {"type": "int", "low": 1, "high": 2},
        },
    }
)


DIGITS = load_recipe("digits")


def open_(folder: Path, space: Space, sampler="tpe", pruner="none", trials=40, recipe=DIGITS):
    return study.open_study(
        folder,
        space,
        recipe,
        sampler=sampler,
        pruner=pruner,
        seed=0,
        startup=5,
        trials=trials,
        evaluations=9,
    )


def bowl(trial: optuna.Trial) -> float:
    import math

    lr, momentum = trial.params["optimizer.lr"], trial.params["optimizer.momentum"]
    return (math.log10(lr) - 0.3) ** 2 + 4 * (momentum - 0.7) ** 2


def fill(folder: Path, sampler: str, count: int, each: int = 1000) -> optuna.Study:
    """`count` trials; the study is opened anew after each `each`, as after a kill."""
    for start in range(0, count, each):
        found = open_(folder, NUMBERS, sampler)
        for _ in range(start, min(start + each, count)):
            trial = study.ask(found, NUMBERS)
            found.tell(trial, bowl(trial))
    return found


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes"])
def test_samplers_that_learn_come_nearer_than_chance(tmp_path: Path, sampler: str) -> None:
    count = 16 if sampler == "gp" else 48
    (tmp_path / sampler).mkdir()
    learned = fill(tmp_path / sampler, sampler, count)
    last = [t.values[0] for t in learned.trials[-8:]]
    (tmp_path / "random").mkdir()
    chance = [t.values[0] for t in fill(tmp_path / "random", "random", 48).trials]
    assert sorted(last)[4] < 0.35 * sorted(chance)[24]


def test_cmaes_goes_on_where_it_was_without_a_pickle(tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = fill(tmp_path / "whole", "cmaes", 20)
    parts = fill(tmp_path / "parts", "cmaes", 20, each=3)
    assert [t.params for t in whole.trials] == [t.params for t in parts.trials]
    lines = (tmp_path / "parts" / study.JOURNAL).read_text().splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines)
    assert not any("cma:" in line for line in lines)


def test_chance_does_not_repeat_itself_after_a_restart(tmp_path: Path) -> None:
    found = fill(tmp_path, "random", 6, each=2)
    assert len({t.params["optimizer.lr"] for t in found.trials}) == 6


def test_a_grid_visits_each_point_once(tmp_path: Path) -> None:
    assert study.grid_size(GRID) == 3 * 2 * 2
    for _ in range(3):
        found = open_(tmp_path, GRID, "grid")
        for _ in range(4):
            trial = study.ask(found, GRID)
            found.tell(trial, 0.5)
    points = [json.dumps(study.values(GRID, t.params)) for t in found.trials]
    assert len(set(points)) == 12
    assert {study.values(GRID, t.params)["seed"] for t in found.trials} == {1, 2}
    assert {"name": "value", "limit": 1} in [
        study.values(GRID, t.params)["clip"] for t in found.trials
    ]


def test_nsga2_keeps_a_front(tmp_path: Path) -> None:
    tree = NUMBERS.model_dump() | {"objectives": ["nll", "seconds"]}
    space = Space.model_validate(tree)
    found = open_(tmp_path, space, "nsga2", trials=20)
    for _ in range(20):
        trial = study.ask(found, space)
        found.tell(trial, [bowl(trial), trial.params["optimizer.momentum"]])
    values = [tuple(t.values) for t in found.best_trials]
    assert values
    assert not any(a != b and a[0] <= b[0] and a[1] <= b[1] for a in values for b in values)
    assert set(study.importances(found)) == {"0", "1"}


@pytest.mark.parametrize("pruner", ["median", "halving", "hyperband"])
def test_pruners_stop_the_worst(tmp_path: Path, pruner: str) -> None:
    found = open_(tmp_path, NUMBERS, "random", pruner)
    states = []
    for number in range(24):
        trial = study.ask(found, NUMBERS)
        bad = number % 2
        for step in range(1, 10):
            trial.report(1.0 + bad + 1 / step, step)
            if trial.should_prune():
                found.tell(trial, state=TrialState.PRUNED)
                break
        else:
            found.tell(trial, 1.0 + bad)
        states.append(found.trials[-1].state)
    pruned = [s == TrialState.PRUNED for s in states]
    assert sum(pruned[1::2]) > sum(pruned[::2])


def test_another_space_or_recipe_is_refused(tmp_path: Path) -> None:
    open_(tmp_path, NUMBERS)
    open_(tmp_path, NUMBERS)
    other = load_recipe("digits", ["optimizer.lr=0.5"])
    with pytest.raises(UserError, match=r"another recipe: optimizer\.lr = 2\.0 there, 0\.5 here;"):
        open_(tmp_path, NUMBERS, recipe=other)
    with pytest.raises(UserError, match=r"another space: .*parameters\."):
        open_(tmp_path, GRID)
    open_(tmp_path, NUMBERS, recipe=load_recipe("digits", ["log.every=9"]))


@pytest.mark.parametrize(
    ("space", "sampler", "pruner", "says"),
    [
        (NUMBERS, "grid", "none", "range without steps"),
        (GRID, "cmaes", "none", "knows numbers alone"),
        (
            Space.model_validate(NUMBERS.model_dump() | {"objectives": ["nll", "ece"]}),
            "cmaes",
            "none",
            "one objective",
        ),
        (
            Space.model_validate(NUMBERS.model_dump() | {"objectives": ["nll", "ece"]}),
            "tpe",
            "median",
            "--pruner none",
        ),
        (
            Space.model_validate(NUMBERS.model_dump() | {"objectives": ["ece"]}),
            "tpe",
            "median",
            "accuracy or nll",
        ),
    ],
)
def test_what_cannot_work_is_refused(space, sampler, pruner, says) -> None:
    with pytest.raises(UserError, match=says):
        study.check(space, sampler, pruner)


@pytest.mark.parametrize(
    "distribution",
    [
        FloatDistribution(1e-4, 10, log=True),
        FloatDistribution(-1, 3),
        FloatDistribution(0.0, 1.0, step=0.25),
        IntDistribution(1, 7),
        IntDistribution(1, 1000, log=True),
    ],
)
def test_the_unit_cube_and_back(distribution) -> None:
    for u in (0.0, 0.25, 0.5, 0.999, 1.0):
        value = from_unit(u, distribution)
        assert distribution._contains(value)
        assert from_unit(to_unit(value, distribution), distribution) == pytest.approx(value)


def test_a_search_imports_no_torch() -> None:
    modules = "bigbatch.launcher.search.tune, bigbatch.launcher.search.tune_report"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("objective", ["accuracy", "nll"])
def test_importances_name_the_parameter_that_decides_the_best_trials(
    tmp_path: Path, objective: str
) -> None:
    space = Space.model_validate(NUMBERS.model_dump() | {"objectives": [objective]})
    found = open_(tmp_path, space, "random")
    sign = -1.0 if objective == "accuracy" else 1.0
    for _ in range(60):
        trial = study.ask(found, space)
        # Among the best the rate alone decides, among the worst momentum does.
        lr = abs(to_unit(trial.params["optimizer.lr"], LOG) - 0.3)
        value = lr if lr < 0.3 else 1 + trial.params["optimizer.momentum"]
        found.tell(trial, sign * value)
    share = study.importances(found)["0"]
    assert share["optimizer.lr"] > 0.8


LOG = FloatDistribution(1e-3, 10, log=True)
