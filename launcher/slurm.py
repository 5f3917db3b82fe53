"""SLURM: fill in slurm/train.sbatch for one run, and hand it to sbatch."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from bigbatch.configs.errors import UserError
from bigbatch.configs.rundir import NAME, RunDir, create_run, write_atomically
from bigbatch.configs.schema import Recipe

SCRIPT = "job.sbatch"
# The one line of the template that says what to start.
_COMMAND = 'set -- bigbatch train "$@"\n'

_NODES = re.compile(r"[1-9]\d{0,5}(-[1-9]\d{0,5})?")
_TIME = re.compile(r"(\d{1,4}-)?\d{1,6}(:\d{1,2}){0,2}")
_WORD = re.compile(r"[A-Za-z0-9_.,@+-]{1,200}")
_CONSTRAINT = re.compile(r"[A-Za-z0-9_.,@+&|*()\[\]-]{1,200}")
_OPTION = re.compile(r"--[a-z][a-z0-9-]{0,40}(=[A-Za-z0-9_.,:@+=/&|*()\[\]-]{1,400})?")
# sbatch reads its lines with quotes, escapes and comments of its own.
_PATH = re.compile(r"[^\x00-\x1f\x7f\"'\\#]+")


@dataclass(frozen=True)
class Job:
    """What a run asks of SLURM. `nodes` is a number, or a range such as 2-8."""

    nodes: str
    ranks_per_node: int
    gpus_per_node: int
    cpus_per_rank: int
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    options: tuple[str, ...] = ()  # further ones, as sbatch spells them

    def __post_init__(self) -> None:
        for name, pattern, example in (
            ("nodes", _NODES, "4, or 2-8"),
            ("time", _TIME, "90 (minutes), 12:00:00 or 2-00:00:00"),
            ("partition", _WORD, "gpu"),
            ("account", _WORD, "vision-lab"),
            ("qos", _WORD, "normal"),
            ("constraint", _CONSTRAINT, "h100|a100"),
        ):
            value = getattr(self, name)
            if value is not None and not pattern.fullmatch(value):
                raise UserError(f"--{name} {value!r} is not allowed; write it like {example}")
        for option in self.options:
            if not _OPTION.fullmatch(option):
                raise UserError(
                    f"--sbatch-arg {option!r} is not allowed; write one long option, such as "
                    "--sbatch-arg=--exclusive or --sbatch-arg=--mem=64G"
                )
        if self.ranks_per_node < 1 or self.cpus_per_rank < 1 or self.gpus_per_node < 0:
            raise UserError(
                f"{self.ranks_per_node} ranks per node with {self.cpus_per_rank} cores each and "
                f"{self.gpus_per_node} GPUs per node: ranks and cores must be 1 or more"
            )

    @property
    def most_ranks(self) -> int:
        """The largest world size that the job may get."""
        return int(self.nodes.split("-")[-1]) * self.ranks_per_node


def render(job: Job, run: Path, folder: Path, python: str = sys.executable) -> str:
    """The batch script of a run that exists: slurm/train.sbatch with `job` filled in.

    The job works in `folder`, which relative paths of the recipe start from.
    """
    if not NAME.fullmatch(run.name):
        raise UserError(f"run name {run.name!r} is not allowed; see --run")
    for path in (str(run), str(folder), python):
        if not _PATH.fullmatch(path):
            raise UserError(
                f"path {path!r} holds a quote, a backslash, a # or a control character, which "
                "sbatch cannot read in a script; choose another folder with --run-dir"
            )
    options = {
        "job-name": run.name,
        "nodes": job.nodes,
        "ntasks-per-node": str(job.ranks_per_node),
        "gpus-per-node": str(job.gpus_per_node) if job.gpus_per_node else None,
        "cpus-per-task": str(job.cpus_per_rank),
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "constraint": job.constraint,
        "chdir": str(folder),
        "output": str(run).replace("%", "%%") + "/slurm-%j.out",
        "open-mode": "append",
        "signal": "USR2@120",
    }
    lines = [f"--{name}={value}" for name, value in options.items() if value is not None]
    lines += ["--requeue", *job.options]
    before, _, body = _template().partition(_COMMAND)
    assert before, "slurm/train.sbatch lost its command"
    command = [python, "-P", "-m", "bigbatch.launcher.cli", "resume", str(run)]
    return (
        "#!/bin/bash\n"
        "# Written by `bigbatch submit` from slurm/train.sbatch, which explains it.\n"
        + "".join(f"#SBATCH {shlex.quote(line) if ' ' in line else line}\n" for line in lines)
        + f"\nset -- {shlex.join(command)}\n"
        + body
    )


def _template() -> str:
    return (resources.files("bigbatch.slurm") / "train.sbatch").read_text(encoding="utf-8")


def submit(recipe: Recipe, job: Job, path: Path) -> str:
    """Create the run, write its batch script into it, hand it to sbatch; returns the job id.

    Raises UserError with sbatch's own words where it refuses; then no run is left behind.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise UserError(
            "sbatch is not on this machine; submit from a login node, or look at the script "
            "with --dry-run"
        )
    path = path.absolute()
    script = render(job, path, Path.cwd())
    run = create_run(path, recipe)
    write_atomically(run.path / SCRIPT, script)
    done = subprocess.run(
        [sbatch, "--parsable", str(run.path / SCRIPT)], capture_output=True, text=True, check=False
    )
    number = done.stdout.strip().split(";")[0]
    if done.returncode != 0 or not number.isdecimal():
        shutil.rmtree(run.path)
        said = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        raise UserError(f"sbatch refused the job: {said}; correct the options and submit again")
    _note(run, number)
    return number


def _note(run: RunDir, job: str) -> None:
    now = time.time()
    date = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(now))
    record = {"time": round(now, 3), "date": date, "kind": "submitted", "step": 0, "job": job}
    with run.events.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
