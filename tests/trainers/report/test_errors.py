"""The verdict on runs that learned numbers or shares, on curves made for each rule."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import create_run
from bigbatch.trainers.monitoring.history import read_history
from bigbatch.trainers.report.answers import shown_answers
from bigbatch.trainers.report.diagnosis import learning

Curve = Callable[[float], float | None]
STEPS = 200


def judged(
    path: Path, loss: str, probe: dict[str, Any] | None, slope: float = -0.8, **scores: Curve
) -> list[str]:
    """The rules of what is found where validation scores go so; training's loss falls, or not."""
    changes = ["data.sampling=uniform", "schedule={name: cosine}", f"loss={{name: {loss}}}"]
    run = create_run(path / "run", load_recipe("digits", changes, say=None))
    with run.metrics.open("w") as file:
        for step in range(1, STEPS + 1):
            t = step / STEPS
            train = {"kind": "train", "step": step, "loss": 1.0 + slope * t, "lr": 1.0 - t}
            print(json.dumps(train), file=file)
            if step % 10 == 0:
                found = {name: curve(t) for name, curve in scores.items()}
                print(
                    json.dumps({"kind": "eval", "split": "val", "step": step, **found}), file=file
                )
        if probe is not None:
            print(json.dumps({"kind": "probe", "step": STEPS, "images": 64, **probe}), file=file)
    return [finding.rule for finding in learning(read_history(run))]


def errors(train: float, val: float) -> dict[str, Any]:
    return {"dead": {}, "errors": {"train": {"mae": train}, "val": {"mae": val}}}


@pytest.mark.parametrize(
    ("rule", "mae", "r2", "probe"),
    [
        ("overfitting", lambda t: 2 + abs(t - 0.5), lambda t: 0.8, None),
        ("underfitting", lambda t: 5.0, lambda t: 0.05, None),
        ("gap", lambda t: 2.0, lambda t: 0.8, errors(0.5, 2.0)),
        ("improving", lambda t: 5 - 3 * t, lambda t: 0.8, errors(1.9, 2.0)),
        ("converged", lambda t: 2 + 0.3 * 0.001**t, lambda t: 0.8, None),
        ("unfinished", lambda t: None, lambda t: None, None),
    ],
)
def test_each_rule_has_its_curve(
    tmp_path: Path, rule: str, mae: Curve, r2: Curve, probe: dict[str, Any] | None
) -> None:
    assert judged(tmp_path, "l1", probe, mae=mae, rmse=mae, r2=r2) == [rule]


def test_shares_are_judged_by_their_divergence(tmp_path: Path) -> None:
    found = judged(tmp_path, "kl", None, kl=lambda t: 0.1 + abs(t - 0.5), mode=lambda t: 0.9)
    assert found == ["overfitting"]


@pytest.mark.parametrize(("loss", "rule"), [("tukey", "converged"), ("l2", "diverged")])
def test_a_loss_in_units_of_its_errors_may_rise(tmp_path: Path, loss: str, rule: str) -> None:
    mae: Curve = lambda t: 2 + 0.3 * 0.001**t  # noqa: E731
    assert judged(tmp_path, loss, None, 4.0, mae=mae, rmse=mae, r2=lambda t: 0.9) == [rule]


GOOD = {
    "each": {"mae": [1], "rmse": [1], "r2": [1]},
    "outputs": ["x"],
    "true": [[1.0]],
    "predicted": [[1.0]],
}


@pytest.mark.parametrize(
    "content",
    [
        None,
        {},
        {"each": {"mae": 1}, "outputs": ["x"]},
        {**GOOD, "each": {"mae": [1], "rmse": [1], "r2": ["x"]}},
        {**GOOD, "predicted": []},
        {**GOOD, "true": [[1.0, 2.0]], "predicted": [[1.0, 2.0]]},
        {**GOOD, "samples": None},
    ],
)
def test_a_damaged_file_hides_no_page(content: dict[str, Any] | None) -> None:
    assert shown_answers(content) is None
