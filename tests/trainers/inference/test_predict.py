"""Predictions: every image exactly once, whatever the batch and the number of ranks."""

import json
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from bigbatch.configs.errors import UserError
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.geometry import View
from bigbatch.data.index import open_index
from bigbatch.data.listing import open_listing
from bigbatch.data.loader import eval_batches
from bigbatch.trainers.engine import Engine, open_engine
from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.ensemble.folder import Ensemble, open_ensemble
from bigbatch.trainers.ensemble.members import Member, find_members
from bigbatch.trainers.evaluation.evaluate import Evaluator
from bigbatch.trainers.evaluation.metrics import softmax
from bigbatch.trainers.inference import forward as forward_module
from bigbatch.trainers.inference.forward import Forward
from bigbatch.trainers.inference.looks import TTA, check_tta, looks_of
from bigbatch.trainers.inference.predict import predict
from bigbatch.trainers.recovery.tensor_files import save_weights
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import untrained_run

CLASSES = tuple("0123456789")
# Of training, and of evaluation.
SIZES = ["data.image_size=[24, 32]", "evaluate.image_size=[28, 40]", "evaluate.crop_mode=squash"]
MODULE = Path(__file__).parents[3] / "trainers" / "inference" / "__main__.py"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine("ddp", "fp32")


