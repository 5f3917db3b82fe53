"""One recipe trained with several seeds, as runs of their own."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json
from bigbatch.configs.load import change_recipe, load_recipe
from bigbatch.configs.rundir import RunDir
from bigbatch.launcher import members
from bigbatch.launcher.members import member_recipes, member_runs, run_members, train_members
from bigbatch.launcher.start import hold_signals
from bigbatch.trainers.recovery.signals import SAVED


def test_members_differ_by_their_seed_alone(tmp_path: Path) -> None:
    recipe = load_recipe("digits", ["seed=7"])
    found = member_recipes(recipe, 3)
    assert [member.seed for member in found] == [7, 8, 9]
    assert [change_recipe(member, ["seed=7"]) for member in found] == [recipe] * 3


def test_runs_are_gone_on_with_and_another_recipe_is_refused_before_any_is_made(
    tmp_path: Path,
) -> None:
    recipe = load_recipe("digits", [])
    runs = member_runs(tmp_path / "a", member_recipes(recipe, 2))
    assert [run.path.name for run in runs] == ["a-0", "a-1"]
    assert [run.recipe().seed for run in runs] == [recipe.seed, recipe.seed + 1]
    assert member_runs(tmp_path / "a", member_recipes(recipe, 2)) == runs
    shutil.rmtree(runs[0].path)
    other = change_recipe(recipe, ["optimizer.lr=3"])
    with pytest.raises(UserError, match=r"a-1 is there with another recipe: optimizer\.lr"):
        member_runs(tmp_path / "a", member_recipes(other, 2))
    assert not runs[0].path.exists()


class FakeChild:
    """Ends with the status that its run's name is given."""

    statuses: dict[str, int]
    most = 0
    alive = 0

    def __init__(self, run: RunDir) -> None:
        self.run, self._polls = run, 0
        cls = type(self)
        cls.alive += 1
        cls.most = max(cls.most, cls.alive)

    def poll(self) -> int | None:
        self._polls += 1
        if self._polls < 3:
            return None
        if self._polls == 3:
            type(self).alive -= 1
        return self.statuses[self.run.name]

    def wait(self) -> int:
        return self.statuses[self.run.name]

    def stop(self) -> None:
        raise AssertionError("nobody asked for that")


