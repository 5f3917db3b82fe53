"""TensorBoard's event files and Prometheus' text file, read by their own readers."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.trainers.monitoring.log import open_log


def train(run: RunDir, first: int, last: int, end: str) -> None:
    with open_log(
        run, run.recipe(), rank=0, total_steps=40, start_step=first, epoch_samples=1077
    ) as log:
        for step in range(first + 1, last + 1):
            log.train(
                step, loss=2 / step, lr=0.1, grad_norm=float("nan"), images_per_s=5e3, step_s=0.1,
                phases={"data": 0.01, "model": 0.08},
                slowest={"rank": 1, "phase": "data", "share": 0.1},
            )  # fmt: skip
            if step % 10 == 0:
                log.evaluation(step, "val", accuracy=step / 40, nll=0.3, ece=0.02)
                log.detail(
                    step, "ranks", phases=["data", "model"], seconds=[[0.1, 0.2], [0.3, 0.4]]
                )
        log.event("non_finite", loss=None)
        log.close(end)


def test_tensorboard_has_each_step_once_across_attempts(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    changes = ["log.wandb=off", "log.tensorboard=true"]
    run = create_run(tmp_path / "run", load_recipe("digits", changes))
    train(run, 0, 25, "stopped")
    train(run, 17, 30, "stopped")  # steps 18 to 25 are repeated, as after a kill
    train(run, 30, 40, "finished")
    events: Any = accumulator.EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [e.step for e in losses] == list(range(1, 41))
    assert [e.value for e in losses] == pytest.approx([2 / step for step in range(1, 41)])
    assert [e.step for e in events.Scalars("val/accuracy")] == [10, 20, 30, 40]
    assert "train/phases/data" in events.Tags()["scalars"]


@pytest.mark.parametrize("where", ["folder", "file"])
def test_a_disk_that_refuses_tensorboard_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    writers = pytest.importorskip("tensorboard.summary.writer.record_writer")
    run = create_run(
        tmp_path / "run", load_recipe("digits", ["log.wandb=off", "log.tensorboard=true"])
    )
    if where == "folder":
        (run.path / "tensorboard").touch()
    else:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(writers.RecordWriter, "write", full)
    train(run, 0, 40, "finished")
    assert [r["step"] for r in read_jsonl(run.metrics) if r["kind"] == "train"] == [*range(1, 41)]
    (said,) = [e["error"] for e in read_jsonl(run.events) if e["kind"] == "tensorboard"]
    assert said.startswith("tensorboard/ is not complete: ")


def test_prometheus_text_is_read_by_its_own_parser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    monkeypatch.setattr("bigbatch.trainers.monitoring.prometheus.INTERVAL", 0.0)
    folder = tmp_path / "textfiles"
    folder.mkdir()
    changes = ["log.wandb=off", f"log.prometheus={folder}"]
    run = create_run(tmp_path / "run", load_recipe("digits", changes))
    train(run, 0, 40, "finished")
    assert [p.name for p in folder.iterdir()] == ["bigbatch-run.prom"]
    found = {
        (s.name, *sorted(s.labels.items())): s.value
        for family in parser.text_string_to_metric_families(
            (folder / "bigbatch-run.prom").read_text()
        )
        for s in family.samples
    }
    name = ("run", "run")
    assert found["bigbatch_step", name] == 40
    assert found["bigbatch_loss", name] == 0.05
    assert found["bigbatch_images_per_second", name] == 5000
    assert found["bigbatch_running", name] == 0
    assert found["bigbatch_accuracy_ratio", name, ("split", "val")] == 1
    assert found["bigbatch_rank_phase_seconds", ("phase", "model"), ("rank", "1"), name] == 0.4
    assert found["bigbatch_events_total", ("kind", "non_finite"), name] == 1
    assert ("bigbatch_gradient_norm", name) not in found  # it was not finite
    documented = (Path(__file__).parents[3] / "docs/monitoring.md").read_text()
    assert all(key[0] in documented for key in found)


def test_label_values_are_escaped(tmp_path: Path) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    from bigbatch.trainers.monitoring.prometheus import TextFile

    file = TextFile(tmp_path, "run", 10)
    evil = 'a"} 1\nevil{x="\\'
    file.record({"kind": "eval", "split": evil, "accuracy": 0.5})
    (sample,) = [
        s
        for family in parser.text_string_to_metric_families(file.path.read_text())
        for s in family.samples
        if s.name == "bigbatch_accuracy_ratio"
    ]
    assert sample.labels["split"] == evil
    assert json.dumps(sample.value) == "0.5"


def test_a_run_that_has_no_accuracy_shows_its_own_score(tmp_path: Path) -> None:
    from bigbatch.trainers.monitoring.prometheus import TextFile

    file = TextFile(tmp_path, "run", 10)
    file.record({"kind": "eval", "split": "val", "mae": 2.5, "rmse": 3.0, "r2": 0.5})
    text = file.path.read_text()
    assert 'bigbatch_score{run="run",split="val",score="mae"} 2.5\n' in text
    assert "bigbatch_accuracy_ratio" not in text


def test_a_folder_that_is_not_there_is_the_users_error(tmp_path: Path) -> None:
    changes = ["log.wandb=off", f"log.prometheus={tmp_path / 'none'}"]
    run = create_run(tmp_path / "run", load_recipe("digits", changes))
    with pytest.raises(UserError, match=r"log\.prometheus"):
        open_log(run, run.recipe(), rank=0, total_steps=1, start_step=0, epoch_samples=1)
