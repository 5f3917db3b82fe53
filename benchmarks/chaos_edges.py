"""More faults of benchmarks/chaos.py: at a run's edges, each with what must come of it.

Signals before the first step, a closed terminal, a full disk that holds up the journal of bad
samples, checkpoints that are read-only or links, `bigbatch rm` and `bigbatch cancel` at any
moment, copies of a run, and running statistics that are not finite.
"""

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from chaos_faults import CLI, STEPS, Fault, LocalRun, Wrong, ends, full_disk, until
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from bigbatch.configs.files import iter_jsonl
from bigbatch.configs.rundir import RunDir
from bigbatch.launcher.runs.processes import processes
from bigbatch.trainers.recovery.stored import (
    MANIFEST,
    MODEL,
    STATISTICS,
    CorruptCheckpoint,
    list_checkpoints,
    measure,
    step_of,
    verify,
)

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGUSR2: "SIGUSR2", signal.SIGHUP: "SIGHUP"}
_LONGEST_S = 240.0  # a command of ours, on a busy machine


def start_signal(run: LocalRun, rng: random.Random) -> str:
    """From the interpreter's own first moments to the first steps."""
    number = rng.choice(list(NAMES))
    run.stop()
    run.start()
    delay = rng.uniform(0.1, 10)
    time.sleep(delay)
    if run.ended() is not None:
        raise Wrong("silent", f"ended by itself: {run.unexplained() or run.said()[-500:]}")
    assert run.process is not None
    run.process.send_signal(number)
    what = f"{NAMES[number]} {delay:.1f} s after the start"
    ends(run, what)
    return what


def closed_terminal(run: LocalRun, rng: random.Random) -> str:
    assert run.process is not None
    run.process.send_signal(signal.SIGHUP)
    ends(run, "SIGHUP")
    return "SIGHUP; saved"


def full_with_bad_samples(run: LocalRun, rng: random.Random) -> str:
    """Long enough for samples that cannot be read to have no place in their journal."""
    first, _ = run.doing()
    with full_disk(run) as how:
        until(lambda: run.doing()[0] > first + 6 or run.ended() is not None, 60)
        last, doing = run.doing()
    if run.ended() not in (None, 0, 2):
        raise Wrong("other", f"{how}: status {run.ended()}")
    if run.ended() is not None and (found := run.unexplained()):
        raise Wrong("silent", f"{how}: {found}")
    return f"{how} for steps {first} to {last}" + (f", {doing}" if doing == "saving" else "")


def read_only_checkpoint(run: LocalRun, rng: random.Random) -> str:
    """A checkpoint that cannot be removed when its turn comes; its place is taken by none."""
    checkpoints = list_checkpoints(run.run.checkpoints)
    if not checkpoints:
        return "too early: no checkpoint yet"
    path, before = rng.choice(checkpoints), run.step()

    def told() -> bool:
        found = iter_jsonl(run.run.events, b'"not_removed"', newest_first=True)
        return any(path.name in str(e.get("error")) for e in found)

    with read_only(path) as how:
        if rng.random() < 0.3:
            run.stop()
            run.start()
            how += ", over a restart"
        until(lambda: told() or run.ended() is not None or run.step() >= before + 20)
        ended = run.ended()
        noticed = told()
    if ended not in (None, 0):
        raise Wrong("other", f"{how}: status {ended}: {run.said()[-500:]}")
    return how + ("; told, and gone on" if noticed else "; its turn did not come")


@contextmanager
def read_only(path: Path) -> Iterator[str]:
    """A folder that nobody, root neither, can remove; where nothing may be mounted, not by us."""
    bound = ["mount", "--bind", str(path), str(path)]
    if shutil.which("mount") and not subprocess.run(bound, capture_output=True).returncode:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(path)], check=True)
        try:
            yield f"{path.name} mounted read-only"
        finally:
            subprocess.run(["umount", "-l", str(path)], check=False)
        return
    with suppress(FileNotFoundError):  # it is being removed
        path.chmod(0o500)
    yield f"{path.name} with mode 0500"
    with suppress(FileNotFoundError):
        path.chmod(0o700)


