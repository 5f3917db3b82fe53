"""The faults of benchmarks/chaos.py, and the runs that meet them."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bigbatch.configs.files import iter_jsonl, read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.data.index import open_index
from bigbatch.data.writing.shard import shard
from bigbatch.launcher.child import kill_tree
from bigbatch.trainers.recovery.heartbeat import read_heartbeat
from bigbatch.trainers.recovery.signals import SAVED
from bigbatch.trainers.recovery.stored import CorruptCheckpoint, list_checkpoints, step_of, verify

STEPS = 60
RANKS = 2
BAD = 12  # images that cannot be read, of 1,437: one or two in each step
RECIPE = ["evaluate.every=20 steps", "checkpoint.every=4 steps"]
LOCAL_RECIPE = [
    *(*RECIPE, f"duration={STEPS} steps", "recovery.stall_s=10", "log.wandb=off"),
    *("data.bad_samples=1000", "recovery.corruption.digest_every=1"),
]
CLI = (sys.executable, "-m", "bigbatch.launcher.cli")
# The rest of a record are times, and averages over the steps since the last start. Of kind "ranks"
# is nothing else, and no record where a start begins with the step at which one is due.
RECORDED = ("kind", "step", "split", "epoch", "loss", "lr", "grad_norm", "accuracy", "nll", "ece")
# Moments of checkpointing: what is about to happen, part and end of its path, delay in s.
PHASES = {
    "its folder": "os.mkdir .tmp- ",
    "the weights' file": "open .tmp- model.safetensors",
    "within the weights": "open .tmp- model.safetensors 0.0005",
    "the optimizer's file": "open .tmp- optimizer.safetensors",
    "within the optimizer": "open .tmp- optimizer.safetensors 0.0005",
    "its state": "open .tmp- state.json",
    "its manifest": "open .tmp- manifest.json",
    "its final name": "os.rename .tmp- ",
    "the folder's sync": "open /checkpoints checkpoints",
    "removal of an old one": "shutil.rmtree /step- ",
    "within that removal": "shutil.rmtree /step- 0.0003",
}


class Wrong(Exception):
    """What a fault met that it must not; `kind` is hang, silent, deleted or other."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Run:
    """A run directory, and what works in it, started again as often as it takes."""

    def __init__(self, run: RunDir) -> None:
        self.run = run

    def start(self) -> None:
        """Start, or go on from the newest checkpoint."""
        raise NotImplementedError

    def ended(self) -> int | None:
        """The exit status; None while it trains or waits in a queue."""
        raise NotImplementedError

    def stop(self) -> None:
        """End it, whatever it does; nothing is saved."""
        raise NotImplementedError

    def output(self) -> str:
        raise NotImplementedError

    def finished(self) -> list["Run"]:
        """Copies of it that came to their end: they must be what it becomes."""
        return []

    def unexplained(self) -> str | None:
        """How it ended where it did so without a word, or with a traceback."""
        return None

    def step(self) -> int:
        """The newest recorded step."""
        newest = iter_jsonl(self.run.metrics, newest_first=True)
        return next((r["step"] for r in newest if "step" in r), 0)

    def durable(self) -> int:
        """The newest step that a whole checkpoint holds, with all its records."""
        recorded = self.step()
        for path in list_checkpoints(self.run.checkpoints):
            with suppress(CorruptCheckpoint):
                verify(path)
                if step_of(path) <= recorded:
                    return step_of(path)
        return 0

    def starts(self) -> list[int]:
        """The step that each start went on from."""
        return [e["step"] for e in read_jsonl(self.run.events) if e.get("kind") == "start"]

    def state(self) -> dict[str, Any]:
        """All that must not depend on faults: final files by hash, and what records say."""
        (newest,) = self.run.checkpoints.glob(f"step-{STEPS:08d}")
        manifest = json.loads((newest / "manifest.json").read_text())["files"]
        records = read_jsonl(self.run.metrics)
        return {
            "model": manifest["model.safetensors"]["sha256"],
            "optimizer": manifest["optimizer.safetensors"]["sha256"],
            "records": [{k: r.get(k) for k in RECORDED} for r in records if r["kind"] != "ranks"],
        }


