"""The real wandb client, offline and against a local server: each step exactly once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from wandb.proto import wandb_internal_pb2

from bigbatch.configs.files import read_jsonl
from bigbatch.configs.identity import recipe_hash
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run, event_record
from bigbatch.trainers.monitoring import wandb_view
from bigbatch.trainers.monitoring.log import open_log
from bigbatch.trainers.monitoring.wandb_view import (
    WandbView,
    history_steps,
    logged_in,
    open_wandb,
)
from tests.helpers.wandb_server import Server, serve

STEPS = 300
# One attempt, as a process: what to start from, where to end, and how ("kill" or a state). A job
# that is stopped has not the time to wait for wandb on a busy machine; these tests have.
ATTEMPT = """
import os, signal, sys, time
from pathlib import Path
from bigbatch.configs.rundir import RunDir
from bigbatch.trainers.monitoring import wandb_view
from bigbatch.trainers.monitoring.log import open_log
wandb_view.CLOSE_TIMEOUT["stopped"] = 60.0
run, first, last, end = RunDir(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
log = open_log(run, run.recipe(), rank=0, total_steps=300, start_step=first, epoch_samples=1077)
log.event("start")
for step in range(first + 1, last + 1):
    time.sleep(0.004)
    log.train(step, loss=2 / step, lr=0.1, grad_norm=1.0, images_per_s=5000.0, step_s=0.1)
    if step % 20 == 0:
        log.evaluation(step, "val", accuracy=step / 300, nll=0.3, ece=0.02)
if end == "kill":
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
log.close(end)
"""


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def log_in(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    # Sent often, so that a kill comes between two transmissions of one attempt.
    monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "0.3")


def attempt(run: RunDir, first: int, last: int, end: str) -> None:
    command = [sys.executable, "-c", ATTEMPT, str(run.path), str(first), str(last), end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == (-signal.SIGKILL if end == "kill" else 0), done.stderr
    assert "wandb" not in done.stderr
    time.sleep(1.0 - time.time() % 1.0)  # wandb names its folders by the second


def killed_stopped_finished(path: Path, cut: bool = False) -> RunDir:
    """A run of three attempts, each beginning before the one before it ended.

    With `cut` half of what the second one wrote for wandb is lost, as with the power.
    """
    run = create_run(path, load_recipe("digits"))
    attempt(run, 0, 150, "kill")
    attempt(run, 120, 250, "stopped")
    if cut:
        newest = segments(run)[-1]
        os.truncate(newest, newest.stat().st_size // 2)
    run.summary.write_text(json.dumps({"test": {"ensemble": {"accuracy": 0.98}}, "steps": STEPS}))
    attempt(run, 240, STEPS, "finished")
    return run


def segments(run: RunDir) -> list[Path]:
    return sorted((run.path / "wandb").glob("*run-*/*.wandb"))


def test_a_service_that_another_folder_has_started_loses_nothing(tmp_path: Path) -> None:
    """As where a program that uses wandb starts `bigbatch train` in a folder of its own."""
    run = create_run(tmp_path / "here" / "digits", load_recipe("digits"))
    (tmp_path / "there").mkdir()
    start = "import os, wandb\nos.chdir('there')\nwandb.setup()\nos.chdir('../here')\n"
    command = [sys.executable, "-c", start + ATTEMPT, "digits", "0", "20", "finished"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    assert [step for file in segments(run) for step in history_steps(file)] == [*range(1, 21)]


def test_offline_each_step_once_over_kill_and_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = killed_stopped_finished(tmp_path / "digits", cut=True)
    steps = [step for file in segments(run) for step in history_steps(file)]
    assert steps == list(range(1, STEPS + 1))
    assert len({file.name for file in segments(run)}) == 1  # one run id
    assert not [e for e in read_jsonl(run.events) if e["kind"] == "wandb"]

    # wandb's own reader of these files is `wandb sync`: what it uploads is what counts.
    with serve() as server:
        log_in(monkeypatch, server)
        command = [sys.executable, "-m", "wandb", "sync", "--yes"]
        folders = [str(file.parent) for file in segments(run)]
        subprocess.run([*command, *folders], check=True, capture_output=True, timeout=120)
        check_uploaded(run, server)


@pytest.mark.slow
def test_segments_sent_at_different_times_leave_each_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = killed_stopped_finished(tmp_path / "digits", cut=True)
    later = [file.parent for file in segments(run)][1:]
    command = [sys.executable, "-m", "bigbatch.trainers.monitoring.wandb_sync", str(run.path)]
    with serve() as server:
        log_in(monkeypatch, server)
        aside = [folder.rename(tmp_path / folder.name) for folder in later]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        first = len(server.history())
        assert 0 < first < STEPS
        for folder, place in zip(aside, later, strict=True):
            folder.rename(place)
        for _ in range(2):  # the second time there is nothing left
            done = subprocess.run(command, check=True, capture_output=True, timeout=120)
            check_uploaded(run, server)
    assert b"nothing left to send" in done.stdout


def test_online_each_step_once_over_kill_and_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as server:
        log_in(monkeypatch, server)
        run = killed_stopped_finished(tmp_path / "digits")
        check_uploaded(run, server)


def check_uploaded(run: RunDir, server: Server) -> None:
    history = server.history()
    assert [row["train/step"] for row in history] == list(range(1, STEPS + 1))
    assert [row["_step"] for row in history] == list(range(1, STEPS + 1))
    evaluated = {row["train/step"]: row["val/accuracy"] for row in history if "val/nll" in row}
    assert evaluated == {step: step / 300 for step in range(20, STEPS + 1, 20)}
    losses = {r["step"]: r["loss"] for r in read_jsonl(run.metrics) if r["kind"] == "train"}
    assert {row["train/step"]: row["train/loss"] for row in history} == losses
    assert len(server.run_ids) == 1
    config = json.loads(server.config)
    assert config["recipe_hash"]["value"] == recipe_hash(run.recipe())
    assert config["optimizer"]["value"]["name"] == "lars"


def test_an_unreachable_server_means_offline_and_an_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_view, "INIT_TIMEOUT", 2.0)
    run = create_run(tmp_path / "digits", load_recipe("digits"))
    with serve() as server:
        server.down = True
        log_in(monkeypatch, server)
        started = open_log(
            run, run.recipe(), rank=0, total_steps=5, start_step=0, epoch_samples=1077
        )
        with started as log:
            for step in range(1, 6):
                log.train(step, loss=1.0)
            log.close("finished")
    (event,) = (e for e in read_jsonl(run.events) if e["kind"] == "wandb")
    assert "going on offline" in event["error"]
    assert [s for file in segments(run) for s in history_steps(file)] == [1, 2, 3, 4, 5]


def test_a_broken_wandb_never_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder that wandb wants is a file: neither wandb nor the run may fail of it."""
    run = create_run(tmp_path / "digits", load_recipe("digits"))
    (run.path / "wandb.json").write_text('{"no": "id"}')
    with open_log(
        run, run.recipe(), rank=0, total_steps=5, start_step=0, epoch_samples=1077
    ) as log:
        for step in range(1, 6):
            log.train(step, loss=1.0)
        log.close("finished")
        assert log.wandb_path is None
    assert [r["step"] for r in read_jsonl(run.metrics)] == [1, 2, 3, 4, 5]
    kinds = {e["kind"]: e for e in read_jsonl(run.events)}
    assert "KeyError" in kinds["wandb"]["error"]
    assert kinds["end"]["state"] == "finished"


def test_off_opens_nothing(tmp_path: Path) -> None:
    recipe = load_recipe("digits", ["log.wandb=off"])
    run = create_run(tmp_path / "digits", recipe)
    assert open_wandb(run, recipe, recipe.log.wandb) is None
    assert not (run.path / "wandb.json").exists()


def test_logged_in_by_key_or_netrc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not logged_in()
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password 0123\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not logged_in()
    netrc.write_text("this is no netrc {")
    assert not logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert logged_in()


def test_a_file_cut_short_gives_its_whole_rows(tmp_path: Path) -> None:
    run = create_run(tmp_path / "digits", load_recipe("digits"))
    attempt(run, 0, STEPS, "finished")
    (file,) = segments(run)
    data = file.read_bytes()
    assert len(data) > 32768  # several blocks, so records in pieces
    cut = tmp_path / "cut.wandb"
    for size in (0, 3, 7, 20, len(data) // 2, len(data) - 1):
        cut.write_bytes(data[:size])
        steps = list(history_steps(cut))
        assert steps == list(range(1, len(steps) + 1))
    assert len(steps) == STEPS


def alerts_in(file: Path) -> dict[str, str]:
    """Title and text of each alert in a .wandb file."""
    protocol: Any = wandb_internal_pb2
    payloads = wandb_view._payloads(file.read_bytes())
    records = [protocol.Record.FromString(payload) for _, payload in payloads]
    return {r.alert.title: r.alert.text for r in records if r.HasField("alert")}


def test_a_hang_reaches_wandb_at_the_next_start_and_once(tmp_path: Path) -> None:
    run = create_run(tmp_path / "run", load_recipe("digits", ["log.wandb=offline"]))
    attempt(run, 0, 5, "kill")
    hang = event_record("stall", 5, doing="reducing", missing=[1], error="step 6 hangs")
    with run.events.open("a") as file:  # as the watchdog does, of whichever rank is left
        print(json.dumps(hang), file=file)
    attempt(run, 5, 8, "stopped")
    attempt(run, 8, 9, "finished")
    (second, third) = (alerts_in(file) for file in segments(run)[-2:])
    assert f"run, step 5, {hang['date']}: doing reducing, missing [1]" in second["A step hangs"]
    assert "A step hangs" not in third


def test_alerts_and_pictures_reach_the_wandb_file(tmp_path: Path) -> None:
    run = create_run(tmp_path / "run", load_recipe("digits", ["log.wandb=offline"]))
    Image.new("L", (8, 8)).save(run.contact_sheet)
    with open_log(
        run, run.recipe(), rank=0, total_steps=9, start_step=0, epoch_samples=1077
    ) as log:
        log.picture("augmented", run.contact_sheet)
        log.train(1, loss=1.0, lr=0.1)
        log.event("non_finite", loss="nan", note="password=hunter22")
        log.close("finished")
    (file,) = segments(run)
    # wandb's service is a process of its own: seen once, `finish` was back before it had written.
    deadline = time.monotonic() + 30
    while "The run ended" not in (alerts := alerts_in(file)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert set(alerts) == {"Loss, gradient or running statistics are not finite", "The run ended"}
    assert "hunter22" not in str(alerts)
    assert list((file.parent / "files" / "media" / "images").glob("augmented*.png"))
    assert list(history_steps(file)) == [1]


def test_records_reach_the_views_while_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All records and alerts of an attempt waited for its end."""
    sent = threading.Event()

    class Fake:
        starting_step = 0
        settings = SimpleNamespace(sync_dir=str(tmp_path))

        def define_metric(self, *_: object, **__: object) -> None: ...

        def log(self, *_: object, **__: object) -> None:
            sent.set()

        def finish(self, **_: object) -> None: ...

    monkeypatch.setattr(WandbView, "_start", lambda self: Fake())
    run = create_run(tmp_path / "run", load_recipe("digits"))
    view = WandbView(run, run.recipe(), "offline", 0)
    for step in (1, 2):
        view.send({"kind": "train", "step": step, "epoch": 0.1, "loss": 1.0})
    there = sent.wait(20)
    view.end("finished", run.summary)
    view.close()
    assert there
    assert not list(view.problems())
