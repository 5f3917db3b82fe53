"""Ranks that are started together, without restarts."""

import os
import signal
import sys
from pathlib import Path

import pytest

from bigbatch.launcher import ranks
from bigbatch.trainers.recovery.signals import catch


class Replaced(Exception):
    """Stands for another program in this process's place."""


def test_one_rank_does_not_inherit_what_is_left_of_another_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: dict[str, str] = {}

    def replace(file: str, command: list[str], env: dict[str, str]) -> None:
        found.update(env)
        raise Replaced

    monkeypatch.setattr(os, "execvpe", replace)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(Replaced):
        ranks.run_ranks("module", [], None, 1)
    assert not {"WORLD_SIZE", "LOCAL_RANK", "RANK"} & found.keys()
    assert "OMP_NUM_THREADS" in found or "OMP_NUM_THREADS" in os.environ


def test_ranks_that_do_not_notice_the_end_of_one_are_asked_before_they_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 2 is killed; rank 0, when it is asked, removes what is temporary; rank 1 is deaf."""
    program = """
import os, pathlib, signal, sys, time
rank, folder = os.environ["RANK"], pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, signal.SIG_IGN if rank == "1" else lambda *_: sys.exit(143))
(folder / rank).touch()
while len(list(folder.iterdir())) < 3:
    time.sleep(0.01)
if rank == "2":
    os.kill(os.getpid(), signal.SIGKILL)
try:
    time.sleep(60)
finally:
    (folder / "removed").touch()
"""
    monkeypatch.setattr(ranks, "_GRACE_S", 0.2)
    monkeypatch.setattr(ranks, "_POLL_S", 0.01)
    (tmp_path / "folder").mkdir()
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-P", str(tmp_path / "program.py"), str(tmp_path / "folder")]
    handlers = {number: signal.getsignal(number) for number in (1, 2, 15)}
    try:
        assert ranks._run(command, [], 3, os.environ) == 128 + signal.SIGKILL
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert (tmp_path / "folder/removed").exists()
    assert capsys.readouterr().err.startswith(
        "bigbatch: rank 2 was killed (SIGKILL), as the kernel"
    )


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As nohup has it: the end of a terminal ends nothing."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert catch(lambda number, frame: None, signal.SIGHUP) == {}
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
