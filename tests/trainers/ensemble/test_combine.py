"""What a run's end says of its members, and that `evaluate` says the same of them afterwards."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bigbatch.configs.ensemble import Ensemble
from bigbatch.configs.rundir import RunDir
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.batch import MicroBatch
from bigbatch.data.index import Index, open_index
from bigbatch.trainers.engine import Engine, open_engine
from bigbatch.trainers.ensemble.combine import _mean_probabilities, combine
from bigbatch.trainers.ensemble.members import find_members
from bigbatch.trainers.evaluation import evaluate
from bigbatch.trainers.evaluation.evaluate import Evaluator
from bigbatch.trainers.evaluation.metrics import softmax
from bigbatch.trainers.evaluation.record import EVALUATION, read_evaluation
from bigbatch.trainers.inference import __main__ as inference
from bigbatch.trainers.recovery.tensor_files import save_weights
from tests.helpers.runs import untrained_run

# What depends on the command, and not on what it evaluates.
OF_THE_COMMAND = {"source", "notes", "cost", "mistakes_drawn"}


def combined(run: RunDir, data: Path, margin: float = 1.0) -> dict[str, Any]:
    """A run's end, without its soup."""
    engine: Engine = open_engine("ddp", "fp32")
    recipe, (member, *_) = run.recipe(), find_members(run)
    model = member.build()
    engine.prepare(model, torch.optim.SGD(model.parameters(), 0.1), 1)
    augmenter = Augmenter(
        recipe.augment, image_size=recipe.data.image_size, crop_fraction=1.0, classes=10, seed=0,
        device=engine.device,
    )  # fmt: skip
    scores = combine(
        run,
        Ensemble(soup=False, selection_margin=margin),
        engine,
        Evaluator(engine, augmenter, recipe),
        {"val": open_index(data / "val"), "test": open_index(data / "test")},
        3,
        recompute=lambda: None,
    )
    assert scores is not None
    return scores


def test_the_end_of_a_run_writes_what_evaluate_writes(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = untrained_run(tmp_path / "a", digits, tuple("0123456789"), snapshots=3)
    scores = combined(run, digits)
    best = max(scores["val"]["members"], key=lambda m: m["accuracy"])["name"]
    for split in ("val", "test"):
        written = json.loads((run.evaluations / split / EVALUATION).read_text())
        read_evaluation(run.evaluations / split)
        ensemble = scores[split]["ensemble"]
        assert written["accuracy"] == ensemble["accuracy"]
        assert [written[key] for key in ("nll", "brier", "ece")] == pytest.approx(
            [ensemble[key] for key in ("nll", "brier", "ece")]
        )
        against = written["members"].pop("against_best")
        where = "these samples" if split == "val" else "other samples"
        assert (against["best"], against["chosen_on"]) == (f"a/{best}", where)
    arguments = ["evaluate", str(run.path), "--source", str(digits / "test"), "--json"]
    assert inference.main(arguments) == 0
    again = json.loads(capsys.readouterr().out)
    del again["members"]["against_best"]
    assert {k for k in written | again if written.get(k) != again.get(k)} <= OF_THE_COMMAND


def test_members_share_the_decoding_of_a_split(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = untrained_run(tmp_path / "a", digits, tuple("0123456789"), snapshots=3)
    decoded, real = [], evaluate.eval_batches

    def counted(index: Index, *arguments: Any, **options: Any) -> Iterator[MicroBatch]:
        decoded.append(index.place)
        return real(index, *arguments, **options)

    monkeypatch.setattr(evaluate, "eval_batches", counted)
    scores = combined(run, digits)
    assert len(scores["val"]["members"]) == 3
    assert decoded == [str(digits / "val"), str(digits / "test")]


def test_logits_that_are_not_finite_are_no_evaluation(digits: Path, tmp_path: Path) -> None:
    run = untrained_run(tmp_path / "a", digits, tuple("0123456789"), snapshots=3)
    member = find_members(run)[1]
    model = member.build()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    save_weights(model, member.weights, member.info)
    scores = combined(run, digits)
    assert np.isnan(scores["val"]["members"][1]["nll"])
    assert not run.evaluations.exists()


def test_the_mean_of_members_is_numpy_s_bit_for_bit() -> None:
    logits = list(np.random.default_rng(0).normal(size=(5, 40, 7)).astype(np.float32) * 9)
    for count in (1, 2, 5):
        mean = np.mean([softmax(each) for each in logits[:count]], axis=0)
        assert (_mean_probabilities(logits[:count]) == mean).all()
