"""Costs that follow what validation confuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.losses import Loss
from bigbatch.configs.rundir import create_run
from bigbatch.launcher.start import agent_command
from bigbatch.trainers import worker
from bigbatch.trainers.losses.build import Course, build_loss
from bigbatch.trainers.losses.confusion import ConfusionCosts, read_confusion
from bigbatch.trainers.losses.priors import ClassCounts
from tests.helpers import warm

CONFIG: Any = TypeAdapter(Loss).validate_python({"name": "confusion_cost", "share": 0.6})
COUNTS = [[8, 2, 0, 0], [1, 1, 2, 0], [0, 0, 5, 5], [0, 0, 0, 0]]  # of the last class, none


def test_costs_are_the_confused_shares() -> None:
    """Pair by pair; their mean stays 1, so that the loss keeps its size."""
    costs = ConfusionCosts(4, 0.6)
    assert costs.costs.tolist() == (1 - np.eye(4)).tolist()
    costs.update(COUNTS)
    rates = {(0, 1): 0.2, (1, 0): 0.25, (1, 2): 0.5, (2, 3): 0.5}
    mean = sum(rates.values()) / 12
    expected = [
        [0.0 if y == k else 0.4 + 0.6 * rates.get((y, k), 0) / mean for k in range(4)]
        for y in range(4)
    ]
    torch.testing.assert_close(costs.costs.tolist(), expected)
    assert costs.costs.sum().item() == pytest.approx(12)
    costs.update([[3, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    assert costs.costs.tolist() == (1 - np.eye(4)).tolist()


def test_the_loss_takes_each_evaluation_and_goes_back() -> None:
    course = Course()
    loss = build_loss(CONFIG, None, ClassCounts("abcd", [1, 1, 1, 1]), course)
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.requires_grad_()
    targets = torch.eye(4, dtype=torch.float64)[[0, 1, 2, 3, 1, 2]]
    first = loss(logits, targets)
    assert course.costs is not None
    course.costs.update(COUNTS)
    p = logits.softmax(1)
    rows = course.costs.costs[targets.argmax(1)]
    torch.testing.assert_close(loss(logits, targets), (rows * p).sum(1).mean())
    assert torch.autograd.gradcheck(lambda z: loss(z, targets), logits)
    assert loss(logits.float(), targets.float()).dtype == torch.float32
    course.costs.update(None)
    assert loss(logits, targets).item() == first.item()


def test_a_start_reads_the_last_evaluation_up_to_its_step(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_confusion(file, 9) is None
    records: list[dict[str, Any]] = [
        {"kind": "confusion", "step": step, "matrix": [[step, 0], [0, 1]]} for step in (2, 4, 6)
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in [{"kind": "train", "step": 1}, *records]))
    assert read_confusion(file, 1) is None
    assert read_confusion(file, 5) == [[4, 0], [0, 1]]


@pytest.mark.slow
def test_a_resumed_run_and_two_ranks_have_the_same_costs(digits: Path, tmp_path: Path) -> None:
    changes = ["model={name: lenet5}", "data.image_size=16", "data.workers=0", "duration=6 steps"]
    changes += [
        "evaluate.every=2 steps",
        "checkpoint.every=1 steps",
        "global_batch=64",
        "clip=null",
    ]
    changes += [
        "micro_batch=32",
        "schedule={name: constant}",
        f"data.path={digits}",
        "log.wandb=off",
    ]
    changes += ["loss={name: confusion_cost, share: 1}", "optimizer={name: sgd, lr: 0.2}"]
    recipe = load_recipe("digits", changes, say=None)
    one, two = (create_run(tmp_path / name, recipe) for name in ("one", "two"))
    assert worker.main([str(one.path)]) == 0
    assert warm.run(agent_command(two.path, 2, stop_at=3)).returncode == 0
    assert warm.run(agent_command(two.path, 2)).returncode == 0
    assert read_confusion(one.metrics, 6) is not None
    for step in range(7):
        assert read_confusion(one.metrics, step) == read_confusion(two.metrics, step)
    weights = [run.checkpoints / "step-00000006" / "model.safetensors" for run in (one, two)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_too_many_classes_are_refused() -> None:
    with pytest.raises(UserError, match="1,001 have too many"):
        ConfusionCosts(1001, 0.5)
