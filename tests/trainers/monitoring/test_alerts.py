"""Alerts: what is said of losses and speeds, and how often."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigbatch.configs.files import iter_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import create_run
from bigbatch.trainers.monitoring.alerts import Alerts, replay_command
from bigbatch.trainers.monitoring.log import open_log


def kinds(losses: list[float], speeds: list[float]) -> list[tuple[int, str]]:
    alerts = Alerts()
    return [
        (step, kind)
        for step, (loss, speed) in enumerate(zip(losses, speeds, strict=True))
        for kind, _ in alerts.update(loss, speed)
    ]


def noisy(count: int, level: float, spread: float, seed: int = 0) -> list[float]:
    return list(level + spread * np.random.default_rng(seed).standard_normal(count))


def test_a_run_with_nothing_wrong_is_quiet() -> None:
    falling = [2 * 0.999**i + 0.05 * x for i, x in enumerate(noisy(3000, 0, 1))]
    assert kinds(falling, noisy(3000, 1000, 100)) == []


def test_a_spike_is_said_once() -> None:
    losses = noisy(400, 1.0, 0.02)
    losses[200:210] = [5.0] * 10
    assert kinds(losses, [1000.0] * 400) == [(200, "spike")]


def test_losses_of_larger_batches_are_forgotten(tmp_path: Path) -> None:
    pieces = "[{batch: 64, until: 6400 samples}, {batch: 16}]"
    changes = [f"global_batch={{name: stages, pieces: {pieces}}}", "micro_batch=16"]
    recipe = load_recipe("digits", [*changes, "log.wandb=off"])
    run = create_run(tmp_path / "run", recipe)
    losses = [*noisy(100, 1.0, 0.01), *noisy(150, 1.0, 0.3), 9.0]
    with open_log(run, recipe, rank=0, total_steps=300, start_step=0, epoch_samples=1000) as log:
        for step, loss in enumerate(losses, 1):
            log.train(step, loss=loss, images_per_s=1000.0)
    spikes = [e["loss"] for e in iter_jsonl(run.events) if e["kind"] == "spike"]
    assert spikes == [9.0]


def test_nan_is_no_spike_and_hides_none() -> None:
    losses = noisy(400, 1.0, 0.02)
    losses[200], losses[300] = float("nan"), 9.0
    assert kinds(losses, [1000.0] * 400) == [(300, "spike")]


def test_low_throughput_is_said_once_until_it_recovers() -> None:
    speeds = [1000.0] * 300 + [500.0] * 60 + [1000.0] * 100 + [400.0] * 60
    found = kinds([1.0] * len(speeds), speeds)
    assert [kind for _, kind in found] == ["slow", "slow"]
    assert 300 < found[0][0] < 330
    assert 460 < found[1][0] < 480


def test_larger_images_may_take_longer() -> None:
    alerts, found = Alerts(), []
    for step in range(500):
        if step == 300:
            alerts.forget_speed()
        found += alerts.update(1.0, 1000.0 if step < 300 else 500.0)
    assert found == []


def test_one_slow_step_is_no_alert() -> None:
    speeds = [1000.0] * 300
    speeds[200] = 200.0
    assert kinds([1.0] * 300, speeds) == []


@pytest.mark.parametrize(
    ("event", "command"),
    [
        ({"kind": "spike", "step": 12}, "bigbatch replay mine --step 12"),
        ({"kind": "non_finite", "step": 12}, "bigbatch replay mine --step 13"),  # counted before it
        (
            {"kind": "rollback", "step": 12, "first": 10, "last": 12},
            "bigbatch replay mine --step 13 --before-rollback",
        ),
        ({"kind": "slow", "step": 12}, None),
        ({"kind": "non_finite"}, None),  # of an old version
    ],
)
def test_events_of_steps_name_the_command_that_explains_them(
    event: dict[str, Any], command: str | None
) -> None:
    assert replay_command("mine", event) == command
