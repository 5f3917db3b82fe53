"""Batch scripts, against golden files; and everything that must not get into one."""

import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.configs.schema import Recipe
from bigbatch.launcher.slurm.freeze import code_hash
from bigbatch.launcher.slurm.script import Job, render, run_paths
from bigbatch.launcher.slurm.submit import array_recipes, job_of, resubmit, script_of
from bigbatch.launcher.slurm.submit import submit as submit_all

GOLDEN = Path(__file__).parent / "golden"
TEMPLATE = Path(__file__).parents[3] / "slurm" / "train.sbatch"
SMALL = Job(nodes="2", ranks_per_node=2, gpus_per_node=0, cpus_per_rank=1)
LARGE = Job(
    nodes="2-8",
    ranks_per_node=8,
    gpus_per_node=8,
    cpus_per_rank=12,
    time="2-12:00:00",
    partition="gpu",
    account="vision-lab",
    qos="high",
    constraint="h100|a100",
    options=("--exclusive", "--mem=0", "--mail-user=a.b@example.org"),
)


ARRAY = replace(SMALL, array="0-2%2", after="4711", lead=300)
PYXIS = replace(LARGE, container="nvcr.io#nvidia/pytorch:25.10-py3", options=())
APPTAINER = replace(SMALL, gpus_per_node=2, container="/images/torch.sif")


def submit(recipe: Recipe, job: Job, path: Path) -> str:
    return submit_all([recipe], job, path)


@pytest.mark.parametrize(
    ("name", "job", "run", "folder"),
    [
        ("array", ARRAY, "/scratch/my runs/digits", "/home/ann/project"),
        ("pyxis", PYXIS, "/scratch/my runs/digits", "/home/ann/project"),
        ("apptainer", APPTAINER, "/scratch/runs/digits", "/home/ann/project"),
        ("small", SMALL, "/home/ann/project/runs/digits", "/home/ann/project"),
        ("large", LARGE, "/scratch/my runs/100%/imagenet-2", "/home/ann/my project"),
    ],
)
def test_script_is_the_golden_one(name: str, job: Job, run: str, folder: str) -> None:
    # To renew after a deliberate change: write `text` into the file and read the diff.
    mounts = (Path("/data/shards"),)
    text = render(job, Path(run), Path(folder), python="/opt/venv/bin/python", mounts=mounts)
    assert text == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.parametrize("path", [TEMPLATE, *sorted(GOLDEN.glob("*.sbatch"))], ids=lambda p: p.stem)
