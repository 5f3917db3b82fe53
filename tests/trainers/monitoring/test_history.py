"""A run's records read back: once, and of very many every so many."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import create_run
from bigbatch.trainers.monitoring import history
from bigbatch.trainers.monitoring.history import read_history, read_records, timed_steps


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def train(step: int) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 1 / step, "slowest": {"rank": step % 7}}


def test_metrics_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were gone through once for each kind: a report of 200 MB took 100 s."""
    run = create_run(tmp_path / "run", load_recipe("digits", ["log.wandb=off"]))
    records = [train(step) for step in range(1, 40)]
    records += [
        {"kind": "eval", "step": 39, "split": split, "accuracy": a} for split, a in
        (("val", 0.5), ("test", 0.25))
    ]  # fmt: skip
    records += [{"kind": "trust", "step": step, "ratios": {"a": step}} for step in (1, 2)]
    records += [{"kind": "ranks", "step": step, "phases": [], "seconds": []} for step in (3, 4)]
    records += [{"kind": "probe", "step": 39, "images": 7}, {"kind": "confusion", "matrix": [[1]]}]
    write(run.metrics, records)
    run.metrics.write_bytes(b'{"kind": "train", "st\n' + run.metrics.read_bytes())
    opened: list[Path] = []
    real = history.iter_lines

    def counted(path: Path, *words: bytes) -> Iterator[bytes]:
        opened.append(path)
        return real(path, *words)

    monkeypatch.setattr(history, "iter_lines", counted)
    found = read_history(run)
    assert opened.count(run.metrics) == 1
    assert found.train["step"].tolist() == list(range(1, 40))
    assert {s: c["accuracy"].tolist() for s, c in found.evals.items()} == {
        "val": [0.5],
        "test": [0.25],
    }
    assert found.trust["a"].tolist() == [1, 2]
    assert found.ranks is not None
    assert found.ranks["step"] == 4
    assert found.slowest == {"rank": 39 % 7}
    assert [probe["images"] for probe in found.probes] == [7]


def test_samples_where_the_batch_changes(tmp_path: Path) -> None:
    """A branch may have no records but its parent's, whose batch was a number."""
    growing = "global_batch={name: stages, pieces: [{batch: 64, until: 1 epochs}, {batch: 256}]}"
    run = create_run(tmp_path / "run", load_recipe("digits", [growing]))
    write(run.metrics, [])
    assert read_history(run).samples == 0
    write(run.metrics, [train(1), train(2)])
    found = read_history(run)
    assert (found.samples, found.batches.tolist()) == (128, [64, 64])
    write(run.metrics, [train(1), train(2) | {"global_batch": 256, "samples": 320}])
    found = read_history(run)
    assert (found.samples, found.batches.tolist()) == (320, [64, 256])


@pytest.mark.parametrize("count", [1000, 1029, 12_345])
def test_of_very_many_records_the_first_the_last_and_every_so_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setitem(history._MOST, "train", 512)
    splits = [{"kind": "eval", "split": "ab"[i % 2], "step": i} for i in range(count)]
    monkeypatch.setitem(history._MOST, "eval", 64)
    write(tmp_path / "m", [train(step) for step in range(1, count + 1)] + splits)
    found = read_records(tmp_path / "m")
    steps = [r["step"] for r in found["train"]]
    assert steps == sorted(set(steps))
    assert (steps[:3], steps[-1]) == ([1, 2, 3], count)
    if count == 1000:
        assert steps == list(range(1, count + 1))
    else:
        assert 512 <= len(steps) <= 1024 + 3
        assert len({b - a for a, b in pairwise(steps[2:-1])}) <= 2  # from the first ones on
    assert {r["split"] for r in found["eval"]} == {"a", "b"}


@pytest.mark.parametrize(
    "table",
    [
        {"pairs": [[0, 0, 3]]},
        {"classes": ["a"], "pairs": [[0, 1, 3]]},
        {"classes": ["a"], "pairs": [[0, 0, -3]]},
        {"classes": ["a"], "pairs": "x"},
        {"classes": 7, "matrix": [[1]]},
        {"classes": ["a"], "matrix": [[10**30]]},
    ],
)
def test_a_damaged_table_of_confusions_is_as_good_as_missing(
    tmp_path: Path, table: dict[str, Any]
) -> None:
    """A report ended in a traceback (found by tests/launcher/cli/test_hostile_files.py)."""
    run = create_run(tmp_path / "run", load_recipe("digits", ["log.wandb=off"]))
    run.ensemble.mkdir()
    (run.ensemble / "confusion.json").write_text(json.dumps(table))
    assert read_history(run).confusion is None


def test_times_of_steps_are_those_of_the_records(tmp_path: Path) -> None:
    """Read without parsing, of records as `Log` writes them and of those of older versions."""
    records: list[dict[str, Any]] = [
        {"kind": "train", "step": 1, "epoch": 0.1, "loss": None, "step_s": 0.25, "mfu": None},
        {"kind": "eval", "step": 1, "split": "train", "step_s": 7},
        {"kind": "train", "step": 2, "step_s": 1e-05, "phases": {"data": 0.1, "step": 9}},
        {"kind": "train", "step": 3, "loss": 1.0},
        {"kind": "train", "step": 4, "slowest": {"rank": 1}, "step_s": 12},
    ]
    lines = [json.dumps(record) for record in records]
    lines[4] = lines[4].replace(" ", "")
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "train", "step": 5, "s']))
    assert list(timed_steps(tmp_path / "metrics.jsonl")) == [(1, 0.25), (2, 1e-05), (4, 12.0)]
