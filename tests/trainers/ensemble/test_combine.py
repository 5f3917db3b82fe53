"""What a run's end says of its members, and that `evaluate` says the same of them afterwards."""

import json
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
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
from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.ensemble.combine import Seen, _mean_probabilities, combine, look
from bigbatch.trainers.ensemble.evaluations import EnsembleStatistics
from bigbatch.trainers.ensemble.members import find_members
from bigbatch.trainers.evaluation import evaluate
from bigbatch.trainers.evaluation.by_sample import OUTCOMES, read_outcomes
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
        own = read_outcomes(run.evaluations / split, written["outcomes_sha256"])
        assert own.keys.to_pylist() == open_index(digits / split).keys()
        assert (own.correct.mean(), own.losses.mean()) == (written["accuracy"], written["nll"])
    arguments = ["evaluate", str(run.path), "--source", str(digits / "test"), "--json"]
    assert inference.main([*arguments, "--out", str(tmp_path / "again")]) == 0
    again = json.loads(capsys.readouterr().out)
    del again["members"]["against_best"]
    assert {k for k in written | again if written.get(k) != again.get(k)} <= OF_THE_COMMAND


def test_an_index_without_its_keys_costs_the_outcomes_alone(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training never reads them, and its end is no time to fail."""
    shutil.copytree(digits, tmp_path / "shards")
    (tmp_path / "shards/test/index/keys.parquet").write_bytes(b"no Parquet")
    run = untrained_run(tmp_path / "a", digits, tuple("0123456789"), snapshots=3)
    combined(run, tmp_path / "shards")
    assert "no outcomes.parquet in " in capsys.readouterr().err
    assert read_evaluation(run.evaluations / "test")["outcomes_sha256"] is None
    assert read_evaluation(run.evaluations / "val")["outcomes_sha256"] is not None
    assert not (run.evaluations / "test" / OUTCOMES).exists()


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


def test_scores_that_are_computed_twice_are_those_that_were_kept(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the validation split: logits of many classes are not kept between the two passes."""
    run = untrained_run(tmp_path / "a", digits, tuple("0123456789"), snapshots=3)
    kept = combined(run, digits, margin=0.3)
    written = (run.evaluations / "val" / EVALUATION).read_bytes()
    monkeypatch.setattr(evaluate, "KEPT_BYTES", 1000)
    assert combined(run, digits, margin=0.3) == kept
    assert (run.evaluations / "val" / EVALUATION).read_bytes() == written


class Split:
    """As much of an index as a split that nobody decodes needs."""

    def __init__(self, samples: int, classes: int) -> None:
        self.label = np.arange(samples) * 7 % classes
        self.classes = tuple(map(str, range(classes)))

    def __len__(self) -> int:
        return len(self.label)


def fake_ensemble(members: int, classes: int) -> Any:
    names = [SimpleNamespace(name=str(number)) for number in range(members)]
    classes_ = tuple(map(str, range(classes)))
    combination = Combination(temperature=2.0)
    return SimpleNamespace(members=names, classes=classes_, combination=combination)


def logits_of(batch: int, members: int, samples: int, classes: int) -> np.ndarray:
    generator = np.random.default_rng(batch)
    return generator.normal(size=(members, samples, classes)).astype(np.float32) * 3


def seen(samples: int, classes: int, batch: int = 20) -> Seen:
    index: Any = Split(samples, classes)
    engine = SimpleNamespace(
        rank=0,
        world=1,
        device=torch.device("cpu"),
        gather_rows=lambda rows, _: [rows.numpy()],
        gather_values=lambda value: [value],
    )
    evaluator: Any = SimpleNamespace(engine=engine, batch_of=lambda index: batch, scaling=None)
    batches = (
        (np.arange(first, first + batch), logits_of(first, 2, batch, classes))
        for first in range(0, samples, batch)
    )
    found = look(evaluator, index, batches, 2, (0, 1), fake_ensemble(2, classes))
    assert found is not None
    return found


def test_memory_grows_with_samples_and_with_classes_never_with_their_product() -> None:
    """100,000 classes of a million samples are 400 GB of logits of each member."""
    peaks = []
    for samples in (100, 500):
        tracemalloc.start()
        found = seen(samples, 4000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found.mean is not None
        assert len(found.mean) == samples
        assert found.statistics is not None
        found.statistics.summary()
    # 400 samples more: six numbers for each of six models; their logits would be 13 MB.
    assert peaks[1] - peaks[0] < 400_000


@pytest.mark.parametrize("world", [2, 3])
def test_statistics_are_the_same_at_any_world_size(world: int) -> None:
    """Bit for bit, sums of probabilities by class included."""
    samples, classes, batch = 170, 12, 16
    index: Any = Split(samples, classes)
    ensemble = fake_ensemble(3, classes)

    def statistics(rank: int, world: int) -> Any:
        found = EnsembleStatistics(ensemble)
        for number in range(rank, -(-samples // batch), world):
            own = np.arange(number * batch, min(samples, (number + 1) * batch))
            found.add(logits_of(number, 3, len(own), classes), index.label[own])
        return found.statistics

    sums: list[Any] = []
    rows: list[list[np.ndarray]] = []
    for rank in reversed(range(world)):
        mine: list[np.ndarray] = []

        def add(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            sums.append({name: part.double().clone() for name, part in parts.items()})
            return {name: sum(each[name] for each in sums) for name in parts}

        def gather(own: torch.Tensor, capacity: int, rank: int = rank, mine: Any = mine) -> Any:
            mine.append(own.numpy())
            return None if rank else [each[len(mine) - 1] for each in reversed(rows)]

        rows.append(mine)
        engine: Any = SimpleNamespace(
            rank=rank, world=world, device=torch.device("cpu"), sum_by_name=add, gather_rows=gather,
            gather_values=lambda value: [value],
        )  # fmt: skip
        whole = evaluate.gather_statistics(engine, statistics(rank, world), samples, batch)
        assert (whole is None) == (rank > 0)
    assert whole is not None
    assert whole.summary() == statistics(0, 1).summary()
    assert (whole.confusion() == statistics(0, 1).confusion()).all()