def test_script_is_valid_bash(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def _stand_ins(tmp_path: Path, status: int, queue: str) -> dict[str, str]:
    """Programs that note how they were called, and the environment of job 7 that finds them."""
    note = f'#!/bin/bash\nprintf "%s\\n" "${{0##*/}}" "$@" >> {tmp_path}/calls\n'
    bodies = {
        "srun": f"{note}exit {status}\n",
        "scontrol": note,
        "squeue": f"#!/bin/bash\n[ \"$*\" = '-hj 7 -o %A %i %T %r' ] && echo '{queue}'\n",
    }
    for name, body in bodies.items():
        (tmp_path / name).write_text(body)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    return {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "3"}


@pytest.mark.parametrize(
    ("queue", "requeued"),
    [
        ("7 7 RUNNING None", ["7"]),
        ("7 7 COMPLETING None", []),  # scancel ended it
        ("7 7 COMPLETING TimeLimit", ["7"]),
        # Task 2, the last to start, has the array's own id; its siblings are in another state.
        ("8 7_0 RUNNING None\n7 7_2 RUNNING None\n9 7_1 RUNNING None", ["7_2"]),
        ("8 7_0 RUNNING None\n7 7_2 COMPLETING None\n9 7_1 RUNNING None", []),
        ("8 7_0 COMPLETING None\n7 7_2 RUNNING None", ["7_2"]),
        ("7 5_1 RUNNING None", ["5_1"]),  # a task that started earlier
        ("", []),
    ],
)
def test_each_run_of_an_array_is_requeued_alone(
    tmp_path: Path, queue: str, requeued: list[str]
) -> None:
    # What a job inherits of the array that it was submitted from says nothing about it.
    inherited = {"SLURM_ARRAY_JOB_ID": "3", "SLURM_ARRAY_TASK_ID": "4"}
    env = _stand_ins(tmp_path, 75, queue) | inherited
    command = ["bash", str(TEMPLATE), "digits"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 75
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[calls.index("digits") + 1 :] == [w for job in requeued for w in _requeue(job)]
    assert ("not requeued" in done.stderr) == (not queue)


def test_a_job_of_no_array_is_requeued_also_while_squeue_does_not_answer(tmp_path: Path) -> None:
    env = _stand_ins(tmp_path, 75, "")
    command = ["bash", str(TEMPLATE), "digits"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (75, "")
    assert (tmp_path / "calls").read_text().splitlines()[-3:] == _requeue("7")


def _requeue(job: str) -> list[str]:
    return ["scontrol", "requeue", job]


@pytest.mark.parametrize("finished", [True, False])
def test_a_script_of_an_older_version_still_runs(tmp_path: Path, finished: bool) -> None:
    """Of 32e6f1a, as it waits in a queue, here without the code that was kept with it."""
    run = create_run(tmp_path / "digits-2", load_recipe("digits"))
    if finished:
        run.summary.write_text("{}")
    before = {path: path.read_bytes() for path in run.path.iterdir()}
    text = (GOLDEN / "array-of-32e6f1a.sbatch").read_text()
    text = text.replace("/opt/venv/bin/python", sys.executable)
    (tmp_path / "job.sbatch").write_text(text.replace("/scratch/my runs", str(tmp_path)))
    (tmp_path / "srun").write_text('#!/bin/bash\nwhile [ "$1" != bash ]; do shift; done; "$@"')
    (tmp_path / "srun").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "2"}
    command = ["bash", "job.sbatch"]
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    if finished:  # started again it does nothing
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{run.path} is finished; see {run.report}\n"
    else:
        assert done.returncode == 2
        assert "data.path shards/digits is no folder here" in done.stderr
    assert {path: path.read_bytes() for path in run.path.iterdir()} == before


@pytest.mark.parametrize("status", [0, 1, 75, 143])
@pytest.mark.parametrize("script", ["template", "rendered"])
def test_script_starts_the_ranks_and_requeues_only_after_75(
    tmp_path: Path, status: int, script: str
) -> None:
    # The script for real, with srun and scontrol replaced by programs that note their call.
    env = _stand_ins(tmp_path, status, "7 7 RUNNING None")
    path = TEMPLATE
    if script == "rendered":
        path = tmp_path / "job.sbatch"
        path.write_text(render(SMALL, Path("/r u n/digits"), tmp_path, python="/opt/python"))
    done = subprocess.run(["bash", str(path), "digits", "seed=1 2"], env=env, check=False)
    assert done.returncode == status
    calls = (tmp_path / "calls").read_text().splitlines()
    options = ["--mpi=none", "--kill-on-bad-exit=1", "--cpus-per-task=3"]
    deaf = ["bash", "-c", 'trap "" TERM USR2; exec "$@"', "rank"]
    command = {
        "template": ["bigbatch", "train", "digits", "seed=1 2"],
        "rendered": [
            *("/opt/python", "-P", "-m", "bigbatch.launcher.cli", "resume"),
            "/r u n/digits",
        ],
    }[script]
    requeue = ["scontrol", "requeue", "7"] if status == 75 else []
    assert calls == ["srun", *options, *deaf, *command, *requeue]


@pytest.mark.parametrize(
    "change",
    [
        {"nodes": "0"},
        {"nodes": "2;id"},
        {"nodes": "two"},
        {"time": "1 day"},
        {"time": "12:00:00\n#SBATCH --uid=0"},
        {"partition": "gpu\nrm -rf ~"},
        {"partition": ""},
        {"account": "$(id)"},
        {"qos": "a b"},
        {"constraint": "a`id`"},
        {"options": ("-x node1",)},
        {"options": ("--wrap=id; id",)},
        {"options": ("--comment=a\n#SBATCH --begin=now",)},
        {"options": ("id",)},
        {"options": ("--array=0-3",)},  # of one run directory
        {"options": ("--ar=0-3",)},
        {"array": "0-4;id"},
        {"array": "4-0"},
        {"array": "0-999999"},
        {"after": "7,afterany:8"},
        {"container": "a b"},
        {"container": "$(id).sif"},
        {"lead": 0},
        {"ranks_per_node": 0},
        {"cpus_per_rank": 0},
    ],
    ids=str,
)
def test_values_outside_the_allow_list(change: dict[str, object]) -> None:
    with pytest.raises(UserError):
        replace(SMALL, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "run",
    [
        "/runs/a:b/c",
        "/runs/a\nb",
        '/runs/a"b',
        "/ru'ns/ab",
        "/runs#/ab",
        "/runs/$(id)",
        "/runs\\/ab",
    ],
)
def test_paths_that_a_script_cannot_hold(run: str) -> None:
    with pytest.raises(UserError, match=r"cannot read in a script|not allowed"):
        render(SMALL, Path(run), Path("/home/ann"))


def test_dollar_signs_in_folders_stay_text() -> None:
    text = render(SMALL, Path("/runs/$HOME `id`/digits"), Path("/home"), python="/opt/python")
    lines = [line for line in text.splitlines() if line.startswith(("run=", "set --"))]
    script = "; ".join([*lines, 'echo "${@: -1}"'])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "/runs/$HOME `id`/digits\n"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("12:00:00", 43_200),
        ("2-0", 172_800),
        ("1-2:30", 95_400),
        ("1-00:00:05", 86_405),
    ],
)
def test_time_limits_in_seconds(text: str, seconds: int) -> None:
    assert replace(SMALL, time=text).seconds == seconds


