"""Commands from outside: exit statuses, messages, and JSON that can be parsed."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.data.index import open_index
from bigbatch.data.order import build_order
from bigbatch.launcher import preflight
from bigbatch.launcher.cli.main import SECTIONS, cli
from bigbatch.launcher.estimate import Estimate, Finding

BIGBATCH = Path(sys.executable).parent / "bigbatch"
# What these tests count on; the recipe itself may be tuned.
DIGITS = ("digits", "global_batch=256", "micro_batch=64", "duration=60 epochs", "optimizer.lr=6")
STEPS = -(-60 * 1078 // 256)


def invoke(*arguments: str) -> Result:
    """Run in this process, which is fast; UserError passes through to the caller."""
    return CliRunner().invoke(cli, arguments, catch_exceptions=False)


def status_of(*arguments: str) -> tuple[int, str]:
    """As `main` does it; the whole program is tested below."""
    try:
        result = invoke(*arguments)
    except UserError as error:
        return 2, str(error)
    return result.exit_code, result.output


@pytest.fixture
def here(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, with the digits' shards."""
    (tmp_path / "shards").symlink_to(Path(shards) / "shards")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_lists_every_command_once() -> None:
    text = invoke("--help").output
    names = [str(command.name) for section in SECTIONS.values() for command in section]
    listed = [
        line.split()[0]
        for line in text.splitlines()
        if line.startswith("  ") and line[2:3] != " " and line.split()
    ]
    assert [name for name in listed if name in names] == names
    assert sorted(cli.commands) == sorted(names)
    for name in names:
        assert invoke(name, "--help").exit_code == 0


