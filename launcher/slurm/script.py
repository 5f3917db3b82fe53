"""SLURM's batch script: slurm/train.sbatch filled in for one run, or for an array of them.

Pure functions; launcher/slurm/submit.py writes the script and hands it to sbatch.
"""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from bigbatch.configs.errors import UserError
from bigbatch.configs.redact import refuse_secrets
from bigbatch.configs.rundir import NAME

# The one line of the template that says what to start, and the start of the one that does.
_COMMAND = 'set -- bigbatch train "$@"\n'
_SRUN = "srun --mpi=none "
_TASKS = "export SLURM_NTASKS_PER_NODE={} SLURM_CPUS_PER_TASK={}\n"
_MOST_RUNS = 1000  # of an array; sites allow about as many (MaxArraySize 1001)
_TASK = "$SLURM_ARRAY_TASK_ID"

_NODES = re.compile(r"[1-9][0-9]{0,5}(-[1-9][0-9]{0,5})?")
_TIME = re.compile(r"([0-9]{1,4}-)?[0-9]{1,6}(:[0-9]{1,2}){0,2}")
_WORD = re.compile(r"[A-Za-z0-9_.,@+-]{1,200}")
_CONSTRAINT = re.compile(r"[A-Za-z0-9_.,@+&|*()\[\]-]{1,200}")
_OPTION = re.compile(r"--[a-z][a-z0-9-]{0,40}(=[A-Za-z0-9_.,:@+=/&|*()\[\]-]{1,400})?")
# sbatch reads its lines with quotes, escapes and comments of its own.
_PATH = re.compile(r"[^\x00-\x1f\x7f\"'\\#:]+")
_ARRAY = re.compile(r"[0-9]{1,6}(-[0-9]{1,6})?(,[0-9]{1,6}(-[0-9]{1,6})?)*(%[1-9][0-9]{0,5})?")
_AFTER = re.compile(r"[0-9]{1,12}(_[0-9]{1,6})?")
_IMAGE = re.compile(r"[A-Za-z0-9_./@:+#-]{1,400}")
_RUN = re.compile(r"^run=(.+)$", re.MULTILINE)


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
    array: str | None = None  # one run for each index: 0-4, or 0-9%2 for two at a time
    after: str | None = None  # a job that has to end well first
    container: str | None = None  # an image: apptainer's where it ends in .sif, else pyxis's
    lead: int = 120  # seconds between SLURM's signal and the time limit
    options: tuple[str, ...] = ()  # further ones, as sbatch spells them

    def __post_init__(self) -> None:
        for name, pattern, example in (
            ("nodes", _NODES, "4, or 2-8"),
            ("time", _TIME, "90 (minutes), 12:00:00 or 2-00:00:00"),
            ("partition", _WORD, "gpu"),
            ("account", _WORD, "vision-lab"),
            ("qos", _WORD, "normal"),
            ("constraint", _CONSTRAINT, "h100|a100"),
            ("array", _ARRAY, "0-4, or 0-9%2 to run two at a time"),
            ("after", _AFTER, "4711, the number of a job, or the name of a run"),
            ("container", _IMAGE, "nvcr.io#nvidia/pytorch:25.10-py3, or image.sif"),
        ):
            value = getattr(self, name)
            if value is not None and not pattern.fullmatch(value):
                raise UserError(f"--{name} {value!r} is not allowed; write it like {example}")
        check_options(self.options)
        if self.ranks_per_node < 1 or self.cpus_per_rank < 1 or self.gpus_per_node < 0:
            raise UserError(
                f"{self.ranks_per_node} ranks per node with {self.cpus_per_rank} cores each and "
                f"{self.gpus_per_node} GPUs per node: ranks and cores must be 1 or more"
            )

        if not 1 <= self.lead < 86_400:
            raise UserError(f"signal lead {self.lead} s: it must be from 1 to 86399 seconds")
        if len(self.indices) > _MOST_RUNS:
            raise UserError(f"--array {self.array}: more than {_MOST_RUNS} runs; submit fewer")

    @property
    def indices(self) -> list[int]:
        """The numbers of an array's runs, in order; none where the job is no array."""
        if self.array is None:
            return []
        found: set[int] = set()
        for part in self.array.split("%")[0].split(","):
            first, _, last = part.partition("-")
            if int(last or first) < int(first):
                raise UserError(f"--array {self.array}: {part} ends before it starts")
            # No longer than what is refused, however large the numbers are.
            found |= set(range(int(first), min(int(last or first), int(first) + _MOST_RUNS) + 1))
        return sorted(found)

    @property
    def most_ranks(self) -> int:
        """The largest world size that the job may get."""
        return int(self.nodes.split("-")[-1]) * self.ranks_per_node

    @property
    def seconds(self) -> int | None:
        """The time limit. sbatch(1): M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
        if self.time is None:
            return None
        days, dash, clock = self.time.rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        if not dash and len(parts) < 3:
            parts = [0, *parts]  # minutes come first where no days or hours are written
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return int(days or 0) * 86_400 + hours * 3_600 + minutes * 60 + seconds


def check_options(options: Sequence[str]) -> None:
    """Raise UserError where a further option of sbatch is not one long option without a secret."""
    refuse_secrets(options, "--sbatch-arg")
    for option in options:
        if not _OPTION.fullmatch(option):
            raise UserError(
                f"--sbatch-arg {option!r} is not allowed; write one long option, such as "
                "--sbatch-arg=--exclusive or --sbatch-arg=--mem=64G"
            )
        name = option[2:].partition("=")[0]
        if len(name) > 1 and "array".startswith(name):  # options may be cut short
            raise UserError(
                f"--sbatch-arg {option!r} is not allowed: each run of an array needs a directory "
                "of its own; `bigbatch submit --array` makes them"
            )


def run_paths(job: Job, run: Path) -> list[Path]:
    """The directories of the runs that a job trains: `run` itself, or RUN-INDEX of an array."""
    return [run.with_name(f"{run.name}-{i}") for i in job.indices] or [run]


def render(
    job: Job,
    run: Path,
    folder: Path,
    python: str = sys.executable,
    mounts: tuple[Path, ...] = (),
) -> str:
    """The batch script of a run, or of an array of runs RUN-INDEX, with `job` filled in.

    The job works in `folder`, which relative paths of the recipe start from, on the code in
    RUN/code. A container sees `folder`, the runs, and the folders in `mounts`.
    """
    if not all(NAME.fullmatch(path.name) for path in run_paths(job, run)):
        raise UserError(f"run name {run.name!r} is not allowed; see --run")
    for path in (str(run), str(folder), python, *map(str, mounts)):
        if not _PATH.fullmatch(path):
            raise UserError(
                f"path {path!r} holds a quote, a backslash, a #, a colon or a control character, "
                "which sbatch cannot read in a script; choose another folder with --run-dir"
            )
    output = str(run).replace("%", "%%")
    # With a range of nodes, tasks would be counted for the fewest, and SLURM would give no
    # more nodes than those need. So a node is asked for by its cores, and srun counts.
    elastic = "-" in job.nodes
    cores = str(job.ranks_per_node * job.cpus_per_rank)
    options = {
        "job-name": run.name,
        "nodes": job.nodes,
        "ntasks-per-node": None if elastic else str(job.ranks_per_node),
        "gpus-per-node": str(job.gpus_per_node) if job.gpus_per_node else None,
        "cpus-per-task": None if elastic else str(job.cpus_per_rank),
        "mincpus": cores if elastic else None,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "constraint": job.constraint,
        "array": job.array,
        "dependency": f"afterok:{job.after}" if job.after else None,
        # Otherwise a job whose turn can never come waits for ever.
        "kill-on-invalid-dep": "yes" if job.after else None,
        "chdir": str(folder),
        "output": f"{output}-%a/slurm-%A_%a.out" if job.array else f"{output}/slurm-%j.out",
        "open-mode": "append",
        "signal": f"USR2@{job.lead}",
    }
    lines = [f"--{name}={value}" for name, value in options.items() if value is not None]
    lines += ["--requeue", *job.options]
    before, _, body = _template().partition(_COMMAND)
    assert before, "slurm/train.sbatch lost its command"
    assert body.count(f"\n{_SRUN}") == 1, "slurm/train.sbatch lost its srun"
    index = f'-"{_TASK}"' if job.array else ""
    flags, prefix = _container(job, [folder, run.parent, *mounts], folder)
    program = [*prefix, "python3" if job.container else python]
    return (
        "#!/bin/bash\n"
        "# Written by `bigbatch submit` from slurm/train.sbatch, which explains it.\n"
        + "".join(f"#SBATCH {shlex.quote(line) if ' ' in line else line}\n" for line in lines)
        + f"\nrun={shlex.quote(str(run))}{index}\n"
        "# The code as it was at submission.\n"
        'export PYTHONPATH="$run/code${PYTHONPATH:+:$PYTHONPATH}"\n'
        + (_TASKS.format(job.ranks_per_node, job.cpus_per_rank) if elastic else "")
        + f'set -- {shlex.join(program)} -P -m bigbatch.launcher.cli resume "$run"\n'
        + body.replace(f"\n{_SRUN}", f"\n{_SRUN}{flags}")
    )


def is_array(script: str) -> bool:
    """Whether a rendered batch script is that of an array."""
    match = _RUN.search(script)
    return match is not None and _TASK in match[1]


def run_in(script: str, index: str) -> Path | None:
    """The directory that a rendered batch script trains, as task `index` of its array.

    None where somebody has rewritten that line.
    """
    match = _RUN.search(script)
    try:
        words = shlex.split(match[1]) if match else []
    except ValueError:
        return None
    return Path(words[0].replace(_TASK, index)) if len(words) == 1 else None


def _container(job: Job, mounts: list[Path], folder: Path) -> tuple[str, list[str]]:
    """Options of srun (pyxis), and the words before the command (apptainer)."""
    if job.container is None:
        return "", []
    folders = [str(path) for path in dict.fromkeys(mounts)]
    if job.container.endswith(".sif"):
        binds = [word for path in folders for word in ("--bind", path)]
        gpus = ["--nv"] if job.gpus_per_node else []
        return "", ["apptainer", "exec", *gpus, *binds, "--pwd", str(folder), job.container]
    flags = {
        "image": job.container,
        "mounts": ",".join(f"{path}:{path}" for path in folders),
        "workdir": str(folder),
    }
    words = shlex.join(f"--container-{name}={value}" for name, value in flags.items())
    return f"{words} \\\n  ", []


def _template() -> str:
    return (resources.files("bigbatch.slurm") / "train.sbatch").read_text(encoding="utf-8")
