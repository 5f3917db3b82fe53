"""What a killed or a lonely rank leaves behind must not stop the next start."""

import errno
import os
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.rundir import RunDir
from bigbatch.trainers.ensemble import members
from bigbatch.trainers.ensemble.combine import combine
from bigbatch.trainers.ensemble.members import save_snapshot
from bigbatch.trainers.recovery import resume
from bigbatch.trainers.recovery.resume import acquire_run_lock
from bigbatch.trainers.recovery.stored import list_snapshots


def test_a_snapshot_is_kept_where_a_killed_attempt_left_half_of_it(tmp_path):
    # Of the same process id, as containers give it at every start, and of another one.
    for pid in (os.getpid(), 1):
        (tmp_path / f"cycle-01.tmp-{pid}").mkdir()
    save_snapshot(tmp_path, 1, 10, nn.Linear(2, 2), {"accuracy": 0.5})
    assert [path.name for path in list_snapshots(tmp_path)] == ["cycle-01"]
    assert [path.name for path in tmp_path.iterdir()] == ["cycle-01"]


def test_a_snapshot_that_the_disk_refuses_takes_no_room(tmp_path, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(members, "sync", refuse)
    with pytest.raises(OSError, match="No space"):
        save_snapshot(tmp_path, 1, 10, nn.Linear(2, 2), {"accuracy": 0.5})
    assert list(tmp_path.iterdir()) == []


def test_a_lost_snapshot_is_missed_on_every_rank(tmp_path):
    save_snapshot(tmp_path / "snapshots", 1, 10, nn.Linear(2, 2), {"accuracy": 0.5})
    for rank in (0, 1):  # what rank 0 sees counts: another machine may see it later
        engine: Any = SimpleNamespace(rank=rank, module=None, from_main=lambda value: ["cycle-01"])
        run = RunDir(tmp_path if rank == 0 else tmp_path / "elsewhere")
        with pytest.raises(UserError, match="snapshots holds 1 of 3 snapshots"):
            combine(run, None, engine, None, {}, 3, recompute=None)  # type: ignore[arg-type]


def test_files_that_a_killed_start_was_writing_go_at_the_next_one(tmp_path):
    (tmp_path / "ensemble").mkdir()
    half = [".augmented.png.tmp-7", ".metrics.jsonl.tmp-7", "ensemble/.confusion.json.tmp-7"]
    others = [".recipe.yaml.tmp-7", ".manifest.json.tmp-7", ".report.html.tmp-7"]  # may be alive
    for name in (*half, *others, "metrics.jsonl"):
        (tmp_path / name).touch()
    engine: Any = SimpleNamespace(rank=0, on_main=lambda compute: compute())
    acquire_run_lock(RunDir(tmp_path), engine).close()
    assert not any((tmp_path / name).exists() for name in half)
    assert all((tmp_path / name).exists() for name in (*others, "metrics.jsonl"))


def test_a_rank_whose_machine_cannot_write_says_so_itself(tmp_path, monkeypatch):
    def refuse(*args: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(resume, "Heartbeat", refuse)
    engine: Any = SimpleNamespace(rank=1, on_main=lambda compute: None)  # rank 0 is well
    with pytest.raises(UserError, match="Read-only file system"):
        acquire_run_lock(RunDir(tmp_path), engine)
