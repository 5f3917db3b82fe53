"""Runs as children: what they are started with."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe, parse_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher import child
from bigbatch.launcher.child import OUTPUT, Children, bare_recipe
from bigbatch.launcher.start import agent_command
from bigbatch.trainers.planning.plan import make_plan


def test_a_bare_run_has_no_schedule_of_the_whole_one() -> None:
    momentum = "{name: constant, warmup: 3 epochs, warmup_start: 0.9}"
    keys = ["optimizer={name: sgd, lr: 1}", f"optimizer.momentum_schedule={momentum}"]
    keys.append("data.progressive={start: 16, until: 9 epochs}")
    weights = "class_weights: {name: effective_number}, class_weights_from: 9 epochs"
    keys += [f"loss={{{weights}}}", "data.sampling=uniform"]
    recipe = load_recipe("digits", [*keys, "average={name: ema, half_life: 9 epochs}"])
    tree = bare_recipe(recipe, 4)
    assert "momentum_schedule" not in tree["optimizer"]
    assert tree["data"]["progressive"] is None
    short = parse_recipe(tree, "bare")
    assert make_plan(short, 1000).weights_from == 0
    assert short.loss.class_weights == recipe.loss.class_weights
    assert tree["average"]["half_life"] == "1 steps"


class Parent:
    """Stands for the process to fork from."""

    def __init__(self, modules: tuple[str, ...], env: dict[str, str]) -> None:
        self.modules, self.env = modules, env
        self.started: list[tuple[list[str], dict[str, Any]]] = []
        self.closed = False

    def popen(self, command: list[str], **options: Any) -> None:
        options["stdout"] = options["stdout"].name
        self.started.append((command, options))

    def close(self) -> None:
        self.closed = True


def test_runs_of_a_command_are_forks_with_one_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "start_parent", Parent)
    monkeypatch.delenv("OMP_NUM_THREADS")
    run = create_run(tmp_path / "run", load_recipe("digits"))
    with Children(2, threads=3) as children:
        assert "parent" not in vars(children)  # a search may start none
        children.start(run, stop_at=5)
        children.start(run, nproc=1)
        parent: Any = children.parent
    assert parent.closed
    commands = [command for command, _ in parent.started]
    assert commands == [agent_command(run.path, 2, stop_at=5), agent_command(run.path, 1)]
    for _, options in parent.started:
        # What differs from the variables that libraries were loaded with is no fork.
        assert options["env"] == parent.env
        assert options["stdout"] == str(run.path / OUTPUT)
        assert options["stderr"] == subprocess.STDOUT
    assert parent.env["OMP_NUM_THREADS"] == "3"
    assert "bigbatch.trainers.report.report" not in parent.modules
    whole: Any = Children(1, to_the_end=True).parent
    assert "bigbatch.trainers.report.report" in whole.modules
    # As many threads as `bigbatch train` chooses.
    assert whole.env["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))


def test_a_run_that_is_gone_is_said(tmp_path: Path) -> None:
    """Somebody removed it while others of its command trained."""
    with Children(1) as children, pytest.raises(UserError, match=r"cannot start .*gone: .*No such"):
        children.start(RunDir(tmp_path / "gone"))
