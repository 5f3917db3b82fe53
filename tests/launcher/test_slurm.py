"""Batch scripts, against golden files; and everything that must not get into one."""

import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, read_jsonl
from bigbatch.launcher.slurm import Job, render, submit

GOLDEN = Path(__file__).parent / "golden"
TEMPLATE = Path(__file__).parents[2] / "slurm" / "train.sbatch"
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


@pytest.mark.parametrize(
    ("name", "job", "run", "folder"),
    [
        ("small", SMALL, "/home/ann/project/runs/digits", "/home/ann/project"),
        ("large", LARGE, "/scratch/my runs/100%/imagenet-2", "/home/ann/my project"),
    ],
)
def test_script_is_the_golden_one(name: str, job: Job, run: str, folder: str) -> None:
    # To renew after a deliberate change: write `text` into the file and read the diff.
    text = render(job, Path(run), Path(folder), python="/opt/venv/bin/python")
    assert text == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.parametrize("path", [TEMPLATE, *sorted(GOLDEN.glob("*.sbatch"))], ids=lambda p: p.stem)
def test_script_is_valid_bash(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("status", [0, 1, 75, 143])
@pytest.mark.parametrize("script", ["template", "rendered"])
def test_script_starts_the_ranks_and_requeues_only_after_75(
    tmp_path: Path, status: int, script: str
) -> None:
    # The script for real, with srun and scontrol replaced by programs that note their call.
    for name in ("srun", "scontrol"):
        program = tmp_path / name
        program.write_text(
            f'#!/bin/bash\nprintf "%s\\n" {name} "$@" >> {tmp_path}/calls\n'
            + (f"exit {status}\n" if name == "srun" else "")
        )
        program.chmod(0o755)
    path = TEMPLATE
    if script == "rendered":
        path = tmp_path / "job.sbatch"
        path.write_text(render(SMALL, Path("/r u n/digits"), tmp_path, python="/opt/python"))
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "3",
    }
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
        {"ranks_per_node": 0},
        {"cpus_per_rank": 0},
    ],
    ids=str,
)
def test_values_outside_the_allow_list(change: dict[str, object]) -> None:
    with pytest.raises(UserError):
        replace(SMALL, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "run", ["/runs/a\nb", '/runs/a"b', "/ru'ns/ab", "/runs#/ab", "/runs/$(id)", "/runs\\/ab"]
)
def test_paths_that_a_script_cannot_hold(run: str) -> None:
    with pytest.raises(UserError, match=r"cannot read in a script|not allowed"):
        render(SMALL, Path(run), Path("/home/ann"))


def test_dollar_signs_in_folders_stay_text() -> None:
    text = render(SMALL, Path("/runs/$HOME `id`/digits"), Path("/home"), python="/opt/python")
    line = next(line for line in text.splitlines() if line.startswith("set --"))
    done = subprocess.run(
        ["bash", "-c", f'{line}; echo "${{@: -1}}"'], capture_output=True, text=True, check=True
    )
    assert done.stdout == "/runs/$HOME `id`/digits\n"


def test_submit_hands_the_script_to_sbatch_and_notes_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sbatch(tmp_path, 'echo "$@" > "$(dirname "$0")/arguments"; echo "4711;cluster"', monkeypatch)
    path = tmp_path / "runs" / "digits"
    assert submit(load_recipe("digits"), SMALL, path) == "4711"
    assert (tmp_path / "arguments").read_text() == f"--parsable {path}/job.sbatch\n"
    run = RunDir(path)
    assert run.recipe() == load_recipe("digits")
    assert (path / "job.sbatch").read_text() == render(SMALL, path, Path.cwd())
    assert [(e["kind"], e["job"]) for e in read_jsonl(run.events)] == [("submitted", "4711")]
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_refused_job_leaves_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _sbatch(tmp_path, "echo 'sbatch: error: invalid partition: x' >&2; exit 1", monkeypatch)
    with pytest.raises(UserError, match="invalid partition: x"):
        submit(load_recipe("digits"), SMALL, tmp_path / "runs" / "digits")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_run_that_exists_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _sbatch(tmp_path, "echo 1", monkeypatch)
    path = tmp_path / "runs" / "digits"
    submit(load_recipe("digits"), SMALL, path)
    before = {p: p.read_bytes() for p in path.iterdir()}
    with pytest.raises(UserError, match="exists already"):
        submit(load_recipe("digits"), SMALL, path)
    assert {p: p.read_bytes() for p in path.iterdir()} == before


def test_no_sbatch_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--dry-run"):
        submit(load_recipe("digits"), SMALL, tmp_path / "digits")
    assert not (tmp_path / "digits").exists()


def _sbatch(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for sbatch; tests/launcher/test_slurm_cluster.py uses the real one."""
    program = folder / "sbatch"
    program.write_text(f"#!/bin/bash\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