def test_deepspeeds_extra_argument_is_accepted() -> None:
    assert invoke("--local_rank=1", "recipes").exit_code == 0
    assert invoke("--local-rank", "1", "recipes").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "digit"], "did you mean digits?"),
        (["train", "digits"], "bigbatch shard digits shards/digits"),
        (["train", "digits", "optimizer.lr=-1"], "optimizer.lr"),
        (["train", "digits", "optimiser.lr=1"], "did you mean optimizer?"),
        (["train", "digits", "lr"], "key=value"),
        (["train", *DIGITS, "--nproc", "5"], "5 ranks"),
        (["train", "digits", "--nproc", "0"], "--nproc"),
        (["train", "digits", "--nnodes", "2"], "--rdzv-endpoint"),
        (["train", "digits", "--nnodes", "2", "--rdzv-endpoint", "n1:65536"], "1 to 65535"),
        (["train", "digits", "--nnodes", "2", "--rdzv-endpoint", "[::1]:0"], "1 to 65535"),
        (["resume", "nothing"], "bigbatch runs"),
        (["resume", "nothing", "--sbatch-arg=--time=10"], "needs --slurm"),
        (["check", *DIGITS, "--nproc", "5"], "5 ranks"),
        (["submit", *DIGITS, "--nodes", "3", "--ranks-per-node", "2"], "6 ranks"),
        (["submit", "digits", "--partition", "a;b", "--dry-run"], "--partition 'a;b'"),
        (["batches", "digits", "--steps", "5"], "shard"),
        (["batches", "digits", "--steps", "9" * 30], "2^63"),
        (["prove", "digits", "--ranks", "1;2"], "not a list"),
        (["schedule", "digits", "--plot", "lr.exe"], ".png"),
        (["schedule", "digits", "data.path=nowhere"], "--epoch-samples N"),
        (
            ["schedule", "digits", "--json", "--epoch-samples", "256", "duration=1G steps"],
            "at most 10,000,000 are listed",
        ),
        (["find-micro-batch", "digits", "--memory", "inf"], "--memory inf"),
        (["shard", "no-such-folder", "out"], "no-such-folder"),
        (["index", "no-such-folder"], "no-such-folder"),
        (["inspect", "no-such-folder"], "no-such-folder"),
        (["status", "../x"], "no run"),
        (["frobnicate"], "frobnicate"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_the_users_errors_are_one_message_and_status_2(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, said = status_of(*arguments)
    assert status == 2
    assert says in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_readme_s_lines_for_slurm_run_as_they_stand(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its submit asked for 32 ranks of a recipe that has work for four."""
    text = (Path(__file__).parents[3] / "README.md").read_text()
    recipe = text.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "mine.yaml").write_text(recipe)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/mine").symlink_to(digits)
    monkeypatch.chdir(tmp_path)
    lines = text.partition("## SLURM in three lines\n\n```sh\n")[2].partition("```")[0]
    commands = [line.partition("#")[0].split()[1:] for line in lines.splitlines()]
    assert [words[0] for words in commands] == ["check", "submit", "runs"]
    unlike = {"check": ["--quick"], "submit": ["--dry-run"]}  # no torch here, and no SLURM
    for words in commands:
        status, said = status_of(*words, *unlike.get(words[0], []))
        assert status == 0, said


def test_the_program_prints_the_message_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [BIGBATCH, "train", "digits", "--nproc", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("bigbatch: data.path shards/digits is no folder here")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_exists_is_not_overwritten(here: Path) -> None:
    create_run(here / "runs/a", load_recipe("digits"))
    before = {p: p.read_bytes() for p in (here / "runs/a").iterdir()}
    with pytest.raises(UserError, match="bigbatch resume"):
        invoke("train", "digits", "--run", "a")
    assert {p: p.read_bytes() for p in (here / "runs/a").iterdir()} == before


def test_a_missing_shard_stops_a_start(here: Path) -> None:
    (here / "shards").unlink()
    invoke("shard", "digits", "shards/digits", "--json")
    (here / "shards/digits/val/000000.tar").unlink()
    with pytest.raises(UserError, match=r"val/000000\.tar cannot be read"):
        invoke("train", "digits")
    assert not (here / "runs").exists()


def test_a_schedule_that_does_not_fit_stops_a_start(here: Path) -> None:
    short = ["duration=6 steps", "schedule.warmup=1 steps", "schedule.rewarmup=5 steps"]
    with pytest.raises(UserError, match="rewarmup takes 5 steps"):
        invoke("train", "digits", *short)
    assert not (here / "runs").exists()


def test_shard_index_and_inspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = json.loads(invoke("shard", "digits", "out", "--json").output)
    assert made["samples"] == {"train": 1078, "val": 362, "test": 357}
    again = json.loads(invoke("index", "out/val", "--json").output)
    assert (again["samples"], again["problems"]) == (362, [])
    result = invoke("inspect", "out", "--json")
    assert result.exit_code == 0
    assert json.loads(result.output)["splits"]["test"]["samples"] == 357
    assert "1,078" in invoke("inspect", "out").output
    stats = invoke("inspect", "out", "--pca", "--images", "100").output
    assert stats.startswith("# 100 of 1,078 images; standard error of the mean at most 0.0")
    keys = yaml.safe_load(stats)
    assert keys["data"] == {"channels": 1}
    assert keys["augment"]["ops"][0]["eigenvectors"] == [[1.0]]
    assert json.loads(invoke("inspect", "out", "--stats", "--json").output)["images"] == 1078
    for wrong in (["--stats", "--verify"], ["--images", "9"]):
        with pytest.raises(UserError, match="--stats"):
            invoke("inspect", "out", *wrong)
    (tmp_path / "out/val/index/label.npy").write_bytes(b"")
    assert invoke("inspect", "out").exit_code == 1


def test_check_measures_what_a_run_will_measure(here: Path) -> None:
    asked = invoke("check", "--quick", *DIGITS, "augment={mean: measured, std: measured}", "--json")
    stats = yaml.safe_load(invoke("inspect", "shards/digits", "--stats").output)["augment"]
    numbers = [f"augment.{name}={stats[name]}" for name in ("mean", "std")]
    written = invoke("check", "--quick", *DIGITS, *numbers, "--json")
    assert json.loads(asked.stdout)["hash"] == json.loads(written.stdout)["hash"]


def test_check_says_what_a_run_will_do(here: Path) -> None:
    found = json.loads(invoke("check", "--quick", *DIGITS, "--nproc", "4", "--json").output)
    assert (found["classes"], found["micro_batches"], found["world_size"]) == (10, 4, 4)
    assert found["steps"] == STEPS
    assert found["snapshots"][-1] == found["steps"]
    assert max(found["lr"].values()) == pytest.approx(6.0)
    assert found["average"] is None
    ema = "average={name: ema, half_life: 640 samples, start: 2 steps}"
    text = invoke("check", "--quick", *DIGITS, ema).output
    assert "1 to 4 ranks" in text
    said = f"ema of {STEPS - 2} sets of weights, after step 3 to {STEPS}; a half-life of 2.5 steps"
    assert said in text


def test_schedule_numbers_and_picture(here: Path) -> None:
    rates = json.loads(invoke("schedule", *DIGITS, "--json").output)["lr"]
    assert len(rates) == STEPS
    assert max(rates) == pytest.approx(6.0)
    # Without shards, but with the epoch's length, the same.
    (here / "shards").unlink()
    alone = ["schedule", *DIGITS, "--epoch-samples", "1078"]
    assert json.loads(invoke(*alone, "--json").output)["lr"] == rates
    result = invoke(*alone, "--plot", "lr.png")
    assert result.output.splitlines()[-1] == "lr.png"
    endless = invoke(*alone, "duration=1G epochs").output  # no list of all its steps is made
    assert endless.splitlines()[-1].startswith("step 4,210,9")
    assert (here / "lr.png").read_bytes()[:4] == b"\x89PNG"


def test_batches_are_those_of_the_order(here: Path) -> None:
    lines = invoke("batches", *DIGITS, "--steps", "3:5", "--json").output.splitlines()
    found = [json.loads(line) for line in lines]
    assert [(b["step"], b["micro"]) for b in found] == [(s, m) for s in (3, 4) for m in range(4)]
    recipe, index = load_recipe(DIGITS[0], DIGITS[1:]), open_index(here / "shards/digits/train")
    order = build_order(recipe.data.sampling, index, recipe.seed)
    positions = [p for b in range(3 * 4, 5 * 4) for p in range(b * 64, (b + 1) * 64)]
    expected = order.samples(np.array(positions)).tolist()
    assert [s for b in found for s in b["samples"]] == expected
    assert [e for b in found for e in b["epochs"]] == [p // 1078 for p in positions]
    keys = index.keys()
    assert found[0]["keys"] == [keys[s] for s in found[0]["samples"]]
    assert found[0]["labels"] == [int(index.label[s]) for s in found[0]["samples"]]


CHANGING = "global_batch={name: stages, pieces: [{batch: 64, until: 100 samples}, {batch: 256}]}"


def test_of_a_batch_that_changes_all_is_told(here: Path) -> None:
    """Its steps, ranks, rates and micro-batches: two steps of 64, then steps of 256."""
    keys = [*DIGITS, CHANGING, "schedule.warmup=128 samples"]
    found = json.loads(invoke("check", "--quick", *keys, "--json").output)
    assert (found["batches"], found["most_ranks"]) == (
        f"64 from step 0, 256 from step 2 of {found['steps']}",
        4,
    )
    assert found["epochs"] * 1078 == pytest.approx(128 + (found["steps"] - 2) * 256, abs=0.1)
    text = invoke("check", "--quick", *keys, "average={name: ema, half_life: 640 samples}").output
    assert "at most 256 samples in 4 micro-batches of 64: 1 to 4 ranks" in text
    assert "global_batch: 64 from step 0, 256 from step 2" in " ".join(text.split())
    assert "a half-life of 640 samples" in " ".join(text.split())
    rates = json.loads(invoke("schedule", *keys, "global_batch.lr=linear", "--json").output)["lr"]
    assert [rate / rates[2] for rate in rates[:3]] == [0, 0.125, 1]  # half of a fourth at step 1
    parts = []
    for rank in range(3):
        world = ("--world-size", "3", "--rank", str(rank))
        lines = invoke("batches", *keys, "--steps", "0:4", "--json", *world).output.splitlines()
        parts.append([json.loads(line) for line in lines])
    assert [len(part) for part in parts] == [2 + 2 * 2, 2, 2]
    merged = sorted((b for p in parts for b in p), key=lambda b: (b["step"], b["micro"]))
    lines = invoke("batches", *DIGITS, "--steps", "0:3", "--json").output.splitlines()
    constant = [sample for line in lines for sample in json.loads(line)["samples"]]
    assert [s for b in merged for s in b["samples"]] == constant[: 2 * 64 + 2 * 256]


def test_the_ranks_batches_are_the_steps_batches(here: Path) -> None:
    def of(*arguments: str) -> list[dict[str, object]]:
        lines = invoke("batches", *DIGITS, "--steps", "0:2", "--json", *arguments).output
        return [json.loads(line) for line in lines.splitlines()]

    parts = [of("--world-size", "3", "--rank", str(rank)) for rank in range(3)]
    assert [len(p) for p in parts] == [4, 2, 2]
    merged = sorted((b for p in parts for b in p), key=lambda b: (b["step"], b["micro"]))
    assert merged == of("--world-size", "3")
    assert [b["samples"] for b in merged] == [b["samples"] for b in of()]
    with pytest.raises(UserError, match="--rank 3"):
        of("--world-size", "3", "--rank", "3")


def test_runs_and_status(here: Path) -> None:
    assert "no runs" in invoke("runs").output
    create_run(here / "runs/a", load_recipe("digits"))
    assert json.loads(invoke("runs", "--json").output)[0]["state"] == "new"
    assert "new" in invoke("runs").output
    assert json.loads(invoke("status", "a", "--json").output)["step"] == 0
    assert "state" in invoke("status", "runs/a").output


def test_dry_run_prints_the_script_and_does_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def estimate(*arguments: object) -> Estimate:
        return Estimate([Finding("disk", "warning", "nearly full")], 480)

    monkeypatch.setattr(preflight, "estimate", estimate)
    command = ["submit", "digits", "--nodes", "2", "--ranks-per-node", "2", "--dry-run"]
    result = invoke(*command)
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=2\n" in result.stdout
    assert f"run={here}/runs/digits\n" in result.stdout
    # The lead that the job would have.
    assert "#SBATCH --signal=USR2@480\n" in result.stdout
    assert result.stderr == "warning: disk: nearly full\n"
    found = json.loads(invoke(*command, "--json").stdout)
    assert found["script"] == result.stdout
    assert (found["job"], found["run"]) == (None, f"{here}/runs/digits")
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("vary", "says"),
    [
        ("micro_batch=64,512", "not a multiple"),
        ("micro_batch=64,256", "r-1: 2 ranks"),
        ("data.path=shards/digits,/no", "r-1: data.path /no is no folder"),
        ("duration=60 epochs,1 steps", "r-1: schedule.cycles"),
    ],
)
def test_one_value_that_does_not_work_lets_no_run_of_an_array_start(
    here: Path, monkeypatch: pytest.MonkeyPatch, vary: str, says: str
) -> None:
    (here / "sbatch").write_text("#!/bin/sh\ntouch submitted; echo 1\n")
    (here / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}:/usr/bin:/bin")
    options = ["--array", "0-1", "--vary", vary, "--ranks-per-node", "2", "--run", "r"]
    with pytest.raises(UserError, match=says):
        invoke("submit", *DIGITS, *options, "--no-check")
    assert not (here / "submitted").exists()
    assert not (here / "runs").exists()


def test_the_batch_rule_is_shown_and_applied(here: Path) -> None:
    scaled = ["optimizer.lr=0.5", "optimizer.scale={rule: linear, base_batch: 64}"]
    found = json.loads(invoke("check", "--quick", *DIGITS, *scaled, "--json").output)
    assert max(found["lr"].values()) == pytest.approx(2.0)
    assert "0.5 at a batch of 64" in found["lr_rule"]
    text = invoke("schedule", *DIGITS, *scaled, "optimizer.scale.rule=sqrt").output
    assert "by the sqrt rule 1 at 256" in text
    rates = json.loads(invoke("schedule", *DIGITS, *scaled, "--json").output)["lr"]
    assert max(rates) == pytest.approx(2.0)


def test_a_plateau_cannot_be_drawn_in_advance(here: Path) -> None:
    plateau = "schedule={name: plateau, warmup: 4 steps}"
    with pytest.raises(UserError, match="depends on what the run measures"):
        invoke("schedule", *DIGITS, plateau)
    assert "lowered on plateaus" in " ".join(
        invoke("check", "--quick", *DIGITS, plateau).output.split()
    )
    assert (
        json.loads(invoke("check", "--quick", *DIGITS, plateau, "--json").output)["lr"]["0"] == 0.0
    )


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_finished_run_that_a_launcher_starts_again_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str
) -> None:
    """Its shards may be gone; the launcher repeats the command that made it."""
    torchrun = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(signal, "pthread_sigmask", lambda how, numbers: None)
    monkeypatch.chdir(tmp_path)
    run = create_run(Path("runs/a"), load_recipe("digits"))
    run.summary.write_text("{}")
    before = {path: path.read_bytes() for path in run.path.iterdir()}
    assert status_of("train", "digits", "--run", "a") == (
        *(0, f"runs/a is finished; see {run.report}\n" if rank == "0" else ""),
    )
    assert status_of("train", "digits", "seed=1", "--run", "a")[0] == 2  # another recipe's
    assert {path: path.read_bytes() for path in run.path.iterdir()} == before


def test_distill_is_train_with_a_teacher(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RUN by name, RUN by its directory, or FOLDER; all else is as `train` has it."""
    begun: list[Path] = []
    monkeypatch.setattr("bigbatch.launcher.start.begin", lambda run, *_: begun.append(run))
    create_run(Path("runs/old"), load_recipe("digits"))
    folder = here / "five members"
    folder.mkdir()
    (folder / "ensemble.json").write_text("{}")
    for number, (named, path) in enumerate(
        [("old", "runs/old"), ("runs/old", "runs/old"), ("five members", "five members")]
    ):
        changes = ("distill.temperature=2", "optimizer.lr=1")
        invoke("distill", *DIGITS, *changes, "--teacher", named, "--run", f"new-{number}")
        taught = RunDir(begun[-1]).recipe()
        assert begun[-1] == Path(f"runs/new-{number}")
        changed = [*DIGITS[1:], *changes, f"distill={{teacher: {path}, temperature: 2}}"]
        assert taught == load_recipe("digits", changed)
    assert status_of("distill", "digits", "--teacher", "nobody")[1].startswith("no run 'nobody'")
    status, said = status_of("train", "digits", "distill.teacher=nobody")
    assert (status, "neither a run" in said) == (2, True)
    assert len(begun) == 3


def test_models_are_listed_and_some_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    answer = {
        "names": ["lenet5", "nin", "zfnet"],
        "models": [
            {"name": "lenet5", "parameters": 61_706, "flops": 833_000, "input_size": [1, 32, 32]},
            {"name": "nin", "parameters": None, "flops": None, "input_size": None},
        ],
    }

    def ask(*arguments: str, patience_s: float) -> object:
        asked.append(arguments)
        return answer if arguments[1] != "none" else {"names": [], "models": []}

    monkeypatch.setattr("bigbatch.launcher.estimate.ask", ask)
    said = invoke("models", "*net*", "--limit", "2")
    assert asked == [("catalogue", "*net*", "2", "1000")]
    assert "0.06171 M" in said.output
    assert "1 x 32 x 32" in said.output
    assert "unknown" in said.output
    assert "zfnet\n3 models, of which 2 were measured: raise --limit" in said.output
    assert json.loads(invoke("models", "--json").output) == answer
    assert status_of("models", "none")[0] == 2
    monkeypatch.setattr(
        "bigbatch.launcher.estimate.ask", lambda *_, **__: "no torch on this machine"
    )
    assert "cannot be listed: no torch on this machine; list them where" in status_of("models")[1]


def test_a_closed_stream_is_dev_null(tmp_path: Path) -> None:
    """`train >&-` was a traceback; and a file would take the number of what is printed."""
    code = (
        "import sys; from bigbatch.launcher.cli.main import open_streams; open_streams()\n"
        "file = open(sys.argv[1], 'w'); assert file.fileno() > 2\n"
        "print('lost', flush=True); print('lost', file=sys.stderr, flush=True); input"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], check=False)
    assert done.returncode == 0
    assert (tmp_path / "a").read_text() == ""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_dev_null_for_the_worker_too(tmp_path: Path, closed: str) -> None:
    """Which takes the place of the command, by exec."""
    then = "import os, sys; [os.fstat(n) for n in range(3)]; open(sys.argv[1], 'w').write('there')"
    code = (
        "import os, sys; from bigbatch.launcher.cli.main import open_streams; open_streams()\n"
        "os.execv(sys.executable, [sys.executable, '-c', *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", code, then, str(tmp_path / "a")]
    done = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *command], check=False)
    assert done.returncode == 0
    assert (tmp_path / "a").read_text() == "there"
