"""An index that is replaced: readers and other writers at any moment, and what a crash leaves."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.data import index, index_files
from bigbatch.data.index import build_index, open_index
from bigbatch.data.tar import write_end, write_member

NAMES = "abc"  # each writer calls the only class by its own name
WRITER = """
import sys
from pathlib import Path
from bigbatch.data import index_files
from bigbatch.data.index import build_index
folder, name, times = sys.argv[1:4]
if "slow" in sys.argv:
    index_files._exchange = lambda *paths: False
for _ in range(int(times)):
    build_index(Path(folder), classes=[name])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with (tmp_path / "0.tar").open("wb") as file:
        for key in "wxyz":
            write_member(file, f"{key}.jpg", key.encode())
            write_member(file, f"{key}.cls", b"0")
        write_end(file)
    return tmp_path


def start_writer(folder: Path, name: str, times: int, *how: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder), name, str(times), *how])


@pytest.mark.parametrize("how", ["exchange", pytest.param("slow", marks=pytest.mark.slow)])
def test_readers_and_writers_at_once(folder: Path, how: str) -> None:
    hashes = {build_index(folder, classes=[name]).hash: name for name in NAMES}
    writers = [start_writer(folder, name, 20, how) for name in NAMES]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        index = open_index(folder)
        assert index.classes == (hashes[index.hash],)
        seen.add(index.hash)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert len(seen) > 1
    assert sorted(p.name for p in folder.iterdir()) == ["0.tar", "index"]


def test_a_killed_writer_leaves_one_index_or_the_other(folder: Path) -> None:
    build_index(folder, classes=["a"])
    if not index_files._exchange(folder / "0.tar", folder / "index"):
        pytest.skip("this file system cannot exchange two names")
    index_files._exchange(folder / "0.tar", folder / "index")
    writer = start_writer(folder, "b", 10**6)
    while open_index(folder).classes == ("a",):
        assert writer.poll() is None
    writer.kill()
    writer.wait()
    assert open_index(folder).classes == ("b",)
    assert build_index(folder, classes=["a"]).classes == ("a",)
    assert not list(folder.glob("index.tmp-*"))


def test_what_a_dead_writer_left_goes_and_a_living_one_s_stays(folder: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    here = socket.gethostname()
    for name in (f"{dead.pid}-{here}", f"old-{dead.pid}-{here}", "123", f"{os.getpid()}-{here}"):
        (folder / f"index.tmp-{name}").mkdir()
    living = [folder / f"index.tmp-{os.getppid()}-{here}", folder / "index.tmp-1-elsewhere"]
    for path in living:
        path.mkdir()
    build_index(folder)
    assert sorted(folder.glob("index.tmp-*")) == sorted(living)


def test_keys_are_those_of_the_index_that_was_opened(folder: Path) -> None:
    index = build_index(folder, classes=["a"])
    assert index.keys() == list("wxyz")
    build_index(folder, classes=["b"])
    with pytest.raises(UserError, match="was replaced meanwhile"):
        index.keys()


def test_the_folder_of_another_writer_may_go_at_any_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (other := folder / "index.tmp-1-elsewhere").mkdir()
    is_dir = Path.is_dir

    def gone_when_looked_at(path: Path) -> bool:
        found = is_dir(path)
        if path == other:
            other.rmdir()
        return found

    monkeypatch.setattr(Path, "is_dir", gone_when_looked_at)
    assert index._beside(folder) == {}