def start_instead(
    monkeypatch: pytest.MonkeyPatch, child: Any, shares: list[list[str]] | None = None
) -> list[int | None]:
    """Start none but `child(run)`; returns the threads that are asked for. `shares`: and GPUs."""
    threads = []
    shares = [] if shares is None else shares

    class Starts:
        def __init__(self, nproc: int, asked: int | None, *, to_the_end: bool) -> None:
            assert to_the_end
            threads.append(asked)

        def start(self, run: RunDir, gpus: list[str]) -> Any:
            shares.append(gpus)
            return child(run)

        def close(self) -> None:
            pass

    monkeypatch.setattr(members, "Children", Starts)
    monkeypatch.setattr(members, "_POLL_S", 0.0)
    return threads


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [([0, 0, 0, 0], 0), ([0, 1, 0, 0], 1), ([0, SAVED, 0, 0], SAVED)],
)
def test_statuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statuses: list[int], expected: int
) -> None:
    set_by_user = expected == 1
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_by_user:
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
    recipe = load_recipe("digits", [])
    runs = member_runs(tmp_path / "a", member_recipes(recipe, 4))
    fake = type("Fake", (FakeChild,), {"most": 0, "alive": 0})
    fake.statuses = {run.name: s for run, s in zip(runs, statuses, strict=True)}
    threads = start_instead(monkeypatch, fake)
    said: list[str] = []
    assert train_members(runs, 1, 2, said.append) == expected
    assert fake.most == 2
    assert threads == [None if set_by_user else max(1, len(os.sched_getaffinity(0)) // 2)]
    if expected == 0:
        assert said[-1].startswith(f"combine them: bigbatch ensemble {runs[0].path} ")
    if expected == 1:
        assert any("a-1 ended with status 1" in text for text in said)
    if expected == SAVED:
        assert "the same command goes on" in said[-1]


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [("4,5,6,7", [["4", "5"], ["6", "7"]]), ("0,1,2", [[], []]), ("", [[], []])],
)
def test_runs_side_by_side_have_gpus_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: str, expected: list[list[str]]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    runs = member_runs(tmp_path / "a", member_recipes(load_recipe("digits", []), 4))
    fake = type("Fake", (FakeChild,), {"most": 0, "alive": 0})
    fake.statuses = dict.fromkeys((run.name for run in runs), 0)
    shares: list[list[str]] = []
    start_instead(monkeypatch, fake, shares)
    assert train_members(runs, 2, 2, lambda text: None) == 0
    assert shares[:2] == expected
    assert sorted(shares[2:]) == expected  # whichever comes free


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_this_process_alone_reaches_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    runs = member_runs(tmp_path / "a", member_recipes(load_recipe("digits", []), 3))
    started: list[str] = []

    class Endless:
        status: int | None = None

        def __init__(self, run: RunDir) -> None:
            self.run = run
            started.append(run.name)

        def poll(self) -> int | None:
            if self.run.name == "a-1" and self.status is None:
                os.kill(os.getpid(), number)
            return self.status

        def stop(self) -> None:
            self.status = SAVED

    start_instead(monkeypatch, Endless)
    handler = signal.getsignal(number)
    signal.signal(number, lambda received, frame: pytest.fail("this process would have ended"))
    try:
        assert train_members(runs, 1, 2, lambda text: None) == SAVED
    finally:
        signal.signal(number, handler)
    assert started == ["a-0", "a-1"]


def test_ctrl_c_stops_the_runs_whatever_the_command_made_of_it_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train` says that training has not begun, which is not so any more."""
    runs = member_runs(tmp_path / "a", member_recipes(load_recipe("digits", []), 2))
    waited: list[str] = []

    class Interrupted:
        def __init__(self, run: RunDir) -> None:
            self.run = run

        def poll(self) -> int | None:
            os.kill(os.getpid(), signal.SIGINT)
            return None

        def wait(self) -> int:
            waited.append(self.run.name)
            return SAVED

    start_instead(monkeypatch, Interrupted)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    said: list[str] = []
    try:
        hold_signals(None)
        assert train_members(runs, 1, 2, said.append) == SAVED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert waited == ["a-0", "a-1"]
    assert said[-1].startswith("stopped and saved; ")


def test_what_is_finished_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = member_runs(tmp_path / "a", member_recipes(load_recipe("digits", []), 2))
    for run in runs:
        run.summary.write_text(to_json({}))
    start_instead(monkeypatch, None)
    assert train_members(runs, 1, 1, lambda text: None) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_two_members_train_side_by_side_as_they_would_alone(digits: Path, tmp_path: Path) -> None:
    from bigbatch.configs.rundir import create_run
    from bigbatch.launcher.child import Children

    short = ["duration=4 steps", "schedule={name: cosine}", "log.wandb=off", "data.workers=0"]
    recipe = load_recipe("digits", [f"data.path={digits}", *short])
    assert run_members(recipe, tmp_path / "a", 2, 1, 2) == 0
    alone = create_run(tmp_path / "alone", member_recipes(recipe, 2)[1])
    with Children(1, threads=1) as children:
        assert children.start(alone).wait() == 0
    one, two = (
        (run / "snapshots" / "cycle-01" / "model.safetensors").read_bytes()
        for run in (tmp_path / "a-1", alone.path)
    )
    assert one == two
    scores = [json.loads((tmp_path / f"a-{k}" / "summary.json").read_text()) for k in range(2)]
    assert scores[0]["val"] != scores[1]["val"]


def test_at_once_without_members_is_not_passed_over(tmp_path: Path) -> None:
    from bigbatch.launcher.cli.main import cli

    given = ["train", "digits", "--at-once", "2", "--run-dir", str(tmp_path / "r")]
    with pytest.raises(UserError, match="--at-once 2 is how many of several --members"):
        CliRunner().invoke(cli, given, catch_exceptions=False)
    assert not list(tmp_path.iterdir())