def linked_checkpoint(run: LocalRun, rng: random.Random) -> str:
    """Put elsewhere, with a link in its place: what the link points to is not the run's."""
    stopped = rng.random() < 0.5
    if stopped:
        run.stop()
    checkpoints = list_checkpoints(run.run.checkpoints)
    if not checkpoints:
        return "too early: no checkpoint yet"
    path = checkpoints[0]
    elsewhere = run.run.path.parent / f"kept-{time.monotonic_ns()}"
    with suppress(FileNotFoundError):
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
    if not elsewhere.is_dir():
        return "too late: removed at that moment"
    if stopped:
        run.start()
    step = step_of(path)
    until(lambda: not path.is_symlink() or run.ended() is not None or run.step() >= STEPS)
    if run.ended() not in (None, 0):
        raise Wrong("other", f"status {run.ended()}: {run.said()[-500:]}")
    gone = not path.is_symlink()
    path = elsewhere.rename(elsewhere.with_name(f"step-{step:08d}"))
    try:
        verify(path)
    except CorruptCheckpoint as error:
        raise Wrong("deleted", f"what a link to a checkpoint pointed to: {error}") from None
    finally:
        shutil.rmtree(path)
    return f"step {step}, {'and a restart' if stopped else 'while it trains'}" + (
        "; its turn came, the link went" if gone else "; its turn did not come"
    )


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """One of our commands; a traceback of it is wrong."""
    try:
        done = subprocess.run(
            [*CLI, *arguments], capture_output=True, text=True, timeout=_LONGEST_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise Wrong("hang", f"bigbatch {' '.join(arguments)}") from None
    if "Traceback" in done.stderr:
        raise Wrong("silent", f"bigbatch {arguments[0]}: {done.stderr[-3000:]}")
    return done


def moment(run: LocalRun, rng: random.Random) -> str:
    """While it trains, while it starts, or while the ranks are started again."""
    at = rng.choice(("while it trains", "while it starts", "after a rank was killed"))
    if at == "while it starts":
        run.stop()
        run.start()
        until(lambda: bool(processes(run.run)) or run.ended() is not None)
        time.sleep(rng.uniform(0, 5))
    elif at == "after a rank was killed" and (rank := run.rank(rng.randrange(2))):
        rank.kill()
        time.sleep(rng.uniform(0, 3))
    return at


def remove_it(run: LocalRun, rng: random.Random) -> str:
    """A run that goes on is not removed."""
    at = moment(run, rng)
    done = command("rm", str(run.run.path), "--yes")
    if done.returncode != 2 or not run.run.recipe_file.exists():
        if run.ended() is not None and run.step() >= STEPS:
            raise Wrong("other", "too late: it had come to its end, and was removed")
        raise Wrong("deleted", f"rm {at}: status {done.returncode}: {done.stdout}{done.stderr}")
    return f"{at}; refused"


def cancel_it(run: LocalRun, rng: random.Random) -> str:
    at = moment(run, rng)
    done = command("cancel", str(run.run.path))
    if done.returncode == 2 and run.step() >= STEPS:
        return "too late: it had come to its end"
    if done.returncode != 0:
        raise Wrong("other", f"cancel {at}: status {done.returncode}: {done.stderr}")
    ends(run, f"cancel {at}")
    return f"{at}; ended"


def copied(run: LocalRun, rng: random.Random) -> str:
    """A copy of a run that goes on, torn as it is: what is done to one does not reach the other."""
    number = len(run.copies)
    folder = run.control / f"copy-{time.monotonic_ns()}"
    folder.mkdir()
    path = folder / "run"
    # Files come and go meanwhile, as for anybody who copies a run that trains.
    subprocess.run(["cp", "-r", str(run.run.path), str(path)], capture_output=True, check=False)
    at, starts = run.step(), len(run.starts())
    if not (path / "recipe.yaml").is_file():
        return "too early to be copied"
    what = rng.choice(("cancel", "rm", "go on", "go on and rm"))
    if what == "cancel":
        done = command("cancel", str(path))
        if done.returncode != 2 or "nothing to cancel" not in done.stderr:
            raise Wrong("other", f"cancel of a copy: status {done.returncode}: {done.stderr}")
    elif what == "rm":
        done = command("rm", str(path), "--yes")
        if done.returncode or path.exists():
            raise Wrong("other", f"rm of a copy: status {done.returncode}: {done.stderr}")
    else:
        other = LocalRun(RunDir(path), folder / "control")
        other.start()
        try:
            if what == "go on":
                go_on(run, other, number)
            else:
                rm_beside_a_start(other, rng)
        finally:
            other.stop()
    if run.ended() not in (None, 0) or len(run.starts()) > starts:
        raise Wrong("other", f"{what} of a copy reached the original: {run.said()[-500:]}")
    if not run.run.recipe_file.exists():
        raise Wrong("deleted", f"the original, by {what} of its copy")
    if what != "go on":
        shutil.rmtree(folder, ignore_errors=True)
    return f"after step {at}; {what}"


def go_on(run: LocalRun, other: LocalRun, number: int) -> None:
    """The copy, to its end: it must become what the original becomes."""
    if not until(lambda: other.ended() is not None):
        raise Wrong("hang", "a copy that was gone on with")
    if found := other.unexplained():
        raise Wrong("silent", f"a copy that was gone on with: {found}")
    if other.ended() != 0:
        raise Wrong("other", f"a copy: status {other.ended()}: {other.said()[-500:]}")
    run.copies.append(other)


def rm_beside_a_start(other: LocalRun, rng: random.Random) -> None:
    """Whoever comes first wins, and the other one says so: never half a run, nor both."""
    starts = len(other.starts())
    time.sleep(rng.uniform(0, 4))
    done = command("rm", str(other.run.path), "--yes")
    left = [p.name for p in other.run.path.parent.iterdir() if p.name != "control"]
    if done.returncode == 0:
        ends_without(other)
        left = [p.name for p in other.run.path.parent.iterdir() if p.name != "control"]
        if left:
            raise Wrong("other", f"rm beside a start left {left}: {other.said()[-500:]}")
    elif done.returncode != 2 or left != ["run"]:
        raise Wrong("other", f"rm beside a start: status {done.returncode}, left {left}")
    elif not until(lambda: len(other.starts()) > starts or other.ended() is not None):
        raise Wrong("hang", "a start beside an rm that was refused")


def ends_without(other: LocalRun) -> None:
    """Its directory was removed while it started: it says so, with status 2 or 75."""
    if not until(lambda: other.ended() is not None, 120):
        raise Wrong("hang", f"a start whose run was removed: {other.said()[-500:]}")
    if found := other.unexplained():
        raise Wrong("silent", f"a start whose run was removed: {found}")


def not_finite(run: LocalRun, rng: random.Random) -> str:
    """Running statistics that are not finite: told by name, and none reaches the weights."""
    if rng.random() < 0.5:
        return not_finite_in_a_step(run)
    return not_finite_in_a_checkpoint(run)


def not_finite_in_a_step(run: LocalRun) -> str:
    """What goes into a BatchNorm is too large for its variance to be a float32 number."""
    flag, before = run.control / "nan", run.step()
    flag.touch()
    until(lambda: run.ended() is not None or (not flag.exists() and run.step() >= before + 12))
    if run.ended() is None and not flag.exists():
        raise Wrong(
            "silent", f"a variance that is not finite, within steps {before} to {before + 12}"
        )
    flag.unlink(missing_ok=True)
    if run.ended() == 0:
        return "too late: it came to its end"
    if run.ended() != 2 or "not finite" not in run.said():
        raise Wrong("other", f"overflow: status {run.ended()}: {run.said()[-500:]}")
    return "a variance that overflows; refused before the update"


def not_finite_in_a_checkpoint(run: LocalRun) -> str:
    run.stop()
    checkpoints = list_checkpoints(run.run.checkpoints)
    if len(checkpoints) < 2:
        return "too early: no older checkpoint to go back to"
    path, starts = checkpoints[0], len(run.starts())
    poison(path)

    def goes_on() -> bool:  # until it starts, steps behind the checkpoint are recorded, too
        return len(run.starts()) > starts and run.step() > step_of(path) + 8

    run.start()
    ended = until(lambda: run.ended() is not None or goes_on(), 240)
    shutil.rmtree(path)  # or no start would come any further
    if not ended:
        raise Wrong("hang", "a checkpoint with NaN in its buffers")
    if run.ended() != 2 or "running_var" not in run.said():
        raise Wrong("silent", f"NaN in {path.name}: status {run.ended()}: {run.said()[-500:]}")
    return f"NaN in {path.name}, whose manifest has its hash; refused by name, then removed"


def poison(path: Path) -> None:
    """Put NaN into a running variance that training would go on with, and its hash into the
    manifest: whoever wrote it did so on purpose, or had a defect."""
    file = path / (STATISTICS if (path / STATISTICS).exists() else MODEL)
    tensors = load_file(file)
    with safe_open(file, "np") as opened:
        metadata = dict(opened.metadata() or {})
    metadata.pop("bigbatch-sha256", None)  # or the seal of weights would say it
    name = next(n for n in sorted(tensors) if n.endswith("running_var"))
    tensors[name][0] = float("nan")
    save_file(tensors, file, metadata)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][file.name] = measure(file)
    (path / MANIFEST).write_text(json.dumps(manifest))


FAULTS: dict[str, Fault] = {
    "signal at a start": start_signal,
    "closed terminal": closed_terminal,
    "disk full, bad samples": full_with_bad_samples,
    "read-only checkpoint": read_only_checkpoint,
    "linked checkpoint": linked_checkpoint,
    "rm": remove_it,
    "cancel": cancel_it,
    "copied run": copied,
    "NaN in buffers": not_finite,
}
# Signals at a start twice as often as the others: of three kinds, and there are many moments.
KINDS = [*FAULTS, "signal at a start", "rm", "cancel", "copied run"]
