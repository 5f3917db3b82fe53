"""Runs on streams, from outside: a recipe names pipes, two ranks train, one goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import create_run
from bigbatch.data.index import open_index
from bigbatch.data.tar import write_end, write_member
from bigbatch.launcher.cli.main import cli
from bigbatch.launcher.start import agent_command
from tests.helpers import warm

RECIPE = """
base: digits
duration: 6 steps
global_batch: 64
micro_batch: 16
reduction: overlapped
data:
  sampling: uniform
  stream: ["pipe:cat shards/digits/train/00000{0..0}.tar", bad.tar]
schedule: {name: cosine, warmup: 0 steps}
evaluate: {every: 3 steps}
checkpoint: {every: 2 steps}
ensemble: {soup: false}
log: {wandb: "off", trace: true}
"""


@pytest.fixture(scope="module")
def here(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' shards, a recipe that streams them, and a tar that holds no image."""
    folder = tmp_path_factory.mktemp("stream")
    (folder / "shards").symlink_to(Path(shards) / "shards")
    (folder / "streamed.yaml").write_text(RECIPE)
    with (folder / "bad.tar").open("wb") as file:
        write_member(file, "one.png", b"this is no image")
        write_member(file, "one.cls", b"1")
        write_end(file)
    return folder


@pytest.fixture(autouse=True)
def commands_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGBATCH_ALLOW_PIPE", "1")


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli, arguments, catch_exceptions=False)


@pytest.mark.slow
def test_two_ranks_train_from_a_pipe_and_one_goes_on(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    run = create_run(here / "runs/streamed", load_recipe("streamed.yaml"))
    command = agent_command(run.path, 2, stop_at=4)
    assert warm.run(command, timeout=200).returncode == 0
    resume = warm.bigbatch("resume", "streamed", "--nproc", "1")
    done = warm.run(resume, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "could not be read" in done.stdout

    summary = json.loads(run.summary.read_text())
    assert (summary["steps"], summary["world_size"]) == (6, 1)
    val = open_index(here / "shards/digits/val")
    confusion = json.loads((run.ensemble / "confusion.json").read_text())
    assert confusion["classes"] == list(val.classes)
    trained = [r for r in read_jsonl(run.metrics) if r["kind"] == "train"]
    assert [r["step"] for r in trained] == [1, 2, 3, 4, 5, 6]
    # Each rank drew for itself, and the resumed one all micro-batches of the last steps.
    places = [
        {(r["step"], r["micro"]) for r in read_jsonl(run.trace / f"rank-0000{rank}.jsonl")}
        for rank in (0, 1)
    ]
    later = {(step, micro) for step in (4, 5) for micro in range(4)}
    assert places[0] == {(step, micro) for step in range(4) for micro in (0, 2)} | later
    assert places[1] == {(step, micro) for step in range(4) for micro in (1, 3)}

    said = invoke("inspect", "--journal", "streamed", "--json")
    assert said.exit_code == 1
    (bad,) = json.loads(said.output)["bad"]
    assert (bad["key"], bad["shard"]) == ("one", "bad.tar")
    assert "not an image" in bad["reason"]


def test_check_counts_classes_where_they_are_known(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    found = json.loads(invoke("check", "--quick", "streamed.yaml", "--json").stdout)
    assert (found["classes"], found["counted"], found["steps"]) == (10, "val", 6)
    assert "train" not in found["splits"]
    assert "in val" in invoke("check", "--quick", "streamed.yaml").output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.sampling=balanced", "data.sampling balanced needs indexed shards"),
        ("data.lanes=2", "data.lanes = 2 needs indexed shards"),
        ("reduction=exact", "set it to overlapped"),
        ("duration=2 epochs", "no epochs, in which duration is given"),
        ("evaluate.every=1 epochs", "in which evaluate.every is given"),
        ("schedule={name: cosine, warmup: 1 epochs}", "in which schedule.warmup is given"),
        ("average={name: swa, start: 2 steps}", "in which average.every is given"),
        ("data.stream=[]", "data.stream"),
        ("""data.stream=["pipe:cat 'x"]""", "close each quotation"),
        ("data.stream=['pipe:']", "names no command"),
    ],
)
def test_what_a_stream_cannot_promise_is_refused(here: Path, change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(here / "streamed.yaml", [change])


@pytest.mark.parametrize("command", [["batches", "--steps", "0:1"], ["prove"]])
def test_commands_about_order_are_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(here)
    with pytest.raises(UserError, match=r"trains on data\.stream"):
        invoke(command[0], "streamed.yaml", *command[1:])


def test_a_recipe_from_elsewhere_runs_no_command_unasked(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    monkeypatch.delenv("BIGBATCH_ALLOW_PIPE")
    with pytest.raises(UserError, match="read it, then allow it by BIGBATCH_ALLOW_PIPE=1"):
        invoke("check", "streamed.yaml", "--quick")
