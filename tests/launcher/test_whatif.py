"""Twins of a run: what is asked of them, how they are compared, and real ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher.child import OUTPUT, RunFailed
from bigbatch.launcher.cli.main import cli
from bigbatch.launcher.whatif import (
    Twin,
    changes,
    compare,
    find_start,
    in_words,
    make_twins,
    train_twins,
)
from bigbatch.trainers import worker
from bigbatch.trainers.evaluation.outcomes import Outcomes, outcomes
from bigbatch.trainers.recovery.signals import SAVED

SMALL = (
    "model=test_resnet",
    "data={workers: 0, threads: 1, image_size: 16, sampling: uniform}",
    "log={wandb: off, diagnosis: false}",
    "duration=80 steps",
    "global_batch=32",
    "micro_batch=16",
    "schedule={name: constant}",
    "augment.mixup=0",
    "checkpoint={every: 5 steps, keep: 9}",
    "evaluate.every=80 steps",
    "ensemble.soup=false",
)


def test_values_and_multiples_of_the_recipes_own() -> None:
    recipe = load_recipe("digits", ["optimizer.lr=0.3"])
    assert changes(recipe, ["optimizer.lr=0.1x, 2x,0.7"]) == [
        "optimizer.lr=0.03",
        "optimizer.lr=0.6",
        "optimizer.lr=0.7",
    ]
    assert changes(recipe, ["global_batch=2x", "augment.mixup=0"]) == [
        "global_batch=512",
        "augment.mixup=0",
    ]
    part = "schedule={name: cosine, warmup: 2 epochs}"
    assert changes(recipe, [part]) == [part]
    assert changes(recipe, ["optimizer.lr=1e-1x,0.03"]) == ["optimizer.lr=0.03"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("optimizer.lr", "write KEY=VALUE"),
        ("optimizer.lr=", "write KEY=VALUE"),
        ("optimizer.name=2x", "a multiple is of a number, and optimizer.name is 'lars'"),
        ("optimizer.rate=2x", "a multiple is of a number, and optimizer.rate is None"),
        ("optimizer.lr=1x", "changes nothing"),
        ("optimizer.lr=fast", "optimizer.lr"),
    ],
)
def test_what_cannot_be_asked(text: str, why: str) -> None:
    with pytest.raises(UserError) as error:
        changes(load_recipe("digits"), [text])
    assert why in str(error.value)


def said(p: float, count: int, seed: int) -> tuple[list[str], Outcomes]:
    """Of labels of two classes, the right one with a probability around `p`."""
    noise = np.random.default_rng(seed).normal(0, 0.05, count)
    chosen = np.clip(p + noise, 0.01, 0.99)
    labels = np.arange(count) % 2
    rows = np.where(labels[:, None] == [[0, 1]], chosen[:, None], 1 - chosen[:, None])
    return [f"{i:04d}" for i in range(count)], outcomes(rows, labels)


def test_the_better_one_is_named_with_intervals_and_equals_are_not() -> None:
    found = {"unchanged": said(0.6, 400, 0), "b": said(0.8, 400, 1), "c": said(0.8, 400, 2)}
    result = compare(found, {})
    assert result["samples"] == 400
    first, second, third = result["pairs"]
    assert (first["first"], first["second"]) == ("unchanged", "b")
    low, high = first["loss"]["interval"]
    assert low < first["loss"]["difference"] < high < -0.2
    losses = {name: each.losses for name, (_, each) in found.items()}
    difference = (losses["b"] - losses["unchanged"]).mean()
    assert first["loss"]["difference"] == pytest.approx(difference)
    assert second["loss"]["interval"][1] < 0
    assert third["loss"]["interval"][0] < 0 < third["loss"]["interval"][1]
    assert result["beaten"] == ["unchanged"]
    assert "is not told apart from" in in_words(result)[-1]
    two = compare({"unchanged": found["unchanged"], "b": found["b"]}, {})
    assert in_words(two)[-1].startswith("b is better than unchanged: the interval")
    # Of one pair the level is 95 %, of three it is wider.
    narrow, wide = two["pairs"][0]["loss"]["interval"], first["loss"]["interval"]
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_one_that_goes_wrong_is_beaten_and_other_images_are_refused() -> None:
    found = {"optimizer.lr=0.1": said(0.6, 50, 0)}
    result = compare(found, {"unchanged": "step 3: loss nan"})
    assert (result["best"], result["beaten"]) == ("optimizer.lr=0.1", ["unchanged"])
    assert in_words(result)[-2:] == [
        "unchanged: went wrong: step 3: loss nan",
        "optimizer.lr=0.1 is better: all others went wrong",
    ]
    assert in_words(compare({}, {"a": "?"}))[-1] == "all went wrong: there is none to name"
    other = [f"x{key}" for key in found["optimizer.lr=0.1"][0]]
    with pytest.raises(RunFailed, match="other images"):
        compare({**found, "b": (other, found["optimizer.lr=0.1"][1])}, {})


class Ended:
    """In place of the processes of twins: each ends at once with a status."""

    def __init__(self, status: int, event: str) -> None:
        self.status, self.event = status, event

    def start(self, run: RunDir, stop: int) -> "Ended":
        run.events.write_text(json.dumps({"kind": self.event}) + "\n")
        (run.path / OUTPUT).write_text("one\nbigbatch: step 3: loss nan\n")
        return self

    def wait(self, watch: object) -> int:
        return self.status


@pytest.mark.parametrize(
    ("status", "event", "why"),
    [(1, "non_finite", "status 1"), (2, "start", "status 2"), (SAVED, "start", "by a signal")],
)
def test_what_ends_otherwise_is_no_result(
    tmp_path: Path, status: int, event: str, why: str
) -> None:
    twin = Twin("unchanged", RunDir(tmp_path), 4)
    gone: Any = Ended(2, "non_finite")
    assert train_twins([twin], gone, lambda twin, step: None) == {"unchanged": "step 3: loss nan"}
    ended: Any = Ended(status, event)
    with pytest.raises(RunFailed, match=why):
        train_twins([twin], ended, lambda twin, step: None)


@pytest.fixture(scope="module")
def slow_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """One whose rate is 100 times too low, ten steps of it."""
    changes = [f"data.path={digits}", *SMALL, "optimizer={name: sgd, lr: 0.0003, momentum: 0.9}"]
    recipe = load_recipe("digits", changes)
    run = create_run(tmp_path_factory.mktemp("runs") / "slow", recipe)
    assert worker.main([str(run.path), "--stop-at", "10"]) == 0
    return run


def test_twins_begin_at_or_before_the_step(slow_run: RunDir, tmp_path: Path) -> None:
    assert [find_start(slow_run, step).step for step in (0, 4, 5, 9, 12)] == [0, 0, 5, 5, 10]
    start = find_start(slow_run, 9)
    overrides = ["optimizer.lr=0.1", "global_batch=16"]
    twins = make_twins(slow_run, start, overrides, 4, tmp_path)
    assert [(t.name, t.stop) for t in twins] == [
        ("unchanged", 9),
        ("optimizer.lr=0.1", 9),
        ("global_batch=16", 18),  # as many images
    ]
    assert twins[1].run.recipe().optimizer.lr == 0.1
    origin = twins[1].run.forked_from
    assert origin is not None
    assert (origin["at"], origin["run"]) == (5, str(slow_run.path))
    with pytest.raises(UserError, match="has 75 left, of 80"):
        make_twins(slow_run, start, overrides, 76, tmp_path / "more")
    with pytest.raises(UserError, match="no checkpoint at or before step 3"):
        find_start(twins[1].run, 3)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            (
                "duration=2560 samples",
                "global_batch={name: noise_scale, start: 32, most: 64, every: 320 samples}",
                "checkpoint.every=1 epochs",
            ),
            "global_batch noise_scale is decided on by each twin",
        ),
        (("loss=l2", "augment.cutmix=0"), "loss l2 learns targets"),
    ],
)
def test_twins_that_cannot_be_compared_are_refused(
    digits: Path, tmp_path: Path, changes: tuple[str, ...], why: str
) -> None:
    """Before one is trained; of a run, and of a change of one."""
    settings = [f"data.path={digits}", *SMALL]
    recipe = load_recipe("digits", [*settings, *changes], say=None)
    run = create_run(tmp_path / "run", recipe)
    with pytest.raises(UserError, match=f"run: {why}"):
        make_twins(run, find_start(run, 0), ["optimizer.lr=0.1"], 4, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("step", [10, 0])
def test_the_higher_rate_is_named_where_it_is_100_times_too_low(
    slow_run: RunDir, tmp_path: Path, step: int
) -> None:
    before = {path: path.stat().st_mtime_ns for path in slow_run.path.rglob("*")}
    words = ["whatif", str(slow_run.path), "--step", str(step), "--steps", "40", "--nproc", "1"]
    words += ["--set", "optimizer.lr=100x", "--keep", str(tmp_path / "twins"), "--json"]
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["from"], result["best"]) == (step, "optimizer.lr=0.03")
    assert result["beaten"] == ["unchanged"]
    (pair,) = result["pairs"]
    assert pair["loss"]["interval"][1] < 0
    assert {path: path.stat().st_mtime_ns for path in slow_run.path.rglob("*")} == before
    # Common random numbers: in the first step of both, nothing differs yet.
    first = [
        json.loads((tmp_path / f"twins/twin-{n}/metrics.jsonl").read_text().splitlines()[step])
        for n in (0, 1)
    ]
    assert [r["step"] for r in first] == [step + 1] * 2
    assert first[0]["loss"] == first[1]["loss"]
