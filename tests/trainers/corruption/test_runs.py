"""Silent data corruption in real runs of several ranks: named, before it gets anywhere."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.trainers import job, worker
from bigbatch.trainers.replay.__main__ import main as replay
from tests.helpers.faulty_rank import faulty
from tests.helpers.ranks import end_ranks, run_ranks

SCRIPT = Path(__file__).parents[2] / "helpers" / "faulty_rank.py"
STEPS = 6
SMALL = (
    "model={name: test_resnet, options: {drop_rate: 0.2}}",
    "data={workers: 0, threads: 1, image_size: 16}",
    "log={wandb: off, diagnosis: false}",
    "duration=100 steps",
    "micro_batch=8",
    "schedule={name: constant}",
    "optimizer={name: sgd, lr: 0.1, momentum: 0.9}",
    "augment.mixup=0.2",
    "checkpoint={every: 2 steps, keep: 9}",
    "evaluate={every: 100 steps, precise_bn: never}",
    "ensemble.soup=false",
)
DIGESTS = "recovery.corruption={digest_every: 1}"
SWAPPED = "recovery.corruption={digest_every: 1, recompute_every: 1}"
NO_CHECKS = "recovery.corruption={digest_every: null}"
EXACT = "reduction=exact"
STOP = ("--stop-at", str(STEPS))
NO_FAULT = ("none", "0", "0")


def make(digits: Path, path: Path, world: int, *overrides: str) -> RunDir:
    batch = f"global_batch={8 * world}"
    return create_run(
        path, load_recipe("digits", [f"data.path={digits}", *SMALL, batch, *overrides])
    )


def corrupted(
    digits: Path, path: Path, world: int, fault: str, rank: int, at: int, *overrides: str
) -> tuple[RunDir, dict[str, Any]]:
    """A run that ends by a fault, and its event."""
    run = make(digits, path, world, *overrides)
    assert end_ranks(world, SCRIPT, fault, str(rank), str(at), run.path, *STOP) == [2] * world
    (event,) = (e for e in read_jsonl(run.events) if e["kind"] == "corruption")
    return run, event


def saved(run: RunDir) -> list[int]:
    return sorted(int(path.name[5:]) for path in run.checkpoints.iterdir())


def weights(run: RunDir, step: int) -> dict[str, bytes]:
    tensors = load_file(run.checkpoints / f"step-{step:08d}" / "model.safetensors")
    return {name: value.tobytes() for name, value in tensors.items()}


def undisturbed(digits: Path, path: Path, world: int, *overrides: str) -> RunDir:
    run = make(digits, path, world, *overrides)
    run_ranks(world, SCRIPT, *NO_FAULT, run.path, *STOP)
    assert not [e for e in read_jsonl(run.events) if e["kind"] == "corruption"]
    return run


@pytest.mark.slow
def test_a_bit_of_a_weight_of_one_of_three_ranks_is_named_in_that_step(
    digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, event = corrupted(digits, tmp_path / "a", 3, "weight", 1, 3, DIGESTS)
    assert (event["step"], event["ranks"], event["known"]) == (3, [1], True)
    assert event["tensors"] == ["conv1.0.weight"]
    assert saved(run) == [2]
    assert [r["step"] for r in read_jsonl(run.metrics) if r["kind"] == "train"] == [1, 2, 3]
    said = capfd.readouterr().err
    assert said.count("silent data corruption: rank 1 (") == 1
    assert "Traceback" not in said
    # The same command again goes on from before, and comes to what it would have been.
    run_ranks(3, SCRIPT, *NO_FAULT, run.path, *STOP)
    clean = undisturbed(digits, tmp_path / "b", 3, DIGESTS)
    assert weights(run, STEPS) == weights(clean, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "step", "tensor"),
    [
        ("weight.two", 3, "conv1.0.weight"),
        ("weight.swap", 3, "conv1.0.weight"),
        ("momentum", 3, "momentum_buffer/conv1.0.weight"),
        ("buffer", 4, "conv1.1.running_mean"),  # after the update of the step before
    ],
)
def test_whatever_ranks_have_copies_of_is_compared(
    digits: Path, tmp_path: Path, fault: str, step: int, tensor: str
) -> None:
    run, event = corrupted(digits, tmp_path / "a", 3, fault, 2, 3, DIGESTS)
    assert (event["step"], event["ranks"], event["tensors"]) == (step, [2], [tensor])
    assert saved(run) == [2]  # not even that of step 4, whose update was made


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_of_two_ranks_that_differ_a_replay_says_which_is_right(
    digits: Path, tmp_path: Path, rank: int, capfd: pytest.CaptureFixture[str]
) -> None:
    run, event = corrupted(digits, tmp_path / "a", 2, "weight", rank, 3, DIGESTS, EXACT)
    assert (event["step"], event["ranks"], event["known"]) == (3, [0, 1], False)
    assert event["replay"] == "bigbatch replay a --step 3"
    assert f"bigbatch replay {run.path} --step 3" in capfd.readouterr().err
    assert replay(["step", str(run.path), "--step", "3"]) == 0
    right = f"rank {1 - rank} held this state, bit for bit, and rank {rank} did not"
    assert right in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["exact", "overlapped"])
def test_a_bit_of_a_gradient_is_seen_by_the_recomputation_alone(
    digits: Path, tmp_path: Path, reduction: str
) -> None:
    how = f"reduction={reduction}"
    clean = undisturbed(digits, tmp_path / "clean", 3, DIGESTS, how)
    silent = make(digits, tmp_path / "silent", 3, DIGESTS, how)
    run_ranks(3, SCRIPT, "gradient", "1", "3", silent.path, *STOP)
    assert not [e for e in read_jsonl(silent.events) if e["kind"] == "corruption"]
    assert weights(silent, 2) == weights(clean, 2)
    assert weights(silent, 4) != weights(clean, 4)
    run, event = corrupted(digits, tmp_path / "found", 3, "gradient", 1, 3, SWAPPED, how)
    assert (event["step"], event["ranks"], event["found"]) == (3, [1], "gradient")
    assert (event["micro_batches"], event["tensors"]) == ([1], ["conv1.0.weight"])
    assert saved(run) == [2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "fault", "known"),
    [
        (2, "gradient", True),  # it does not come again, and the other's does
        (2, "gradient.always", False),
        (3, "gradient.always", True),
        (2, "activation", True),
        (3, "activation.always", True),
    ],
)
def test_who_computes_wrongly_is_named(
    digits: Path, tmp_path: Path, world: int, fault: str, known: bool
) -> None:
    _, event = corrupted(digits, tmp_path / "a", world, fault, 1, 3, SWAPPED)
    assert (event["step"], event["found"], event["known"]) == (3, "gradient", known)
    assert event["ranks"] == ([1] if known else [0, 1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["reduction=exact", "reduction=overlapped", "regularise.sharpness={name: sam}"]
)
def test_checks_change_no_bit(digits: Path, tmp_path: Path, how: str) -> None:
    more = ("global_batch=48", how)  # three micro-batches a rank
    found = []
    for name, check in (("on", SWAPPED), ("off", NO_CHECKS)):
        run = undisturbed(digits, tmp_path / name, 2, *more, check)
        records = [r for r in read_jsonl(run.metrics) if r["kind"] == "train"]
        losses = [(r["step"], r["loss"], r["grad_norm"]) for r in records]
        ledger = [line for line in read_jsonl(run.ledger) if line["kind"] == "step"]
        found.append((weights(run, STEPS), losses, ledger))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.timeout(900)  # five starts one after another
def test_no_false_alarm_on_one_to_four_ranks_after_kills(digits: Path, tmp_path: Path) -> None:
    """benchmarks/corruption.py does this for 10,000 steps."""
    more = ("global_batch=32", EXACT)
    run = make(digits, tmp_path / "checked", 1, *more, SWAPPED)
    for world, stop in ((3, 3), (1, 5), (4, 7), (2, 8)):
        run_ranks(world, SCRIPT, *NO_FAULT, run.path, "--stop-at", str(stop))
        if stop < 8:  # as after SIGKILL: the last steps are made again, by others
            shutil.rmtree(run.checkpoints / f"step-{stop:08d}")
    starts = [e for e in read_jsonl(run.events) if e["kind"] == "start"]
    assert [(e["world_size"], e["step"]) for e in starts] == [(3, 0), (1, 2), (4, 4), (2, 6)]
    assert not [e for e in read_jsonl(run.events) if e["kind"] == "corruption"]
    plain = make(digits, tmp_path / "plain", 1, *more, NO_CHECKS)
    run_ranks(1, SCRIPT, *NO_FAULT, plain.path, "--stop-at", "8")
    assert weights(run, 8) == weights(plain, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "fault", "step", "named"),
    [
        ("zero1", "weight", 3, ("copies", "conv1.0.weight")),
        ("zero2", "gradient", 3, ("gradient", "conv1.0.weight")),
        ("fsdp2", "buffer", 4, ("copies", "conv1.1.running_mean")),
    ],
)
def test_sharded_ranks_compare_what_they_can(
    digits: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    backend: str,
    fault: str,
    step: int,
    named: tuple[str, str],
) -> None:
    how = (f"backend={backend}", "reduction=overlapped", SWAPPED)
    _, event = corrupted(digits, tmp_path / "a", 2, fault, 1, 3, *how)
    assert (event["step"], event["found"], event["tensors"]) == (step, named[0], [named[1]])
    off = "gradients of two ranks are not compared (recovery.corruption): on backend fsdp2"
    assert (off in capfd.readouterr().err) == (backend == "fsdp2")


def test_a_rank_alone_finds_what_it_does_not_compute_twice(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make(digits, tmp_path / "a", 1, SWAPPED)
    build = job.build_job

    def build_faulty(*arguments: Any) -> job.Job:
        built = build(*arguments)
        return replace(built, objective=faulty(built, "gradient", 3))

    monkeypatch.setattr(job, "build_job", build_faulty)
    assert worker.main([str(run.path), *STOP]) == 2
    assert "step 3: silent data corruption: rank 0 (" in capsys.readouterr().err
    assert saved(run) == [2]
    monkeypatch.setattr(job, "build_job", build)
    assert worker.main([str(run.path), *STOP]) == 0
    assert saved(run) == [2, 4, 6]
