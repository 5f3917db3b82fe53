"""The runs there are, read from their directories and SLURM's queue: no daemon, no database.

Looking at runs writes nothing, so any number of people may do so at once.
"""

import errno
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import iter_jsonl, read_json
from bigbatch.configs.judged import ACCURACY, Score, judged_in
from bigbatch.configs.notices import notice
from bigbatch.configs.rundir import ENSEMBLE, RunDir, RunExists, check_layout, create_run
from bigbatch.configs.schema import Recipe
from bigbatch.data.measured import with_measured
from bigbatch.launcher.runs.processes import Trainer, busy_workers, find_trainers, processes
from bigbatch.launcher.slurm import squeue
from bigbatch.launcher.slurm.squeue import QueuedJob
from bigbatch.launcher.slurm.submit import job_of
from bigbatch.launcher.start import unused_path
from bigbatch.trainers.monitoring.alerts import TITLES
from bigbatch.trainers.recovery.heartbeat import Heartbeat

# A run on another machine cannot be asked whether it lives: this long without a record, and
# it counts as killed.
_SILENT_S = 900.0
# What the records of a damaged run may raise.
_DAMAGES = (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError)
ENDED = ("stopped", "failed", "finished", "killed", "unreadable")


@dataclass(frozen=True)
class RunInfo:
    """One line of `bigbatch runs`. `age_s` is the time since the last record."""

    name: str
    path: str
    state: str  # new, queued, running, stopped, failed, finished, killed or unreadable
    step: int
    total_steps: int | None
    best_accuracy: float | None  # on the validation split; of a classifier
    age_s: float
    job: str | None = None  # of SLURM, such as 4711, or 4711_3 of an array
    waits_for: str | None = None  # SLURM's reason why a queued job does not run yet
    best_score: dict[str, float] | None = None  # by its name, of a run that has no accuracy


def find_run(name: str, runs: Path, *, whole: bool = True) -> RunDir:
    """A run by its directory, or by its name below `runs`.

    UserError, too, where one of its files is none (`check_layout`), unless `whole` is False.
    """
    for path in (Path(name), runs / name):
        try:
            if (path / "recipe.yaml").is_file():
                if whole:
                    check_layout(RunDir(path))
                return RunDir(path)
        except PermissionError as error:
            raise UserError(
                f"{path} may not be read ({error.strerror}): a run belongs to who started it; "
                "ask them to open it to you"
            ) from None
    raise UserError(
        f"no run {name!r}: neither {name} nor {runs / name} holds a recipe.yaml; "
        "`bigbatch runs` lists the runs there are"
    )


def find_model(name: str, runs: Path) -> Path:
    """A folder that `bigbatch ensemble` wrote, as it is; else a run, as `find_run` finds it."""
    path = Path(name)
    return path if (path / ENSEMBLE).is_file() else find_run(name, runs).path


def job_number(text: str, runs: Path) -> str:
    """The SLURM job that a person means by its number, or by the name of its run."""
    if text[:1].isdigit() and not (runs / text).is_dir():
        return text
    job = job_of(find_run(text, runs))
    if job is None:
        raise UserError(f"run {text!r} was not submitted to SLURM; name one that was, or a job")
    return job


def list_runs(runs: Path) -> list[RunInfo]:
    """All runs below a folder, the one with the newest record first."""
    if not runs.is_dir():
        return []
    found = [RunDir(p.parent) for p in runs.glob("[!.]*/recipe.yaml")]
    jobs = squeue.find_jobs(job for run in found if (job := _live_job(run)))
    here = find_trainers()
    infos = (describe(run, jobs=jobs, trainers=here) for run in found)
    return sorted(infos, key=lambda info: info.age_s)


def look_up(run: RunDir) -> RunInfo:
    """One run, with SLURM asked where it belongs to a job."""
    job = _live_job(run)
    return describe(run, jobs=squeue.find_jobs([job]) if job else None)


def describe(
    run: RunDir,
    now: float | None = None,
    jobs: Mapping[str, QueuedJob] | None = None,
    trainers: Sequence[Trainer] | None = None,
) -> RunInfo:
    """What the files of a run, its processes, and the `jobs` that SLURM knows, say.

    `jobs` None: nobody asked SLURM; `trainers` None: they are looked for. Never fails: a
    damaged run is listed as unreadable.
    """
    now = time.time() if now is None else now
    try:
        check_layout(run)
        changed = [p.stat().st_mtime for p in _records(run) if p.exists()]
        age = max(0.0, now - max(changed))
        step, judge, best = _progress(run.metrics)
        totals = (e.get("total_steps") for e in _newest(run, "start"))
        total = next((int(t) for t in totals if t is not None), None)
        state = _state(run, age, trainers)
        job = job_of(run)
    except _DAMAGES:
        return RunInfo(run.name, str(run.path), "unreadable", 0, None, None, 0.0)
    right = best if judge == ACCURACY else None
    info = RunInfo(run.name, str(run.path), state, step, total, right, round(age, 1), job)
    if judge != ACCURACY and best is not None:
        info = replace(info, best_score={judge.key: best})
    if job is None or jobs is None or state == "finished":
        return info
    queued = jobs.get(job)
    if queued is not None and queued.active:
        waits = queued.reason if queued.waiting else None
        return replace(info, state="queued" if queued.waiting else "running", waits_for=waits)
    gone = {"running": "killed", "new": "failed"}  # SLURM knows better than a silent file
    return replace(info, state=gone.get(state, state))