class LocalRun(Run):
    """A run with two ranks, started as a person goes on with it."""

    def __init__(self, run: RunDir, control: Path) -> None:
        super().__init__(run)
        self.control = control
        self.control.mkdir()
        shutil.copy(Path(__file__).with_name("chaos_site.py"), self.control / "sitecustomize.py")
        self.process: subprocess.Popen[bytes] | None = None
        self.copies: list[Run] = []
        self._before = 0  # bytes that former starts said

    def start(self) -> None:
        self._before = len(self.output())
        with (self.control / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                self.command(), env=self.environment(), stdout=output, stderr=output
            )

    def command(self) -> list[str]:
        return [*CLI, "resume", str(self.run.path), "--nproc", str(RANKS)]

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, (str(self.control), os.environ.get("PYTHONPATH"))))
        own = {"BIGBATCH_CHAOS": str(self.control), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        return {**os.environ, **own}

    def ended(self) -> int | None:
        assert self.process is not None
        return self.process.poll()

    def stop(self) -> None:
        """As a power cut: nobody is left who could tidy up."""
        assert self.process is not None
        kill_tree(self.process.pid)
        self.process.wait()

    def output(self) -> str:
        path = self.control / "output.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def said(self) -> str:
        """Since its last start."""
        return self.output()[self._before :]

    def finished(self) -> list[Run]:
        return self.copies

    def unexplained(self) -> str | None:
        status, said = self.ended(), self.said()
        if "Traceback" in said:
            return f"a traceback, status {status}: {said[said.index('Traceback') :][-3000:]}"
        if status in (None, 0, -signal.SIGKILL) or "bigbatch: " in said:
            return None if status in (None, 0, 2, SAVED, -signal.SIGKILL) else f"status {status}"
        return f"status {status} without a word"

    def doing(self) -> tuple[int, str]:
        """Steps and phase by rank 0's heartbeat, which a full disk does not hold up."""
        record = read_heartbeat(self.run.heartbeats, 0)
        return int(record.get("step", 0)), str(record.get("doing", ""))

    def rank(self, number: int) -> psutil.Process | None:
        """A rank's process; None between two starts."""
        assert self.process is not None
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children():
                with suppress(psutil.Error):
                    if child.environ().get("RANK") == str(number):
                        return child
        return None


# A fault happens to a run and says what it did; it may end processes, and starts none.
Fault = Callable[[Any, random.Random], str]
# Makes a run of this name, and ends it for good behind it.
NewRun = Callable[[str], AbstractContextManager[Run]]


def kill_rank(number: int) -> Fault:
    def fault(run: LocalRun, rng: random.Random) -> str:
        rank = run.rank(number)
        if rank is None:
            return "between two starts"
        rank.kill()
        return "while it trains"

    return fault


def kill_agent(run: LocalRun, rng: random.Random) -> str:
    assert run.process is not None
    run.process.kill()
    run.process.wait()
    return "SIGKILL; its ranks go with it"


def kill_in_checkpoint(run: LocalRun, rng: random.Random) -> str:
    phase = rng.choice(list(PHASES))
    kill, before = run.control / "kill", run.step()
    words = PHASES[phase].split(" ")
    kill.with_suffix(".new").write_text(" ".join([*words, "0"][:4]))
    kill.with_suffix(".new").rename(kill)
    until(lambda: not kill.exists() or run.ended() is not None or run.step() > before + 12)
    kill.unlink(missing_ok=True)
    return f"rank 0, before {phase}" if "within" not in phase else f"rank 0, {phase}"


def disk_full(run: LocalRun, rng: random.Random) -> str:
    """Fill the file system to its last byte for a while; or, where it is not a small one of
    ours, limit the size of rank 0's files."""
    with full_disk(run) as how:
        time.sleep(rng.uniform(1, 4))
    return how


@contextmanager
def full_disk(run: LocalRun) -> Iterator[str]:
    if os.path.ismount(run.run.path.parent):
        filler = run.run.path.parent / "filler"
        with filler.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with suppress(OSError):
                    while file.write(b"\0" * size) == size:
                        pass
        try:
            yield "tmpfs filled to the last byte"
        finally:
            filler.unlink()
        return
    rank = run.rank(0)
    with suppress(psutil.Error):
        if rank is not None:
            rank.rlimit(psutil.RLIMIT_FSIZE, (64, -1))
    yield "RLIMIT_FSIZE of 64 bytes"
    with suppress(psutil.Error):
        if rank is not None:
            rank.rlimit(psutil.RLIMIT_FSIZE, (-1, -1))


def flipped_bit(run: LocalRun, rng: random.Random) -> str:
    run.stop()
    checkpoints = list_checkpoints(run.run.checkpoints)
    if len(checkpoints) < 2:
        return "too early: no older checkpoint to go back to"
    path = rng.choice(sorted(checkpoints[0].iterdir()))
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"in the newest {path.name}"


def flipped_weight(run: LocalRun, rng: random.Random) -> str:
    """In a rank's memory, at any moment of a step; whoever is to find it compares the ranks."""
    rank, file = rng.randrange(RANKS), run.control / "flip"
    file.with_suffix(".new").write_text(f"{rank} {rng.random()}")
    file.with_suffix(".new").rename(file)
    if not until(lambda: not file.exists() or run.ended() is not None, 60) or file.exists():
        file.unlink(missing_ok=True)
        return "the run had ended"
    until(lambda: run.ended() is not None, 60)
    found = [e for e in read_jsonl(run.run.events) if e.get("kind") == "corruption"]
    named = f"named in step {found[-1]['step']}" if found else "not named"
    return f"in memory of rank {rank}; {named}, status {run.ended()}"


def truncated_metrics(run: LocalRun, rng: random.Random) -> str:
    run.stop()
    checkpoints = list_checkpoints(run.run.checkpoints)
    oldest = step_of(checkpoints[-1]) if checkpoints else 0
    text = run.run.metrics.read_bytes()
    # Records that no checkpoint comes before could never be written again; they stay.
    whole = [x for x in text.splitlines(True) if x.endswith(b"\n")]
    first = sum(len(x) for x in whole if json.loads(x)["step"] <= oldest)
    cut = rng.randint(first, len(text))
    os.truncate(run.run.metrics, cut)
    return f"{len(text) - cut} bytes cut off"


def hung_rank(run: LocalRun, rng: random.Random) -> str:
    number = rng.randrange(RANKS)
    rank = run.rank(number)
    if rank is None:
        return "between two starts"
    rank.suspend()
    return f"SIGSTOP of rank {number}"


def ends(run: LocalRun, why: str, limit_s: float = 120.0) -> None:
    """Wait for the end that a signal asked for: saved, or nothing to save, and said."""
    if not until(lambda: run.ended() is not None, limit_s):
        run.stop()
        raise Wrong("hang", f"{why}: goes on for {limit_s:.0f} s")
    if found := run.unexplained():
        raise Wrong("silent", f"{why}: {found}")
    if run.ended() not in (SAVED, 0) or (run.ended() == 0 and run.step() < STEPS):
        raise Wrong("other", f"{why}: status {run.ended()}, not 75")


def time_limit(run: LocalRun, rng: random.Random) -> str:
    assert run.process is not None
    run.process.send_signal(signal.SIGUSR2)
    ends(run, "SIGUSR2")
    return "SIGUSR2; saved"


def double(run: LocalRun, rng: random.Random) -> str:
    """A second start. The first is slowed down, or its few steps would end before."""
    with subprocess.Popen(
        run.command(), env=run.environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    ) as second:  # fmt: skip
        while second.poll() is None:
            rank = run.rank(1)
            if rank is None:
                break
            with suppress(psutil.NoSuchProcess):
                rank.suspend()
                time.sleep(1.0)
                rank.resume()
            time.sleep(0.02)
        said = second.communicate(timeout=240)[1]
    refused = second.returncode == 2 and "is in use by process" in said
    if not refused and run.ended() is None:
        raise Wrong("other", f"a second start ended with {second.returncode}: {said}")
    return "refused" if refused else "the first had ended"


def clock_jump(run: LocalRun, rng: random.Random) -> str:
    days = rng.choice([-3650, -1, -0.04, 0.04, 1, 3650])
    (run.control / "clock").write_text(str(days * 86400))
    return f"by {days} days"


FAULTS: dict[str, Fault] = {
    "kill rank 1": kill_rank(1),
    "kill rank 0": kill_rank(0),
    "kill agent": kill_agent,
    "kill in a checkpoint": kill_in_checkpoint,
    "disk full": disk_full,
    "flipped bit": flipped_bit,
    "flipped bit of a weight": flipped_weight,
    "truncated metrics.jsonl": truncated_metrics,
    "hung rank": hung_rank,
    "time limit": time_limit,
    "double": double,
    "clock jump": clock_jump,
}
# All kinds equally often, deaths in a checkpoint three times that.
KINDS = [*FAULTS, "kill in a checkpoint", "kill in a checkpoint"]


@contextmanager
def local_runs(folder: Path) -> Iterator[NewRun]:
    """Runs on this machine, each on a small disk of its own."""
    shard("digits", folder / "digits", progress=False)
    spoil(folder / "digits/train")
    recipe = load_recipe("digits", [f"data.path={folder / 'digits'}", *LOCAL_RECIPE])

    @contextmanager
    def new_run(name: str) -> Iterator[Run]:
        with small_disk(folder / name):
            made = create_run(folder / name / "run", recipe)
            run = LocalRun(made, folder / f"{name}-control")  # no terminal is a full disk
            try:
                yield run
            finally:
                run.stop()

    yield new_run


def spoil(split: Path) -> None:
    """Change a byte of some training images, which their index then finds damaged."""
    index = open_index(split)
    for sample in np.linspace(0, len(index), BAD + 2).astype(int)[1:-1]:
        path = split / index.shards[index.shard[sample]].name
        with path.open("r+b") as file:
            file.seek(int(index.offset[sample]) + int(index.size[sample]) // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 0xFF]))


def until(done: Callable[[], bool], limit_s: float = 600.0) -> bool:
    """Wait for something; False where it did not come."""
    deadline = time.monotonic() + limit_s
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@contextmanager
def small_disk(folder: Path, megabytes: int = 64) -> Iterator[None]:
    """A tmpfs of its own at `folder`, where this may be mounted; otherwise the folder as it is."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and not subprocess.run(
        mount, capture_output=True, check=False
    ).returncode  # fmt: skip
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False, stderr=sys.stderr)
