"""The journal of bad samples on a disk that is full for a while."""

import errno
import os
from pathlib import Path

import pytest

from bigbatch.data.journal import append, read_journal


def entry(step: int) -> dict[str, object]:
    return {"step": step, "position": 0, "sample": step, "shard": "a.tar", "reason": "0 bytes"}


@pytest.mark.parametrize("written", [0, 7])
def test_entries_wait_for_the_disk_and_training_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    written: int,
) -> None:
    path = tmp_path / "bad-samples-00000.jsonl"
    append(path, [entry(1)])
    write = os.write

    def full(handle: int, data: bytes) -> int:
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data[:written])

    monkeypatch.setattr(os, "write", full)
    append(path, [entry(2)])
    append(path, [entry(3)])
    assert len(path.read_bytes().splitlines()) == 1  # and nothing torn
    said = capsys.readouterr().err
    assert said.count(f"waits for room in {path}") == 1
    monkeypatch.undo()
    append(path, [])
    assert read_journal(tmp_path) == [entry(1), entry(2), entry(3)]
