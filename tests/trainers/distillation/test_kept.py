"""Outputs on the disk: what was written is read, and nothing else is ever taken for it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.trainers.distillation.kept import KeptOutputs, key_of, record_size, reserve

STEPS, MICRO, ROWS, WIDTH = 3, 2, 4, 5
VIEW: dict[str, Any] = {"teacher": "a", "seed": 1}
STEP_BYTES = MICRO * record_size(ROWS, WIDTH, "float32")


def kept_in(folder: Path, view: dict[str, Any] = VIEW, steps: int = STEPS) -> KeptOutputs:
    return KeptOutputs(
        folder / key_of(view), steps=steps, first=lambda step: step * MICRO, rows=ROWS, width=WIDTH,
        kind="float32",
    )  # fmt: skip


def room(folder: Path, view: dict[str, Any] = VIEW, steps: int = STEPS, limit: int = 10**6) -> int:
    return reserve(folder, view, steps=steps, step_bytes=STEP_BYTES, limit=limit)


def outputs(step: int, index: int) -> np.ndarray:
    return np.random.default_rng([step, index]).normal(size=(ROWS, WIDTH)).astype(np.float32)


def samples(step: int, index: int) -> np.ndarray:
    return np.arange(ROWS) + 100 * step + 10 * index


PLACES = [(s, m) for s in range(STEPS) for m in range(MICRO)]


def test_any_process_reads_what_another_wrote(tmp_path: Path) -> None:
    assert room(tmp_path) == STEPS
    writers = [kept_in(tmp_path), kept_in(tmp_path)]
    for number, place in enumerate(PLACES):
        assert writers[0].read(*place, samples(*place)) is None
        writers[number % 2].write(*place, samples(*place), outputs(*place))
    assert room(tmp_path) == STEPS
    reader = kept_in(tmp_path)
    for place in PLACES:
        found = reader.read(*place, samples(*place))
        assert found is not None
        assert found.tobytes() == outputs(*place).tobytes()


def test_outputs_of_other_samples_are_no_answer(tmp_path: Path) -> None:
    room(tmp_path)
    kept = kept_in(tmp_path)
    kept.write(1, 0, samples(1, 0), outputs(1, 0))
    other = samples(1, 0)
    other[-1] += 1
    assert kept.read(1, 0, other) is None
    assert kept.read(1, 1, samples(1, 0)) is None
    assert kept.read(1, 0, samples(1, 0)) is not None


def test_a_step_beyond_those_kept_is_neither_written_nor_read(tmp_path: Path) -> None:
    assert room(tmp_path, limit=2 * STEP_BYTES) == 2
    kept = kept_in(tmp_path, steps=2)
    kept.write(2, 0, samples(2, 0), outputs(2, 0))
    assert kept.read(2, 0, samples(2, 0)) is None
    assert (tmp_path / key_of(VIEW) / "outputs").stat().st_size == 2 * STEP_BYTES


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_record_with_any_bit_turned_or_cut_short_is_none(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("kept")
    room(folder)
    kept = kept_in(folder)
    kept.write(0, 1, samples(0, 1), outputs(0, 1))
    size, file = record_size(ROWS, WIDTH, "float32"), folder / key_of(VIEW) / "outputs"
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        place = data.draw(st.integers(size, 2 * size - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(content)
    else:
        file.write_bytes(content[: data.draw(st.integers(0, 2 * size - 1))])
    assert kept_in(folder).read(0, 1, samples(0, 1)) is None


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(0, 12)), max_size=12))
def test_all_views_together_stay_within_the_limit(
    tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[int, int, int]]
) -> None:
    """Views that ask in any order, for more steps or fewer, under a limit that changes."""
    folder = tmp_path_factory.mktemp("kept")
    largest = 0
    for view, steps, limit in asked:
        before = {f: f.stat().st_size for f in folder.glob("*/outputs")}
        granted = room(folder, VIEW | {"seed": view}, steps, limit * STEP_BYTES + 1)
        largest = max(largest, limit * STEP_BYTES + 1)
        after = {f: f.stat().st_size for f in folder.glob("*/outputs")}
        assert sum(after.values()) <= largest
        assert all(after[file] >= size for file, size in before.items())
        assert granted <= steps
        others = sum(after.values()) - after[folder / key_of(VIEW | {"seed": view}) / "outputs"]
        if others + steps * STEP_BYTES <= limit * STEP_BYTES + 1:
            assert granted == steps


def test_each_part_of_a_view_gives_a_folder_of_its_own() -> None:
    keys = {key_of(VIEW), key_of(VIEW | {"seed": 2}), key_of(VIEW | {"teacher": "b"})}
    assert len(keys) == 3
    assert key_of(dict(reversed(VIEW.items()))) == key_of(VIEW)
