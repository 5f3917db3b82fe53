"""What a report's page shows of runs of one snapshot, of many classes, and of many checkpoints."""

import json
from pathlib import Path

import numpy as np
import pytest

from bigbatch.configs.load import dump_recipe, load_recipe
from bigbatch.trainers.monitoring.history import read_history
from bigbatch.trainers.report.report import (
    _confusion,
    _tiles,
    _timeline,
    hardest,
    wall_seconds,
    write_report,
)
from bigbatch.trainers.report.results import result_rows
from tests.trainers.report.test_report import make_run


def page_of(path: Path) -> str:
    return write_report(make_run(path)).read_text()


def test_a_batch_that_changes_stands_as_its_smallest_and_its_largest(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits")
    batch = "{name: stages, pieces: [{batch: 256, until: 1 epochs}, {batch: 1024}]}"
    run.recipe_file.write_text(dump_recipe(load_recipe("digits", [f"global_batch={batch}"])))
    text = write_report(run).read_text()
    assert "global batch 256 to 1,024, 60 epochs" in text
    assert "256 to 1,024 a step" in text


def test_checkpoints_in_a_row_are_one_row_of_the_timeline(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits")
    kinds = ["checkpoint"] * 20 + ["signal"] + ["checkpoint"]
    with run.events.open("a") as file:
        for number, kind in enumerate(kinds, 1):
            print(json.dumps({"kind": kind, "step": number * 10, "seconds": 0.1}), file=file)
    rows = [row[1:] for row in _timeline(read_history(run))[5:]]
    assert rows == [
        ("10 to 200", "20 checkpoints", ""),
        ("210", "signal", "seconds 0.1"),
        ("220", "checkpoint", "seconds 0.1"),  # a single one is shown as it is
    ]


def test_wall_time_counts_what_lies_between_a_start_and_its_last_event() -> None:
    events = [
        {"kind": "start", "time": 100.0},
        {"kind": "checkpoint", "time": 160.0},
        {"kind": "end", "time": 170.0},
        {"kind": "start", "time": 1000.0},  # the queue in between is not the run's
        {"kind": "checkpoint", "time": 1030.0},
        {"kind": "odd", "time": "then"},
    ]
    assert wall_seconds(events) == 100.0
    assert wall_seconds(events[:1]) == 0.0
    assert wall_seconds([]) == 0.0


def test_wall_time_stands_beside_the_training_time(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits")
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    for number, event in enumerate(events):
        event["time"] = 1.75e9 + 100 * number
    run.events.write_text("".join(json.dumps(event) + "\n" for event in events))
    (*_, training, wall) = _tiles(read_history(run))
    assert training[0] == "training time"
    assert wall == ("wall time", "5 min 0 s", "2 starts; also evaluation, saving")


def test_on_a_phone_splits_stand_below_each_other(tmp_path: Path) -> None:
    text = page_of(tmp_path / "digits")
    assert "@media (max-width: 40rem) { .beside { display: none; } .stacked" in text
    stacked = text.split('<div class="card stacked">')[1].split("</div>")[0]
    beside = text.split('<div class="card scroll beside">')[1].split("</div>")[0]
    assert (beside.count("<table"), stacked.count("<table")) == (1, 2)
    for figures in ("98.30%", "98.70%"):  # of the ensemble, on test and val
        assert figures in beside
        assert figures in stacked


def one_snapshot() -> dict[str, object]:
    scores = {"accuracy": 0.97, "nll": 0.1, "ece": 0.01}
    member = {"name": "cycle-01", **scores, "kept": True}
    split = {"members": [member], "ensemble": scores}
    return {"val": split, "test": split, "steps": 300}


def test_one_snapshot_has_no_ensemble_that_equals_it(tmp_path: Path) -> None:
    summary = one_snapshot()
    assert [name for name, *_ in result_rows(summary)] == ["cycle-01"]
    run = make_run(tmp_path / "digits")
    run.summary.write_text(json.dumps(summary))
    text = write_report(run).read_text()
    assert "best member" not in text
    assert "The ensemble is the mean" not in text
    assert "classified wrongly by the model" in text
    # A recalibrated one is another one.
    summary["test"] = summary["test"] | {"ensemble": {"accuracy": 0.98, "nll": 0.1, "ece": 0.01}}  # type: ignore[operator]
    assert [name for name, *_ in result_rows(summary)] == ["cycle-01", "ensemble"]


def test_of_many_classes_the_hardest_are_shown(tmp_path: Path) -> None:
    matrix = np.diag(np.full(200, 100))
    for hard in (7, 60, 199):
        matrix[hard, hard], matrix[hard, 100] = 40, 60
    right = np.diag(matrix)
    found = hardest(matrix.sum(1), matrix.sum(1) - right, matrix.sum(0) - right)
    assert {7, 60, 100, 199} <= set(found.tolist())
    run = make_run(tmp_path / "digits")
    names = [f"kind{i:03d}" for i in range(200)]
    table = {"split": "test", "classes": names, "matrix": matrix.tolist()}
    (run.ensemble / "confusion.json").write_text(json.dumps(table))
    text = write_report(run).read_text()
    assert "Of 200 classes the matrix shows the 25 that are in most mistakes." in text
    plot = text.split("<h2>Confusion matrix</h2>")[1].split("</figure>")[0]
    shown = [name for name in names if f">{name}<" in plot]
    assert len(shown) == 25
    assert {"kind007", "kind060", "kind100", "kind199"} <= set(shown)
    # All recalls, and their mean.
    recalls = text.split("The recall of every class")[1].split("</details>")[0]
    assert all(f"<td>{name}</td>" in recalls for name in names)
    assert "the mean recall of the classes: 99.10%" in text


@pytest.mark.parametrize("classes", [10, 50])
def test_of_few_classes_all_are_shown(tmp_path: Path, classes: int) -> None:
    run = make_run(tmp_path / "digits")
    names = [f"k{i}" for i in range(classes)]
    table = {"split": "test", "classes": names, "matrix": np.eye(classes, dtype=int).tolist()}
    (run.ensemble / "confusion.json").write_text(json.dumps(table))
    found = _confusion(read_history(run))
    assert found is not None
    assert found["shown"] == classes
