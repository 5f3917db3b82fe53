"""What SLURM says of jobs, and what it is told: squeue, sacct, scontrol and scancel.

A run of an array goes by its task, such as 4711_2, everywhere: the job id of the task that
started last is the array's own number, which means all tasks to scontrol, scancel and squeue
(SLURM 22.05).
"""

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from tempfile import NamedTemporaryFile

from bigbatch.configs.errors import UserError

_PATIENCE_S = 60.0
_ARRAY = ("SLURM_ARRAY_", "SBATCH_ARRAY_INX")
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING")
# A job whose node failed is on its way back into the queue; if not, squeue soon forgets it.
ACTIVE = (
    *WAITING,
    "NODE_FAIL",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "PREEMPTED",
    "SIGNALING",
    "STAGE_OUT",
)


@dataclass(frozen=True)
class QueuedJob:
    """One job as SLURM sees it: `reason` says what a waiting one waits for."""

    state: str
    reason: str

    @property
    def active(self) -> bool:
        return self.state in ACTIVE

    @property
    def waiting(self) -> bool:
        return self.state in WAITING


def available() -> bool:
    return shutil.which("squeue") is not None


def find_jobs(numbers: Iterable[str]) -> dict[str, QueuedJob] | None:
    """The jobs among `numbers` that squeue still knows; None where squeue cannot be asked."""
    wanted = sorted(set(numbers))
    if not wanted:
        return {}
    form = "--format=%i|%T|%r"
    done = _call(
        "squeue", "--noheader", "--array", "--states=all", form, f"--jobs={','.join(wanted)}"
    )
    if done is None:
        return None
    if done.returncode != 0:
        # One unknown job is an error, several with a known one among them are not.
        return {} if "Invalid job id" in done.stderr else None
    found: dict[str, QueuedJob] = {}
    for line in done.stdout.splitlines():
        number, state, reason = (*line.split("|"), "", "")[:3]
        found[number.strip()] = QueuedJob(state.strip(), reason.strip())
    return found


def job_of_script(script: str) -> str | None:
    """The newest job of this user's that was made of a script; None where SLURM knows none.

    Raises UserError where SLURM does not answer: nothing may be concluded then.
    """
    done = _call("squeue", "--noheader", "--me", "--states=all", "--format=%i|%o")
    if done is None or done.returncode != 0:
        error = done.stderr.strip() if done else "no answer"
        raise UserError(f"cannot ask SLURM for the job of {script}: {error}; try again later")
    jobs = [line.split("|", 1) for line in done.stdout.splitlines() if "|" in line]
    return max((job for job, command in jobs if command.strip() == script), key=_age, default=None)


def _age(job: str) -> int:
    return int(job.split("_")[0])


def how_it_ended(number: str) -> str | None:
    """sacct's word for a job that left the queue, such as NODE_FAIL 0:0; None: no accounting."""
    options = ("--noheader", "--parsable2", "--allocations", "--format=State,ExitCode")
    done = _call("sacct", *options, f"--jobs={number}")
    lines = done.stdout.split("\n") if done is not None and done.returncode == 0 else [""]
    return lines[0].replace("|", " ").strip() or None


def submit(script: str, *options: str) -> str:
    """Hand a script to sbatch; returns the job's number. Raises UserError with its words."""
    # A job inherits the array that it was submitted from, and sbatch takes one from the
    # environment: this one is what its script says.
    env = {k: v for k, v in os.environ.items() if not k.startswith(_ARRAY)}
    done = _call("sbatch", "--parsable", *options, script, env=env)
    if done is None:
        raise UserError(
            "sbatch is not on this machine, or does not answer; submit from a login node, or "
            "look at the script with --dry-run"
        )
    number = done.stdout.strip().split(";")[0]
    if done.returncode != 0 or not number.isdecimal():
        error = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        raise UserError(f"sbatch refused the job: {error}; correct the options and submit again")
    return number


def would_start(script: str) -> tuple[bool, str] | None:
    """`sbatch --test-only`: whether the script's text is accepted, and sbatch's words."""
    with NamedTemporaryFile("w", suffix=".sbatch") as file:
        file.write(script)
        file.flush()
        done = _call("sbatch", "--test-only", file.name)
    if done is None:
        return None
    return done.returncode == 0, done.stderr.strip() or done.stdout.strip()


def stop(number: str, job: QueuedJob) -> None:
    """End a job for good. A running one gets SIGUSR2: its ranks save, then exit.

    It is made one that is never requeued first; the batch script would requeue it otherwise.
    """
    if job.waiting:
        _must("scancel", number)
        return
    _must("scontrol", "update", f"JobId={number}", "Requeue=0")
    _must("scancel", "--signal=USR2", number)


def _must(*command: str) -> None:
    done = _call(*command)
    if done is None or done.returncode != 0:
        error = done.stderr.strip() if done else "no answer"
        raise UserError(f"{' '.join(command)}: {error}; see `squeue`, and try again")


def _call(
    *command: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str] | None:
    """None where the program is not here, or gives no answer in time."""
    program = shutil.which(command[0])
    if program is None:
        return None
    try:
        return subprocess.run(
            [program, *command[1:]],
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=_PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        return None
