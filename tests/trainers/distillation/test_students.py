"""Students in real runs: the same weights bit for bit, however their teacher's outputs come."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.data.index import open_index
from bigbatch.launcher.start import agent_command
from bigbatch.trainers import worker
from bigbatch.trainers.distillation.teacher import Teacher
from tests.helpers import warm
from tests.helpers.runs import SMALL, untrained_run

STEPS, MICRO_BATCHES = 2, 2
KEYS = (
    *SMALL,
    "log.wandb=off",
    *("global_batch=16", "micro_batch=8", "duration=8 steps"),
    *("schedule={name: constant}", "checkpoint.every=2 steps", "checkpoint.keep=9"),
    *("evaluate.every=100 steps", "data.image_size=16", "augment.mixup=1"),
)


@pytest.fixture
def teacher(tmp_path: Path, digits: Path) -> Path:
    classes = open_index(digits / "val").classes
    return untrained_run(tmp_path / "teacher", digits, classes).path


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The (step, micro-batch) of each pass through the teacher's members."""
    places: list[tuple[int, int]] = []
    compute = Teacher._compute

    def counted(self: Teacher, batch: Any) -> Any:
        places.append((batch.step, batch.index))
        return compute(self, batch)

    monkeypatch.setattr(Teacher, "_compute", counted)
    return places


Start = Callable[..., RunDir]


@pytest.fixture
def new(tmp_path: Path, digits: Path) -> Start:
    def create(name: str, *changes: str) -> RunDir:
        recipe = load_recipe("digits", [f"data.path={digits}", *KEYS, *changes])
        return create_run(tmp_path / "runs" / name, recipe)

    return create


def go(run: RunDir, stop_at: int = STEPS) -> int:
    return worker.main([str(run.path), "--stop-at", str(stop_at)])


def weights(run: RunDir, step: int) -> dict[str, Tensor]:
    return load_file(run.checkpoints / f"step-{step:08d}" / "model.safetensors")


def same(left: RunDir, right: RunDir, step: int = STEPS) -> bool:
    ours, theirs = weights(left, step), weights(right, step)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


ALL = [(step, index) for step in range(STEPS) for index in range(MICRO_BATCHES)]


def test_kept_outputs_teach_many_students_in_one_pass(
    teacher: Path, new: Start, computed: list[tuple[int, int]]
) -> None:
    """And each student is, bit for bit, what it is without them."""
    taught = f"distill.teacher={teacher}"
    first, again = new("first", taught), new("again", taught, "distill.temperature=2")
    assert go(first) == 0
    assert computed == ALL
    assert go(again) == 0
    assert computed == ALL
    alone = new("alone", taught, "distill.temperature=2", "distill.cache_gb=0")
    assert go(alone) == 0
    assert computed == 2 * ALL
    assert same(again, alone)
    assert not same(again, first)


@pytest.mark.slow
def test_without_weight_a_teacher_changes_no_bit(teacher: Path, new: Start) -> None:
    """Though its members are built between a step's batches and the student's dropout."""
    plain, idle = new("plain"), new("idle", f"distill.teacher={teacher}", "distill.weight=0")
    assert go(plain) == go(idle) == 0
    assert same(plain, idle)


@pytest.mark.slow
def test_a_resumed_student_is_that_of_one_go_and_knows_its_teacher(
    teacher: Path, new: Start, computed: list[tuple[int, int]], tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    taught = (f"distill.teacher={teacher}", "distill.name=logits")
    whole = new("whole", *taught, "distill.cache_gb=0")
    parts = new("parts", *taught, f"distill.cache={tmp_path / 'kept'}")
    assert go(whole) == go(parts, 1) == go(parts) == 0
    assert same(whole, parts)
    assert computed == 2 * ALL
    (said, _) = [e for e in read_jsonl(parts.events) if e["kind"] == "teacher"]
    assert said["members"] == ["teacher/cycle-01", "teacher/cycle-02"]
    for file in teacher.glob("snapshots/cycle-02/model.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    capfd.readouterr()
    assert go(parts, STEPS + 1) == 2
    error = capfd.readouterr().err
    assert f"learned from another teacher: its teacher_hash is {said['teacher_hash']}" in error


@pytest.mark.slow
def test_ranks_and_kills_change_no_bit(teacher: Path, new: Start) -> None:
    """Two ranks, killed in their midst and started again, beside one rank in one go."""
    taught = f"distill={{teacher: {teacher}, hint: {{layer: layer3, teacher_layer: layer2}}}}"
    one, two = new("one", taught, "distill.cache_gb=0"), new("two", taught)
    assert warm.run(agent_command(one.path, 1, stop_at=6)).returncode == 0
    command = agent_command(two.path, 2, stop_at=6)
    running = warm.popen(command, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (two.checkpoints / "step-00000002").exists() and running.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert warm.run(command).returncode == 0
    assert same(one, two, 6)
    # Whoever computed them: a student of one rank needs no teacher's pass any more.
    again = new("again", taught)
    script = teacher.parent / "no_pass.py"
    script.write_text(
        "import sys; from bigbatch.trainers import worker; from bigbatch.trainers.distillation."
        "teacher import Teacher; del Teacher._compute; sys.exit(worker.main(sys.argv[1:]))"
    )
    assert warm.run(warm.script(script, again.path, "--stop-at", 6)).returncode == 0
    assert same(one, again, 6)