def state_of(run: RunDir) -> str:
    """The state of one run; "unknown" while SLURM does not answer.

    The files of a preempted run say no more than that it stopped.
    """
    job = _live_job(run)
    jobs = squeue.find_jobs([job]) if job else None
    if job and jobs is None and squeue.available():
        return "unknown"
    return describe(run, jobs=jobs).state


def has_ended(run: RunDir) -> bool:
    """Whether nothing goes on with a run by itself: no process, no job, not even a waiting one."""
    return state_of(run) in ENDED


def new_run(path: Path, recipe: Recipe, made_up: bool) -> RunDir:
    """Create a run. One that failed before its first step gives its name back.

    `made_up`: nobody has chosen the name, so the next free one does where another start was
    faster. Raises RunExists for a chosen name that is taken.
    """
    while True:
        try:
            return create_run(path, recipe, with_measured)
        except RunExists:
            there = RunDir(path)
            if made_up:
                path = unused_path(path.with_name(recipe.name))
            elif there.recipe_file.is_file() and _never_trained(there):
                remove(there)
                notice(f"{path} failed before its first step; this start takes its place")
            else:
                raise


def _never_trained(run: RunDir) -> bool:
    """Whether a run failed before its first step, so that its directory holds no work."""
    begun = next(_newest(run, "start", "submitted"), None)
    return describe(run).state == "failed" and begun is None and not run.checkpoints.exists()


def status(run: RunDir) -> dict[str, Any]:
    """All that a person asks of one run, in plain values."""
    info = look_up(run)
    start = next(_newest(run, "start"), {})
    # The end of a start that failed says why.
    told = (e for e in _newest(run, *TITLES) if e["kind"] != "end" or "error" in e)
    trained = iter_jsonl(run.metrics, b'"train"', newest_first=True)
    records = list(islice((r for r in trained if r.get("kind") == "train"), 20))
    last = records[0] if records else {}
    left = None
    if info.total_steps and info.state == "running" and records:
        try:
            left = _seconds_left(info.total_steps - info.step, start, records)
        except _DAMAGES:
            left = None
    ended = info.job is not None and info.state in ("failed", "killed", "stopped")
    return {
        **asdict(info),
        "job_ended": squeue.how_it_ended(info.job) if ended and info.job else None,
        "starts": sum(1 for _ in _newest(run, "start")),
        "world_size": start.get("world_size"),
        "device": start.get("device"),
        "host": start.get("host"),
        "loss": last.get("loss"),
        "lr": last.get("lr"),
        "images_per_s": last.get("images_per_s"),
        "mfu": last.get("mfu"),
        "slowest": last.get("slowest"),
        "alerts": list(islice(told, 5))[::-1],
        "seconds_left": left,
        "checkpoints": sorted(p.name for p in run.checkpoints.glob("step-????????")),
        "forked_from": run.forked_from,
        "summary": read_json(run.summary),
        "report": str(run.report) if run.report.exists() else None,
    }


def _seconds_left(steps: int, start: dict[str, Any], records: list[dict[str, Any]]) -> float:
    """How long so many steps take, by the last records, newest first."""
    timed = [r for r in records if r.get("step_s")]
    left, done = steps, len(timed)
    if "total_samples" in start and "samples" in records[0]:  # steps of a batch that changes
        timed = [r for r in timed if "global_batch" in r]
        left = start["total_samples"] - records[0]["samples"]
        done = sum(r["global_batch"] for r in timed)
    return float(left * sum(r["step_s"] for r in timed) / max(1, done))


def cancel(run: RunDir) -> str:
    """Ask a run to save and end; returns what was done. Raises UserError where it does not run."""
    info = look_up(run)
    if info.job is not None and (jobs := squeue.find_jobs([info.job])):
        job = jobs.get(info.job)
        if job is not None and job.active:
            squeue.stop(info.job, job)
            if job.waiting:
                return f"job {info.job} is out of the queue; nothing was lost"
            return f"job {info.job} finishes its step, saves and ends; it is not requeued"
    found = processes(run)
    if not found and (busy := busy_workers(run)):
        return "; ".join(f"{worker.name}: {cancel(worker)}" for worker in busy)
    host = next(_newest(run, "start"), {}).get("host")
    if info.state == "running" and not found and host != socket.gethostname():
        raise UserError(
            f"{run.name} runs on {host}, this is {socket.gethostname()}; cancel it there"
        )
    if info.state != "running" or not found:
        raise UserError(f"{run.name} is {info.state}: there is nothing to cancel")
    # One rank is enough: all of them learn of it in the same step.
    pid = found[0]
    try:
        os.kill(pid, signal.SIGTERM)
    except OSError as error:  # another user's, or it ended just now
        raise UserError(f"cannot signal process {pid} of {run.name}: {error.strerror}") from None
    return f"process {pid} finishes its step, saves and ends"


