"""metrics.jsonl and events.jsonl, whatever happens to the process; the progress line."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.trainers.monitoring import log as log_module
from bigbatch.trainers.monitoring.log import Log, cut_records, last_step, open_log
from bigbatch.trainers.monitoring.progress import Progress, duration

EPOCH = 1077


def new_run(path: Path, *overrides: str) -> RunDir:
    return create_run(path, load_recipe("digits", ["log.wandb=off", *overrides]))


def opened(run: RunDir, start: int = 0, total: int = 100, rank: int = 0) -> Log:
    return open_log(
        run, run.recipe(), rank=rank, total_steps=total, start_step=start, epoch_samples=EPOCH
    )


def train(log: Log, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.train(step, loss=1 / step, lr=0.1, images_per_s=1000.0)


def steps(run: RunDir, kind: str = "train") -> list[int]:
    return [r["step"] for r in read_jsonl(run.metrics) if r["kind"] == kind]


def test_records_have_the_documented_form(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    with opened(run) as log:
        log.train(
            1, loss=0.1 + 0.2, lr=0.5, grad_norm=2.0, images_per_s=1e3, data_s=0.0, step_s=1.0
        )
        log.evaluation(1, "val", accuracy=0.5, nll=0.7, ece=0.1)
        log.close("finished")
    first, second = read_jsonl(run.metrics)
    assert list(first) == [
        "kind", "step", "epoch", "loss", "lr", "grad_norm", "images_per_s", "data_s", "step_s"
    ]  # fmt: skip
    assert first["loss"] == 0.1 + 0.2  # bit for bit: losses are compared across runs
    assert first["epoch"] == pytest.approx(256 / EPOCH, abs=1e-6)
    assert second["kind"] == "eval"
    assert (second["split"], second["accuracy"]) == ("val", 0.5)


def test_non_finite_values_leave_valid_json(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    with opened(run) as log:
        log.train(1, loss=float("nan"), lr=0.5, images_per_s=float("inf"))
        log.event("non_finite", loss=float("-inf"))
    for file in (run.metrics, run.events):
        for line in file.read_text().splitlines():
            json.loads(line, parse_constant=pytest.fail)
    assert read_jsonl(run.metrics)[0]["loss"] is None


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run(tmp_path / "run")
    before = sorted(p.name for p in run.path.iterdir())
    with opened(run, rank=1) as log:
        train(log, 1, 5)
        log.evaluation(5, "val", accuracy=1.0)
        log.event("signal")
        log.phase("saving")
        log.close("finished")
    assert sorted(p.name for p in run.path.iterdir()) == before
    assert capsys.readouterr().out == ""


def test_every_n_steps_and_always_the_last(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", "log.every=10")
    with opened(run, total=25) as log:
        train(log, 1, 25)
    assert steps(run) == [10, 20, 25]


def test_resume_cuts_what_will_come_again(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    with opened(run) as log:
        train(log, 1, 20)
        log.evaluation(20, "val", accuracy=0.5)
        train(log, 21, 30)
        log.evaluation(30, "val", accuracy=0.6)
    kept = run.metrics.read_text().splitlines()[:21]
    with opened(run, start=20) as log:
        assert steps(run) == list(range(1, 21))
        train(log, 21, 40)
    assert steps(run) == list(range(1, 41))
    assert steps(run, "eval") == [20]
    assert run.metrics.read_text().splitlines()[:21] == kept


def test_of_a_long_file_the_end_alone_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 MB of records were parsed at each start, and written once more where one was cut."""
    parsed = []
    monkeypatch.setattr(
        log_module, "parse_json", lambda text: parsed.append(text) or json.loads(text)
    )
    run = new_run(tmp_path / "run")
    whole = b"".join(b'{"kind": "train", "step": %d, "loss": 1.0}\n' % n for n in range(1, 20_001))
    odd = b'{"torn\n' + whole
    ends = (b"", b'{"kind": "train", "step": 20001}\n', b'{"kind": "tr', b"\0" * 300_000, b"\n")
    for end in ends:
        run.metrics.write_bytes(odd + end)
        run.metrics.chmod(0o600)
        node = run.metrics.stat().st_ino
        cut_records(run.metrics, 20_000)
        assert run.metrics.read_bytes() == odd
        assert run.metrics.stat().st_ino == node  # in its place: a full disk has room for that
        assert last_step(run.metrics) == 20_000
    assert len(parsed) < 20
    cut_records(run.metrics, 15_000)
    assert len(parsed) < 5100
    assert run.metrics.read_bytes() == odd[: odd.index(b'{"kind": "train", "step": 15001')]
    cut_records(run.metrics, 0)
    assert run.metrics.read_bytes() == b""
    cut_records(run.metrics, 0)
    assert last_step(run.metrics) == last_step(tmp_path / "none") == 0


