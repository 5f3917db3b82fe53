"""Records on a disk that is full for a while: none is lost, torn or doubled."""

import os

import pytest

from bigbatch.configs.files import read_jsonl
from bigbatch.trainers.monitoring.jsonl import JsonLines


def test_lines_wait_for_the_disk(tmp_path, monkeypatch):
    lines, path = JsonLines(tmp_path / "a.jsonl"), tmp_path / "a.jsonl"
    assert lines.append({"step": 1}) is None
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:5]))
    assert lines.append({"step": 2}) == "no space for another line"
    assert lines.append({"step": 3}) is not None
    with pytest.raises(OSError, match="no space"):
        lines.sync()
    assert path.read_bytes() == b'{"step": 1}\n'
    monkeypatch.undo()
    assert lines.append({"step": 4}) is None
    lines.sync()
    lines.close()
    assert read_jsonl(path) == [{"step": n} for n in (1, 2, 3, 4)]


def test_what_waits_is_written_at_the_end(tmp_path, monkeypatch):
    lines = JsonLines(tmp_path / "a.jsonl")
    monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    assert "full" in str(lines.append({"step": 1}))
    monkeypatch.undo()
    lines.close()
    assert read_jsonl(tmp_path / "a.jsonl") == [{"step": 1}]