@pytest.fixture(scope="module")
def ensemble(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Ensemble:
    """Two members that look alike, one that sees another size, one of another mean and crop."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        untrained_run(folder / "a", digits, CLASSES),
        untrained_run(folder / "b", digits, CLASSES, SIZES, 1, seed=1),
        untrained_run(
            folder / "c", digits, CLASSES, ["augment.mean=[0.4]", "evaluate.crop_fraction=0.8"], 1
        ),
    ]
    return open_ensemble([run.path for run in runs])


def own_logits(engine: Any, member: Member, digits: Path) -> np.ndarray:
    """As the run itself evaluates a member."""
    recipe = member.recipe
    augmenter = Augmenter(
        recipe.augment,
        image_size=recipe.data.image_size,
        eval_size=recipe.eval_size,
        squash=recipe.evaluate.squash,
        crop_fraction=recipe.evaluate.crop_fraction,
        classes=10,
        seed=0,
        device=engine.device,
    )
    logits = Evaluator(engine, augmenter, recipe).logits(member.build(), open_index(digits / "val"))
    assert logits is not None
    return logits


def test_members_together_give_the_logits_that_each_gives_in_its_own_run(
    engine: Engine, ensemble: Ensemble, digits: Path
) -> None:
    index = open_index(digits / "val")
    found = Forward(engine, ensemble.members).logits(index)
    assert found is not None
    for own, member in zip(found, ensemble.members, strict=True):
        assert np.array_equal(own, own_logits(engine, member, digits)), member.name
    assert len({own.tobytes() for own in found}) == 4


def test_each_member_computes_in_the_precision_of_its_recipe(
    engine: Engine, ensemble: Ensemble, digits: Path, tmp_path: Path
) -> None:
    run = untrained_run(tmp_path / "half", digits, CLASSES, ["precision=bf16"], 1)
    half, single = find_members(run)[0], ensemble.members[0]
    index = open_index(digits / "val")
    found = Forward(engine, [single, half]).logits(index)
    assert found is not None
    in_bf16 = SimpleNamespace(
        rank=0,
        world=1,
        device=engine.device,
        autocast=lambda: torch.autocast(engine.device.type, torch.bfloat16),
        gather_rows=engine.gather_rows,
    )
    assert np.array_equal(found[0], own_logits(engine, single, digits))
    assert np.array_equal(found[1], own_logits(in_bf16, half, digits))
    assert not np.array_equal(found[1], own_logits(engine, half, digits))


def test_what_one_size_could_read_and_another_not_is_no_batch_of_two_halves(
    engine: Engine, ensemble: Ensemble, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails now and then: rows of different images must not stand side by side."""
    calls = count()

    def failing(*args: Any, **options: Any) -> Any:
        number = next(calls)
        for batch in eval_batches(*args, **options):
            yield replace(batch, samples=batch.samples[1:]) if number == 1 else batch

    monkeypatch.setattr(forward_module, "eval_batches", failing)
    with pytest.raises(UserError, match=r"sample 0 of .* could be read once and not again"):
        list(Forward(engine, ensemble.members).outputs(open_index(digits / "val")))


def write(
    engine: Engine, ensemble: Ensemble, source: Path | str, out: Path, **options: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    listing = open_listing(str(source), CLASSES)
    forward = Forward(engine, ensemble.members, **options)
    result = predict(
        engine, ensemble, forward, listing, out, features=options.get("features", False)
    )
    assert result is not None
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]
    return pq.read_table(out).to_pylist(), result


def test_rows_hold_what_the_ensemble_says(
    engine: Engine, ensemble: Ensemble, digits: Path, tmp_path: Path
) -> None:
    rows, result = write(engine, ensemble, digits / "val", tmp_path / "p.parquet", batch=50)
    index = open_index(digits / "val")
    logits = Forward(engine, ensemble.members, batch=50).logits(index)
    assert logits is not None
    p = np.mean([softmax(own) for own in logits], axis=0)
    assert [row["key"] for row in rows] == index.keys()
    assert [row["target"] for row in rows] == [CLASSES[k] for k in index.label]
    assert [row["label"] for row in rows] == [CLASSES[k] for k in p.argmax(1)]
    np.testing.assert_allclose([row["probabilities"] for row in rows], p, atol=1e-7)
    np.testing.assert_allclose([row["confidence"] for row in rows], p.max(1), atol=1e-7)
    np.testing.assert_allclose([row["entropy"] for row in rows], -(p * np.log(p)).sum(1), atol=1e-6)
    assert max(row["confidence"] for row in rows) <= 1
    right = (p.argmax(1) == index.label).mean()
    assert (result["rows"], result["with_target"], result["unreadable"]) == (
        len(rows),
        len(rows),
        0,
    )
    assert result["accuracy"] == right
    about = json.loads(pq.read_schema(tmp_path / "p.parquet").metadata[b"bigbatch"])
    assert about["classes"] == list(CLASSES)
    assert about["members"] == [m.name for m in ensemble.members]


def pictures(root: Path, count: int) -> list[str]:
    root.mkdir()
    generator = np.random.default_rng(0)
    names = [f"{number:03d}.png" for number in range(count)]
    for name in names:
        size = generator.integers(8, 40, 2)
        Image.fromarray(generator.integers(0, 256, size, np.uint8)).save(root / name)
    return names


def test_unreadable_images_are_rows_with_a_reason_in_their_place(
    engine: Engine, ensemble: Ensemble, tmp_path: Path
) -> None:
    names = pictures(tmp_path / "p", 9)
    for name in (names[0], names[4], names[5], names[8]):
        (tmp_path / "p" / name).write_bytes(b"no image")
    for batch in (1, 2, 4, 9, 20):
        out = tmp_path / f"{batch}.parquet"
        rows, result = write(engine, ensemble, tmp_path / "p", out, batch=batch)
        assert [row["key"] for row in rows] == names
        bad = [row["key"] for row in rows if row["reason"] is not None]
        assert bad == [names[0], names[4], names[5], names[8]]
        empty = {"target", "label", "confidence", "entropy", "probabilities"}
        assert all(rows[0][name] is None for name in empty)
        assert result["unreadable"] == 4
        assert result["accuracy"] is None


def test_csv_holds_the_same_rows(engine: Engine, ensemble: Ensemble, tmp_path: Path) -> None:
    pictures(tmp_path / "p", 5)
    (tmp_path / "p" / "002.png").write_bytes(b"")
    rows, _ = write(engine, ensemble, tmp_path / "p", tmp_path / "p.parquet")
    listing = open_listing(str(tmp_path / "p"), CLASSES)
    predict(engine, ensemble, Forward(engine, ensemble.members), listing, tmp_path / "p.csv")
    table = pyarrow.csv.read_csv(tmp_path / "p.csv").to_pylist()
    assert [row["key"] for row in table] == [row["key"] for row in rows]
    probabilities = [json.loads(row["probabilities"] or "null") for row in table]
    assert probabilities[2] is None
    np.testing.assert_allclose(probabilities[0], rows[0]["probabilities"], rtol=1e-6)
    assert len(table) == 5


def test_features_are_what_goes_into_the_classifier(
    engine: Engine, ensemble: Ensemble, digits: Path, tmp_path: Path
) -> None:
    one = Ensemble(ensemble.members[:1], Combination())
    rows, _ = write(engine, one, digits / "val", tmp_path / "f.parquet", features=True)
    features = torch.tensor([row["features"] for row in rows])
    head: Any = one.members[0].build()
    with torch.inference_mode():
        p = head.get_classifier()(features).softmax(1)
    np.testing.assert_allclose([row["probabilities"] for row in rows], p, atol=1e-5)


def test_rejection_is_a_column(
    engine: Engine, ensemble: Ensemble, digits: Path, tmp_path: Path
) -> None:
    usual, _ = write(engine, ensemble, digits / "val", tmp_path / "p.parquet")
    limit = float(np.median([row["confidence"] for row in usual]))
    careful = Ensemble(ensemble.members, Combination(reject_below=limit))
    rows, _ = write(engine, careful, digits / "val", tmp_path / "r.parquet")
    assert {row["rejected"] for row in rows} == {True, False}
    assert all(row["rejected"] == (row["confidence"] < limit) for row in rows)


def test_a_member_that_gives_nan_is_named(engine: Engine, digits: Path, tmp_path: Path) -> None:
    run = untrained_run(tmp_path / "nan", digits, CLASSES)
    member = find_members(run)[1]
    model = member.build()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    save_weights(model, member.weights, member.info)
    with pytest.raises(UserError, match="member nan/cycle-02 gives logits that are not finite"):
        Forward(engine, find_members(run)).logits(open_index(digits / "val"))


@pytest.mark.parametrize("tta", TTA)
def test_looks_are_averaged_in_probability(
    engine: Engine, ensemble: Ensemble, digits: Path, tta: str
) -> None:
    member = ensemble.members[0]
    index = open_index(digits / "val")
    found = Forward(engine, [member], tta=tta).logits(index)
    assert found is not None
    counts = {"none": 1, "flip": 2, "five": 5, "ten": 10, "scales": 3}
    looks = looks_of(View(member.recipe.data.image_size, 1.0), tta)
    assert len(looks) == counts[tta] == len({(v.place, v.flip, v.fraction) for v in looks})
    plain = Forward(engine, [member]).logits(index)
    assert plain is not None
    assert np.array_equal(found, plain) == (tta == "none")


def test_five_crops_lie_in_the_corners() -> None:
    sizes = np.array([[40, 80]])
    boxes = [view.boxes(sizes, 0, 0)[0].tolist() for view in looks_of(View(16, 1.0), "five")]
    assert boxes == [
        [22.5, 2.5, 35, 35],
        [0, 0, 35, 35],
        [45, 0, 35, 35],
        [0, 5, 35, 35],
        [45, 5, 35, 35],
    ]


def test_mirror_images_are_refused_where_training_made_none(ensemble: Ensemble) -> None:
    recipe = ensemble.members[0].recipe
    assert recipe.augment.flip == 0
    for tta in ("flip", "ten"):
        with pytest.raises(UserError, match=r"never seen mirrored \(augment.flip = 0\)"):
            check_tta(tta, recipe, "a")
    for tta in ("none", "five", "scales"):
        check_tta(tta, recipe, "a")


@pytest.fixture(scope="module")
def one(
    engine: Engine, ensemble: Ensemble, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> pyarrow.Table:
    """What one rank writes, here in this process; the last batch is a short one."""
    out = tmp_path_factory.mktemp("one") / "p.parquet"
    index = open_index(digits / "val")
    assert len(index) % 32
    rows, _ = write(engine, ensemble, digits / "val", out, batch=32)
    keys = [row["key"] for row in rows]
    assert keys == index.keys()
    assert len(set(keys)) == len(keys)
    return pq.read_table(out)


def of_ranks(world: int, digits: Path, ensemble: Ensemble, out: Path) -> Path:
    runs = sorted({str(m.weights.parents[2]) for m in ensemble.members})
    options = ["--source", str(digits / "val"), "--out", str(out), "--batch", "32"]
    run_ranks(world, MODULE, "predict", *runs, *options)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_number_of_ranks_writes_each_image_once(
    one: pyarrow.Table, ensemble: Ensemble, digits: Path, tmp_path: Path, world: int
) -> None:
    assert pq.read_table(of_ranks(world, digits, ensemble, tmp_path / "p.parquet")).equals(one)


@pytest.mark.slow
def test_several_ranks_write_csv(
    one: pyarrow.Table, ensemble: Ensemble, digits: Path, tmp_path: Path
) -> None:
    csv = pyarrow.csv.read_csv(of_ranks(3, digits, ensemble, tmp_path / "p.csv"))
    assert csv.column("key").to_pylist() == [int(k) for k in one.column("key").to_pylist()]
