"""A run directory in which something else stands where a run has a file or a folder."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import _FILES, _FOLDERS, RunDir, check_layout, create_run
from bigbatch.launcher.cli.main import main
from bigbatch.launcher.runs import registry
from bigbatch.trainers import worker
from bigbatch.trainers.recovery.stored import CorruptCheckpoint, verify

FILES = [name for name in _FILES if name != "recipe.yaml"]  # without which it is no run


def link_to_nothing(path: Path) -> None:
    path.symlink_to(path.parents[2] / "elsewhere")


OTHERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a folder": (Path.mkdir, FILES),
    "a file": (Path.touch, list(_FOLDERS)),
    "a pipe": (os.mkfifo, [*FILES, *_FOLDERS]),
    "a link to nothing": (link_to_nothing, [*FILES, *_FOLDERS]),
}


@pytest.fixture
def run(digits: Path, tmp_path: Path) -> RunDir:
    changes = [f"data.path={digits}", "log.wandb=off", "data.workers=0"]
    return create_run(tmp_path / "runs/a", load_recipe("digits", changes))


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bigbatch", *arguments])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.parametrize("kind", OTHERS)
def test_is_refused_by_name_and_nothing_is_touched(
    run: RunDir, kind: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ledger.jsonl that was a folder ended training in a traceback, a pipe in a hang, and a link
    to nothing let records be written where it pointed to."""
    make, names = OTHERS[kind]
    runs = run.path.parent
    monkeypatch.chdir(runs.parent)
    for name in names:
        path = run.path / name
        if path.exists():
            path.rename(runs.parent / "aside")
        make(path)
        assert registry.describe(run).state == "unreadable"
        message = f"{path} is {kind}, where a run has a {'file' if name in FILES else 'folder'}"
        with pytest.raises(UserError) as refused:
            check_layout(run)
        assert str(refused.value) == f"{message}; move it away"
        if name in ("ledger.jsonl", "events.jsonl", "logs", "checkpoints", "manifest.json"):
            assert worker.main([str(run.path)]) == 2
            said = capfd.readouterr().err
            assert said.count(message) == 1
            assert "Traceback" not in said
            for words in (["status", "a"], ["report", "a"], ["resume", "a"], ["logs", "a"]):
                assert command(monkeypatch, *words) == 2
                assert message.removeprefix(f"{runs.parent}/") in capfd.readouterr().err
            assert command(monkeypatch, "runs") == 0
            assert "unreadable" in capfd.readouterr().out
        shutil.rmtree(path) if kind == "a folder" else path.unlink()
        if (runs.parent / "aside").exists():
            (runs.parent / "aside").rename(path)
    assert sorted(p.name for p in runs.parent.iterdir()) == ["runs"]
    check_layout(run)


@pytest.mark.parametrize("kind", OTHERS)
def test_is_removed_as_any_run(run: RunDir, kind: str) -> None:
    make, names = OTHERS[kind]
    for name in names:
        (run.path / name).unlink(missing_ok=True)
        make(run.path / name)
    registry.remove(run)
    assert not run.path.exists()


def test_a_lock_that_is_none(run: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    (run.heartbeats / "rank-00000.json").mkdir(parents=True)
    assert worker.main([str(run.path)]) == 2
    assert "cannot write in" in capfd.readouterr().err
    registry.remove(run)
    assert not run.path.exists()


def test_links_to_sound_ones_may_stand_there(run: RunDir) -> None:
    for name in ("metrics.jsonl", "checkpoints"):
        elsewhere = run.path.parents[1] / name
        elsewhere.touch() if name in FILES else elsewhere.mkdir()
        (run.path / name).symlink_to(elsewhere)
    check_layout(run)


def test_a_file_that_the_run_makes_meanwhile_is_sound(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two looks at it."""
    is_file = Path.is_file

    def then_made(path: Path, **options: bool) -> bool:
        found = is_file(path, **options)
        if path == run.summary:
            path.touch()
        return found

    run.summary.unlink(missing_ok=True)
    monkeypatch.setattr(Path, "is_file", then_made)
    monkeypatch.setattr("bigbatch.configs.rundir._FILES", (run.summary.name,))
    check_layout(run)


def test_a_checkpoint_of_pipes_does_not_verify(tmp_path: Path) -> None:
    (tmp_path / "step-00000004").mkdir()
    os.mkfifo(tmp_path / "step-00000004/manifest.json")
    with pytest.raises(CorruptCheckpoint, match="no file"):
        verify(tmp_path / "step-00000004")