def remove(run: RunDir) -> None:
    """Delete a run directory. Raises UserError for a run that still has a future.

    The lock on the run is taken first, as by a start of it. Then the directory is renamed, so
    that of two people who remove it one gets a clear message, and nobody sees half a run. A
    link to a run goes with what it points to.
    """
    # Before the lock: a process that is about to take it would find it taken, and fail.
    _refuse_to_remove(run)
    lock = _lock(run)
    try:
        _refuse_to_remove(run)
        doomed = _hide(run)
        try:
            shutil.rmtree(doomed)
        except (OSError, KeyboardInterrupt) as error:
            reason = str(error) or "interrupted"
            raise UserError(
                f"{run.path} is removed in part ({reason}); what is left is hidden as {doomed}: "
                f"`rm -r {doomed}` removes it"
            ) from None
    finally:
        if lock is not None:
            lock.close()


def _hide(run: RunDir) -> Path:
    """Rename what is to be removed, and drop the link that named it; both, or none of them."""
    folder = run.path.resolve()
    doomed = folder.with_name(f".{folder.name}.removed-{os.getpid()}")
    try:
        folder.rename(doomed)
        if run.path.is_symlink():
            try:
                run.path.unlink()
            except OSError:
                doomed.rename(folder)
                raise
    except OSError as error:
        raise UserError(f"cannot remove {run.path}: {error}") from None
    return doomed


def _refuse_to_remove(run: RunDir) -> None:
    state = "running" if processes(run) or busy_workers(run) else state_of(run)
    if state == "unknown":
        raise UserError(
            f"SLURM does not answer whether job {_live_job(run)} of {run.name} is over; try again "
            f"later, or `rm -r {run.path}` once you know"
        )
    if state in ("running", "queued"):
        raise UserError(f"{run.name} is {state}; `bigbatch cancel {run.path}` ends it first")


def _lock(run: RunDir) -> Heartbeat | None:
    """The lock on a run. Raises UserError, naming the holder, where somebody has it.

    None where a run cannot start either: its files are none, or a full disk takes no lock.
    """
    try:
        check_layout(run)
    except UserError:
        return None
    heartbeat: Heartbeat | None = None
    try:
        heartbeat = Heartbeat(run.heartbeats, 0)
        heartbeat.lock()
        return heartbeat
    except OSError as error:
        if heartbeat is not None:
            heartbeat.close()
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"cannot remove {run.path}: {error}") from None
        return None
    except BaseException:
        assert heartbeat is not None
        heartbeat.close()
        raise


def _live_job(run: RunDir) -> str | None:
    """The job to ask SLURM about; None where a run has none, or is finished."""
    try:
        return None if run.summary.exists() else job_of(run)
    except _DAMAGES:
        return None  # unreadable; `describe` says so


def _records(run: RunDir) -> tuple[Path, ...]:
    return (run.recipe_file, run.metrics, run.events)


def _newest(run: RunDir, *kinds: str) -> Iterator[dict[str, Any]]:
    """The events of these kinds, newest first: who asks for one reads little of a long file."""
    words = [f'"{kind}"'.encode() for kind in kinds]
    found = iter_jsonl(run.events, *words, newest_first=True)
    return (event for event in found if event.get("kind") in kinds)


def _state(run: RunDir, age: float, trainers: Sequence[Trainer] | None) -> str:
    last = next(_newest(run, "start", "end"), None)
    end = str(last.get("state", "stopped")) if last and last["kind"] == "end" else None
    if end is not None and end not in ENDED:
        raise ValueError(f"no state: {end}")
    if end == "finished":
        return end
    # A crashed rank may have noted its end; while its agent lives, it is started again.
    if processes(run, trainers):
        return "running"
    if last is None:
        return "new"
    if end or last.get("host") == socket.gethostname():
        return end or "killed"
    return "running" if age < _SILENT_S else "killed"


def _progress(metrics: Path) -> tuple[int, Score, float | None]:
    """The last step, the score that the run is judged by, and the best so far on validation.

    Long runs have a million records, so only the lines that say this are parsed.
    """
    last = next(iter_jsonl(metrics, newest_first=True), {})
    evals = (e for e in iter_jsonl(metrics, b'"val"') if e.get("kind") == "eval")
    judge, values = ACCURACY, list[float]()
    for record in evals:
        judge = judged_in(record) or judge
        if record.get(judge.key) is not None:
            values.append(float(record[judge.key]))
    best = max if judge.more_is_better else min
    return int(last.get("step", 0)), judge, best(values, default=None)
