"""Files: strict JSON from every writer, whatever a run measured."""

import ast
import json
import math
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.configs import files
from bigbatch.configs.files import appearing, finite, iter_jsonl, iter_lines, read_jsonl, to_json

ROOT = Path(__file__).parents[2]
# Texts that no file holds as JSON: hashes, keys to compare by, what a message shows, overrides,
# and the pipe between a loader and its own workers.
NO_FILES = {
    "configs/files.py": 2,  # to_json itself
    "configs/identity.py": 2,
    "configs/space.py": 2,
    "data/index_files.py": 1,
    "data/journal.py": 1,
    "data/workers.py": 3,
    "data/writing/shard.py": 1,
    "launcher/cli/training.py": 1,
    "launcher/search/study.py": 1,
    "trainers/distillation/kept.py": 1,
    "trainers/distillation/teacher.py": 1,
    "trainers/export/standalone.py": 1,
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(VALUES)
def test_any_plain_value_becomes_strict_json(value: object) -> None:
    text = to_json(value)
    assert json.loads(text, parse_constant=pytest.fail) == finite(value)
    assert text == json.dumps(finite(value))  # what is finite is written as ever, bit for bit


def test_what_is_not_finite_is_null_at_any_depth() -> None:
    value = {"a": [1.5, math.nan, (math.inf,)], "b": {"c": -math.inf}, "d": Path("x")}
    assert to_json(value, default=str) == '{"a": [1.5, null, [null]], "b": {"c": null}, "d": "x"}'


def test_a_file_of_an_older_version_is_read_with_its_nan(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"loss": NaN}\n{"loss": 1.0}\n{"torn')
    first, second = read_jsonl(tmp_path / "a.jsonl")
    assert math.isnan(first["loss"])
    assert second == {"loss": 1.0}


def test_no_writer_bypasses_to_json() -> None:
    """json.dumps writes NaN, which no JSON parser outside Python has to read."""
    found: dict[str, int] = {}
    for room in ("configs", "data", "trainers", "launcher"):
        for path in (ROOT / room).rglob("*.py"):
            calls = [n for n in ast.walk(ast.parse(path.read_text())) if _is_call(n)]
            if calls:
                found[path.relative_to(ROOT).as_posix()] = len(calls)
    assert found == NO_FILES


def _is_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump")


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("old")

    def break_off() -> None:
        with appearing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert path.read_text() == "old"
    with appearing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_that_is_nested_too_deeply_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b"[" * 100_000 + b'\n{"step": 2}\n')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


@given(st.lists(st.sampled_from([b"\n", b"a", b"bc", b"xyz" * 4]), max_size=30), st.integers(1, 20))
def test_lines_are_those_of_the_file_in_both_directions(parts: list[bytes], block: int) -> None:
    data = b"".join(parts)
    with pytest.MonkeyPatch.context() as patch, tempfile.NamedTemporaryFile() as file:
        patch.setattr(files, "_BLOCK", block)
        Path(file.name).write_bytes(data)
        lines = data.split(b"\n")[:-1]  # what has no end is torn
        assert list(iter_lines(Path(file.name))) == lines
        assert list(iter_lines(Path(file.name), newest_first=True)) == lines[::-1]
        assert list(iter_lines(Path(file.name), b"a", b"z")) == [
            line for line in lines if b"a" in line or b"z" in line
        ]


def test_a_line_without_end_takes_no_memory_and_hides_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_BLOCK", 1 << 10)
    monkeypatch.setattr(files, "_LONGEST_LINE", 1 << 14)
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b" " * (1 << 20) + b'\n{"a": 2}\n{"a":')
    tracemalloc.start()
    try:
        assert list(iter_jsonl(path)) == [{"a": 1}, {"a": 2}]
        assert list(iter_jsonl(path, newest_first=True)) == [{"a": 2}, {"a": 1}]
        assert tracemalloc.get_traced_memory()[1] < 1 << 18
    finally:
        tracemalloc.stop()