def test_an_array_gives_each_run_a_directory_and_a_seed() -> None:
    recipe = load_recipe("digits")
    job = replace(SMALL, array="0-2,7")
    assert [p.name for p in run_paths(job, Path("/r/a"))] == ["a-0", "a-1", "a-2", "a-7"]
    assert [r.seed for r in array_recipes(recipe, job)] == [recipe.seed + i for i in (0, 1, 2, 7)]
    varied = array_recipes(recipe, job, ["optimizer.lr=1,2,3,4", "seed=5,5,6,6"])
    assert [(r.optimizer.lr, r.seed) for r in varied] == [(1, 5), (2, 5), (3, 6), (4, 6)]
    with pytest.raises(UserError, match="3 values"):
        array_recipes(recipe, job, ["optimizer.lr=1,2,3"])
    with pytest.raises(UserError, match="needs --array"):
        array_recipes(recipe, SMALL, ["optimizer.lr=1,2,3"])
    with pytest.raises(UserError, match=r"optimizer\.lr"):
        array_recipes(recipe, replace(SMALL, array="0-1"), ["optimizer.lr=1,-1"])


def test_submit_hands_the_script_to_sbatch_and_notes_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sbatch(tmp_path, 'echo "$@" > "$(dirname "$0")/arguments"; echo "4711;cluster"', monkeypatch)
    path = tmp_path / "runs" / "digits"
    assert submit(load_recipe("digits"), SMALL, path) == "4711"
    assert (tmp_path / "arguments").read_text() == f"--parsable {path}/job.sbatch\n"
    run = RunDir(path)
    assert run.recipe() == load_recipe("digits")
    assert (path / "job.sbatch").read_text() == script_of(SMALL, path, load_recipe("digits"))
    assert [(e["kind"], e["job"]) for e in read_jsonl(run.events)] == [("submitted", "4711")]
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_the_code_is_kept_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _sbatch(tmp_path, "echo 4711", monkeypatch)
    path = tmp_path / "runs" / "digits"
    submit(load_recipe("digits"), SMALL, path)
    code = path / "code" / "bigbatch"
    # An edit of the copy is what a job would run, and what its hash shows.
    recorded = json.loads((path / "manifest.json").read_text())["code"]
    assert code_hash(code) == recorded
    (code / "launcher" / "cli" / "__main__.py").write_text("print(__file__)")
    assert code_hash(code) != recorded
    env = {**os.environ, "PYTHONPATH": f"{path}/code:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-P", "-m", "bigbatch.launcher.cli"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"{code}/launcher/cli/__main__.py\n"


def test_an_array_is_one_job_with_a_run_for_each_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sbatch(tmp_path, 'echo "$@" >> "$(dirname "$0")/arguments"; echo 4711', monkeypatch)
    path, job = tmp_path / "runs" / "a", replace(SMALL, array="0-1")
    recipes = array_recipes(load_recipe("digits"), job)
    assert submit_all(recipes, job, path) == "4711"
    for index, recipe in enumerate(recipes):
        run = RunDir(tmp_path / "runs" / f"a-{index}")
        assert run.recipe() == recipe
        assert [e["job"] for e in read_jsonl(run.events)] == [f"4711_{index}"]
    # One of them again, alone.
    assert resubmit(run, ["--time=10"]) == "4711_1"
    with pytest.raises(UserError, match=r"other\.sh' is not allowed"):
        resubmit(run, ["other.sh"])  # sbatch would take it for the script
    run.events.unlink()  # a full disk: no job could be noted
    assert resubmit(run) == "4711_1"
    # A copy has the records and the script of the original, but neither its job nor its task.
    copy = RunDir(shutil.copytree(run.path, tmp_path / "runs" / "copy"))
    assert job_of(run) == "4711_1"
    assert job_of(copy) is None
    with pytest.raises(UserError, match=r"trains .*/a-copy, not .*/copy, which was copied"):
        resubmit(copy)
    assert (tmp_path / "arguments").read_text().splitlines() == [
        f"--parsable {tmp_path}/runs/a-0/job.sbatch",
        f"--parsable --time=10 --array=1 {tmp_path}/runs/a-1/job.sbatch",
        f"--parsable --array=1 {tmp_path}/runs/a-1/job.sbatch",
    ]


def test_a_run_is_no_array_because_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job inherits the variables of the array's task that submits it (SLURM 22.05)."""
    _sbatch(tmp_path, 'env > "$(dirname "$0")/env"; echo 4711', monkeypatch)
    for name in ("SBATCH_ARRAY_INX", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab")
    submit(load_recipe("digits"), SMALL, tmp_path / "runs" / "digits")
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert not [name for name in names if "ARRAY" in name]
    assert "SBATCH_ACCOUNT" in names


def test_an_array_that_meets_an_old_run_leaves_nothing_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sbatch(tmp_path, "echo 4711", monkeypatch)
    create_run(tmp_path / "runs" / "a-1", load_recipe("digits"))
    job = replace(SMALL, array="0-2")
    with pytest.raises(UserError, match="exists already"):
        submit_all(array_recipes(load_recipe("digits"), job), job, tmp_path / "runs" / "a")
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["a-1"]


def test_a_refused_job_leaves_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _sbatch(tmp_path, "echo 'sbatch: error: invalid partition: x' >&2; exit 1", monkeypatch)
    with pytest.raises(UserError, match="invalid partition: x"):
        submit(load_recipe("digits"), SMALL, tmp_path / "runs" / "digits")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_job_that_cannot_be_noted_is_named_with_the_way_to_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk; a folder in the place of the file says it as clearly."""
    _sbatch(tmp_path, 'mkdir "${2%/*}/events.jsonl"; echo 4711', monkeypatch)
    path = tmp_path / "runs" / "digits"
    with pytest.raises(UserError, match=r"as job 4711, .*`scancel 4711`.*resume .*--slurm`"):
        submit(load_recipe("digits"), SMALL, path)
    assert (path / "recipe.yaml").exists()  # the job would need it


def test_a_run_of_an_array_that_cannot_be_noted_leaves_the_others_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sbatch(tmp_path, 'mkdir "${2%/*}/events.jsonl"; echo 4711', monkeypatch)
    job = replace(SMALL, array="0-2")
    with pytest.raises(UserError, match=r"`scancel 4711_0`") as said:
        submit_all(array_recipes(load_recipe("digits"), job), job, tmp_path / "a")
    assert "4711_1" not in str(said.value)
    assert [job_of(RunDir(tmp_path / f"a-{i}")) for i in (1, 2)] == ["4711_1", "4711_2"]


def test_a_run_that_exists_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _sbatch(tmp_path, "echo 1", monkeypatch)
    path = tmp_path / "runs" / "digits"
    submit(load_recipe("digits"), SMALL, path)
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="exists already"):
        submit(load_recipe("digits"), SMALL, path)
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def test_no_sbatch_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--dry-run"):
        submit(load_recipe("digits"), SMALL, tmp_path / "digits")
    assert not (tmp_path / "digits").exists()


def _sbatch(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for sbatch; tests/launcher/slurm/test_slurm_cluster.py uses the real one."""
    program = folder / "sbatch"
    program.write_text(f"#!/bin/bash\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