@settings(max_examples=30, deadline=None)
@given(attempts=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 80)), min_size=1, max_size=6))
def test_each_step_once_after_any_kill(
    tmp_path_factory: pytest.TempPathFactory, attempts: list[tuple[int, int]]
) -> None:
    """Attempts go on from any saved step, and each loses any number of bytes of its tail."""
    run = new_run(tmp_path_factory.mktemp("kills") / "run")
    saved = 0
    for forward, lost in attempts:
        reached = saved + forward
        with opened(run, start=saved) as log:
            train(log, saved + 1, reached)
        # A killed process loses no flushed byte. A machine without power does, but none
        # from before the last `sync`, which comes before each checkpoint.
        data = run.metrics.read_bytes()
        synced = len(b"".join(data.splitlines(keepends=True)[:saved]))
        run.metrics.write_bytes(data[: max(synced, len(data) - lost)])
        saved = (saved + len(read_jsonl(run.metrics))) // 2
    with opened(run, start=saved):
        assert steps(run) == list(range(1, saved + 1))


KILLED = """
import os, signal, sys
from pathlib import Path
from bigbatch.configs.rundir import RunDir
from bigbatch.trainers.monitoring.log import open_log
run = RunDir(Path(sys.argv[1]))
log = open_log(run, run.recipe(), rank=0, total_steps=100, start_step=0, epoch_samples=1077)
log.event("start")
for step in range(1, 51):
    log.train(step, loss=1.0, lr=0.1, images_per_s=100.0)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_sigkill_loses_no_record(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    done = subprocess.run([sys.executable, "-c", KILLED, str(run.path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert steps(run) == list(range(1, 51))
    run.events.write_text(run.events.read_text() + '{"kind": "sig')  # torn as by a power cut
    with opened(run, start=40) as log:
        log.event("start")
        train(log, 41, 45)
    assert steps(run) == list(range(1, 46))
    assert [e["kind"] for e in read_jsonl(run.events)] == ["start", "start", "end"]


def test_an_exception_is_an_event_and_passes_on(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    log = opened(run)
    train(log, 1, 3)
    with pytest.raises(OSError, match="disk"), log:
        raise OSError("disk full")
    error, end = read_jsonl(run.events)
    assert (error["kind"], error["error"], error["step"]) == ("error", "OSError: disk full", 3)
    assert (end["kind"], end["state"]) == ("end", "failed")


def test_the_log_is_free_of_torch_and_wandb(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom bigbatch.trainers.monitoring import log\n"
        "from bigbatch.trainers.report import report, watch\n"
        "print(sorted({'torch', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def shown(terminal: bool, name: str = "run") -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=110)
    progress = Progress(name, 200, 0, console)
    for step in range(1, 201):
        progress.train(step, {"loss": 2 / step, "lr": 0.1, "images_per_s": 1234.0})
        if step % 50 == 0:
            progress.evaluation("val", {"accuracy": step / 400})
    progress.phase("combining snapshots")
    progress.warn("wandb: [red]offline")
    progress.close()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("scores", "text"),
    [
        ({"accuracy": 0.975, "nll": 0.1}, "val 97.50%"),
        ({"mae": 2.34567, "rmse": 3.0, "r2": 0.5}, "val MAE 2.346"),
        ({"kl": 0.25, "mode": 0.5}, "val KL 0.2500"),
    ],
)
def test_progress_shows_the_score_that_a_run_is_judged_by(
    scores: dict[str, float], text: str
) -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=110)
    progress = Progress("run", 2, 0, console)
    progress.train(1, {"loss": 1.0})
    progress.evaluation("val", scores)
    progress.train(2, {"loss": 0.5})
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines()[-1] == f"run 2/2 (100%) loss 0.5000  {text}"


def test_progress_in_a_file_is_a_few_plain_lines() -> None:
    first, last, phase, warning = shown(terminal=False).splitlines()
    assert first.startswith("run 1/200 (0%) loss 2.0000  lr 0.1")
    assert last == "run 200/200 (100%) loss 0.0100  lr 0.1  val 37.50%  1,234 img/s"
    assert phase == "run combining snapshots"
    assert warning == "warning: wandb: [red]offline"


def test_progress_on_a_terminal_is_one_live_line() -> None:
    text = shown(terminal=True)
    assert "\x1b[" in text
    for part in ("200/200", "loss 0.0100", "val 50.00%", "1,234 img/s"):
        assert part in text


def test_plain_lines_keep_their_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 steps of 1 s: a line each 5 per cent, 50 s apart."""
    clock = iter(range(10_000))
    monkeypatch.setattr(
        "bigbatch.trainers.monitoring.progress.time.monotonic", lambda: float(next(clock))
    )
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    progress = Progress("run", 1000, 0, console)
    for step in range(1, 1001):
        progress.train(step, {"loss": 1.0})
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert [int(x.split()[1].split("/")[0]) for x in lines] == [1, *range(51, 1000, 50), 1000]
    assert lines[10].endswith("8 min 19 s left")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min"),
     (273_600, "3 d 4 h")],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_records_are_visible_at_once(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    with opened(run) as log:
        train(log, 1, 1)
        assert steps(run) == [1]
        log.sync()
