"""Early stopping: when it comes, and that the best weights are the run's, killed or not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import read_jsonl
from bigbatch.configs.judged import ACCURACY, MAE
from bigbatch.configs.load import load_recipe
from bigbatch.configs.regularise import EarlyStop
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.trainers import worker
from bigbatch.trainers.attempt import Attempt
from bigbatch.trainers.planning.early_stop import best_evaluation, stops
from bigbatch.trainers.planning.plateau import Evaluation


def evaluations(*accuracies: float | None) -> list[Evaluation]:
    return [Evaluation(10 * i, {"accuracy": a}) for i, a in enumerate(accuracies, 1)]


@pytest.mark.parametrize(
    ("accuracies", "patience", "threshold", "after"),
    [
        ([0.5, 0.6, 0.6, 0.6], 2, 0.0, 4),
        ([0.5, 0.6, 0.5, 0.7, 0.6, 0.65], 2, 0.0, 6),
        ([0.5, 0.55, 0.6, 0.65], 1, 0.1, 2),
        ([0.5, 0.55, 0.61, 0.62, 0.63], 2, 0.1, 5),
        ([0.5, None, 0.4], 2, 0.0, 3),
        ([0.1, 0.2, 0.3, 0.4], 1, 0.0, None),
    ],
)
def test_it_ends_after_so_many_evaluations_without_a_new_best(
    accuracies: list[float | None], patience: int, threshold: float, after: int | None
) -> None:
    config = EarlyStop(patience=patience, threshold=threshold)
    seen = evaluations(*accuracies)
    ends = [n for n in range(len(seen) + 1) if stops(config, seen[:n], ACCURACY)]
    assert (ends or [None])[0] == after
    assert not stops(None, seen, ACCURACY)
    losses = [None if a is None else 1 - a for a in accuracies]
    errors = [Evaluation(10 * i, {"mae": loss}) for i, loss in enumerate(losses, 1)]
    assert [n for n in range(len(seen) + 1) if stops(config, errors[:n], MAE)] == ends


def test_the_first_of_equally_good_ones_is_the_best() -> None:
    assert best_evaluation(evaluations(0.5, 0.7, None, 0.7, 0.6), ACCURACY).step == 20
    errors = [Evaluation(10 * i, {"mae": e}) for i, e in enumerate([0.5, 0.3, None, 0.3, 0.4], 1)]
    assert best_evaluation(errors, MAE).step == 20


ACCURACIES = (0.5, 0.7, 0.6, 0.7, 0.8)  # of steps 1, 2, ...


class Net(nn.Module):
    """A linear model, quick to train and to score."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(nn.functional.adaptive_avg_pool2d(x, 8).flatten(1))
        return out


def train(run: RunDir, *options: str) -> None:
    assert worker.main([str(run.path), *options]) == 0


measured = Attempt.evaluate


def evaluate(attempt: Attempt, *, snapshot: bool = False) -> dict[str, float]:
    measured(attempt, snapshot=snapshot)
    step = attempt.job.state.step
    scores = {"accuracy": ACCURACIES[step - 1], "nll": 1.0, "ece": 0.0}
    attempt.job.state.evaluations[-1] = Evaluation(step, scores)
    return scores


@pytest.mark.usefixtures("no_plots")
def test_the_run_ends_with_its_best_weights_and_resumes_to_the_same_end(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigbatch.trainers.job.build_model", lambda *_, **__: Net())
    monkeypatch.setattr("bigbatch.trainers.finish.say_results", lambda *_: [])
    monkeypatch.setattr(Attempt, "evaluate", evaluate)
    settings = [
        *(f"data.path={digits}", "log.wandb=off", "data.workers=0", "duration=5 steps"),
        *("global_batch=32", "micro_batch=32", "schedule={name: constant}", "data.test=null"),
        *("optimizer={name: sgd, lr: 0.1}", "clip=null", "evaluate.every=1 steps"),
        *("checkpoint={every: 50 steps, keep: 1, keep_best: 1}", "ensemble.soup=false"),
        "regularise.early_stop={patience: 2}",
    ]
    found = []
    for name, parts in (("whole", [()]), ("parts", [("--stop-at", "3"), ()])):
        run = create_run(tmp_path / name, load_recipe("digits", settings))
        for options in parts:
            train(run, *options)
        if name == "parts":
            train(run)  # there is nothing left to do but the summary
        steps = [r["step"] for r in read_jsonl(run.metrics) if r["kind"] == "train"]
        assert steps == [1, 2, 3, 4]
        (snapshot,) = run.snapshots.iterdir()
        weights = load_file(snapshot / "model.safetensors")
        best = load_file(run.checkpoints / "step-00000002" / "model.safetensors")
        assert all(torch.equal(weights[key], best[key]) for key in best)
        events = [e for e in read_jsonl(run.events) if e["kind"] in ("early_stop", "best")]
        assert [e["step"] for e in events[:2]] == [4, 2]
        assert json.loads(run.summary.read_text())["steps"] == 4
        found.append(weights)
    first, second = found
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("checkpoint.keep_best=0", "keeps none; set it to 1"),
        ("schedule={name: cycles}", "drop early_stop, or choose another schedule"),
        ("regularise.early_stop.patience=0", "greater than or equal to 1"),
    ],
)
def test_what_it_cannot_go_back_to_is_refused(change: str, says: str) -> None:
    keys = ["regularise.early_stop={patience: 3}", "checkpoint.keep_best=1"]
    with pytest.raises(UserError, match=says):
        load_recipe("digits", [*keys, "schedule={name: cosine}", change])
