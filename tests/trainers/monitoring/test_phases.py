"""Phases of a step by rank, and the straggler among them."""

import subprocess
from pathlib import Path

import pytest
import torch

from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher.start import agent_command
from bigbatch.trainers.monitoring import phases
from bigbatch.trainers.monitoring.phases import PHASES, Clock, Timings
from tests.helpers import warm
from tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")


class Time:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock_time(monkeypatch: pytest.MonkeyPatch) -> Time:
    fake = Time()
    monkeypatch.setattr(phases, "time", fake)
    return fake


def run_step(clock: Clock, at: Time, micro_batches: int, slow: dict[str, float]) -> None:
    clock.begin_step()
    for number in range(micro_batches):
        for name in ("data", "copy", "augment", "model"):
            with clock(name):
                at.now += 0.01 + slow.get(name, 0.0)
                if name == "model" and number == micro_batches - 1:
                    clock.sent()
                    at.now += 0.02
        clock.micro_batch((7, 0.004))
    with clock("optimizer"):
        at.now += 0.01 + slow.get("optimizer", 0.0)
    clock.begin_step()


def measured(at: Time, ranks: list[tuple[int, dict[str, float]]], steps: int = 3) -> Timings:
    world = len(ranks)
    timings = Timings(world)
    clocks = [Clock(CPU, rank, world) for rank in range(world)]
    for _ in range(steps):
        for clock, (micro_batches, slow) in zip(clocks, ranks, strict=True):
            run_step(clock, at, micro_batches, slow)
        timings.add(sum(clock.table() for clock in clocks).tolist())
    return timings


def test_phases_add_up_to_the_step(clock_time: Time) -> None:
    timings = measured(clock_time, [(2, {})])
    assert timings.mean() == pytest.approx(
        {"data": 0.02, "copy": 0.02, "augment": 0.02, "model": 0.02, "reduce": 0.02,
         "optimizer": 0.01}
    )  # fmt: skip
    assert timings.slowest() is None


@pytest.mark.parametrize("phase", [name for name in PHASES if name != "reduce"])
@pytest.mark.parametrize("world", [2, 3, 8])
def test_the_slow_rank_and_its_phase_are_named(clock_time: Time, phase: str, world: int) -> None:
    ranks = [(2, {phase: 0.05 if rank == world - 1 else 0.0}) for rank in range(world)]
    found = measured(clock_time, ranks).slowest()
    assert found is not None
    extra = 0.05 if phase == "optimizer" else 0.1
    assert (found.rank, found.phase) == (world - 1, phase)
    assert found.share == pytest.approx(extra / (0.11 + extra))
    assert found.shard == (7 if phase == "data" else None)


def test_one_micro_batch_more_is_no_straggler(clock_time: Time) -> None:
    assert measured(clock_time, [(3, {}), (2, {}), (2, {})]).slowest() is None


@pytest.mark.parametrize("idle", [1, 3])
def test_a_rank_without_a_micro_batch_makes_no_other_one_slow(clock_time: Time, idle: int) -> None:
    """Where the batch changes, a small step has none for some ranks."""
    small = [(1, {}), *[(0, {})] * idle]
    assert measured(clock_time, small).slowest() is None
    timings = measured(clock_time, small, steps=2)
    clocks = [Clock(CPU, rank, idle + 1) for rank in range(idle + 1)]
    for clock in clocks:  # a large step among small ones: a rank has less than one in each
        run_step(clock, clock_time, 1, {})
    timings.add(sum(clock.table() for clock in clocks).tolist())
    assert timings.slowest() is None
    one_is_slow = [(1, {}), (1, {"model": 0.05}), *[(0, {})] * idle]
    found = measured(clock_time, one_is_slow).slowest()
    assert found is not None
    assert (found.rank, found.phase) == (1, "model")


def test_small_differences_are_not_reported(clock_time: Time) -> None:
    assert measured(clock_time, [(2, {}), (2, {"model": 0.001})]).slowest() is None


def test_nothing_is_known_before_the_first_step() -> None:
    timings = Timings(2)
    timings.add(sum(Clock(CPU, rank, 2).table() for rank in range(2)).tolist())
    assert timings.seconds is None
    assert timings.mean() == {}
    assert timings.slowest() is None


def train_with_slow_rank(digits: Path, tmp_path: Path, phase: str) -> RunDir:
    """Two real ranks over gloo, of which rank 1 sleeps 100 ms in a phase of each micro-batch."""
    changes = [f"data.path={digits}", "log.wandb=off", "duration=8 steps"]
    changes += ["global_batch=64", "micro_batch=16"]
    changes += ["schedule.cycles=1", "schedule.warmup=2 steps"]
    changes += ["log.details_every=4", "evaluate.every=1000 steps", "checkpoint.every=1000 steps"]
    run = create_run(tmp_path / "run", load_recipe("digits", changes))
    script = Path(__file__).parents[2] / "helpers/slow_rank.py"
    run_ranks(2, script, phase, "1", "0.1", run.path)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["data", "model"])
def test_a_slow_rank_of_a_real_run_is_named(digits: Path, tmp_path: Path, phase: str) -> None:
    run = train_with_slow_rank(digits, tmp_path, phase)
    records = read_jsonl(run.metrics)
    last = [r for r in records if r["kind"] == "train"][-1]
    assert (last["slowest"]["rank"], last["slowest"]["phase"]) == (1, phase)
    assert last["slowest"].get("shard") == ("000000.tar" if phase == "data" else None)
    assert list(last["phases"]) == list(PHASES)
    by_rank = [r for r in records if r["kind"] == "ranks"][-1]
    fast, slow = (dict(zip(by_rank["phases"], row, strict=True)) for row in by_rank["seconds"])
    assert slow[phase] > fast[phase]
    # Who is fast waits for the other in the exchange of gradients.
    assert fast["reduce"] > slow["reduce"]
    assert [r["step"] for r in records if r["kind"] == "trust"] == [4, 8]
    assert all(ratio > 0 for r in records if r["kind"] == "trust" for ratio in r["ratios"].values())
    assert {r["kind"] for r in records} >= {"train", "ranks", "trust", "system"}


@pytest.mark.slow
@pytest.mark.timeout(900)  # four starts one after another
def test_every_backend_records_the_same_trust_ratios(digits: Path, tmp_path: Path) -> None:
    found = {}
    for backend in ("ddp", "zero1", "zero2", "fsdp2"):
        changes = [f"data.path={digits}", "log.wandb=off", f"backend={backend}"]
        changes += ["reduction=overlapped", "log.details_every=2"]
        changes += ["global_batch=64", "micro_batch=16"]
        run = create_run(tmp_path / backend, load_recipe("digits", changes))
        command = agent_command(run.path, 2, stop_at=4)
        warm.run(command, check=True, stdout=subprocess.DEVNULL, timeout=200)
        records = [r for r in read_jsonl(run.metrics) if r["kind"] == "trust"]
        found[backend] = {(r["step"], k): v for r in records for k, v in r["ratios"].items()}
    assert {step for step, _ in found["ddp"]} == {2, 4}
    for ratios in found.values():
        assert ratios == pytest.approx(found["ddp"], rel=1e-4)
