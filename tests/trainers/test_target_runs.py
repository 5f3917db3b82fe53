"""Runs that learn numbers, or the shares of classes, from the shards to the report."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import ANSWERS, RunDir, create_run
from bigbatch.data.index import build_index, open_index
from bigbatch.data.measured import as_in, with_measured
from bigbatch.launcher.child import Children
from bigbatch.launcher.preflight import check
from bigbatch.launcher.prove import prove
from bigbatch.trainers import worker
from bigbatch.trainers.compress import __main__ as compress
from bigbatch.trainers.distillation.build import check_teacher
from bigbatch.trainers.ensemble.folder import open_ensemble
from bigbatch.trainers.export import __main__ as export
from bigbatch.trainers.inference import __main__ as inference
from bigbatch.trainers.planning.inputs import open_inputs
from bigbatch.trainers.replay.past import find_past
from bigbatch.trainers.report.report import write_report
from tests.helpers.archives import pack
from tests.helpers.target_pictures import SPLITS, picture, recipe_of, write_pictures

FEW = (("train", 96), ("val", 40), ("test", 24))
SHORT = ("duration=4 epochs", "global_batch=32", "evaluate.batch=16", "log.details_every=3")


class Net(nn.Module):
    """A linear model of the pixels, quick to train and to score."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(64, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(nn.functional.adaptive_avg_pool2d(x, 8).flatten(1))
        return out


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = write_pictures(tmp_path_factory.mktemp("targets") / kind, kind, FEW)
        return made[kind]

    return of


def _use_net(patch: pytest.MonkeyPatch) -> None:
    def build(*_: object, classes: int, **__: object) -> nn.Module:
        return Net(classes)

    patch.setattr("bigbatch.trainers.job.build_model", build)
    patch.setattr("bigbatch.trainers.ensemble.members.build_model", build)
    patch.setattr("bigbatch.trainers.finish.say_results", lambda *_: [])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    _use_net(monkeypatch)


def make(path: Path, data: Path, loss: str, *more: str) -> RunDir:
    recipe = load_recipe("digits", recipe_of(data, loss, *SHORT, *more), say=None)
    return create_run(path, recipe, with_measured)


def train(run: RunDir, *options: str) -> None:
    assert worker.main([str(run.path), *options]) == 0


def evals(run: RunDir) -> list[dict[str, float]]:
    return [r for r in read_jsonl(run.metrics) if r["kind"] == "eval" and r["split"] == "val"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("loss", ["l2", "l1"])
def test_scores_are_those_of_the_weights_in_the_targets_unit(
    shards: Callable[[str], Path], tmp_path: Path, loss: str
) -> None:
    data = shards("numbers")
    run = make(tmp_path / "run", data, f"{{name: {loss}}}", "augment.mixup=0.2")
    train(run)
    recipe, index = run.recipe(), open_index(data / "test")
    mean, std = recipe.loss.scaling  # type: ignore[union-attr]
    trained = open_index(data / "train").target
    assert trained is not None
    assert index.target is not None
    np.testing.assert_allclose(mean, trained.astype(np.float64).mean(0), rtol=1e-12)
    model = Net(2).eval()
    model.load_state_dict(load_file(run.snapshots / "cycle-01" / "model.safetensors"))
    images = []
    keys = index.keys()
    for key in keys:
        pixels = np.asarray(Image.open(io.BytesIO(picture(int(key))[0])), np.float32) / 255
        images.append((pixels - 0.2) / 0.2)
    with torch.inference_mode():
        outputs = model(torch.tensor(np.array(images))[:, None]).double().numpy()
    errors = outputs * std + mean - index.target
    summary = json.loads(run.summary.read_text())
    (member,) = summary["test"]["members"]
    spread = ((index.target - index.target.mean(0)) ** 2).sum(0)
    assert member["mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-4)
    assert member["rmse"] == pytest.approx(np.sqrt((errors**2).mean(0)).mean(), rel=1e-4)
    assert member["r2"] == pytest.approx((1 - (errors**2).sum(0) / spread).mean(), abs=1e-4)
    assert summary["test"]["ensemble"] == {k: member[k] for k in ("mae", "rmse", "r2")}
    found = evals(run)
    assert len(found) == 4
    assert found[-1]["mae"] == pytest.approx(summary["val"]["members"][0]["mae"], rel=1e-4)
    each = [r for r in read_jsonl(run.metrics) if r["kind"] == "targets"]
    assert [np.mean(r["mae"]) for r in each] == pytest.approx([r["mae"] for r in found])
    answers = json.loads((run.ensemble / ANSWERS).read_text())
    assert answers["outputs"] == ["target_0", "target_1"]
    np.testing.assert_allclose(answers["true"], index.target)
    assert not (run.ensemble / "confusion.json").exists()


@pytest.mark.usefixtures("quick")
def test_a_run_that_stopped_goes_on_to_the_same_end(
    shards: Callable[[str], Path], tmp_path: Path
) -> None:
    """Best checkpoint, early stopping and plateau go by the error, and are as they would be."""
    more = ["checkpoint={every: 2 steps, keep: 1, keep_best: 1}", "evaluate.every=2 steps"]
    more += ["regularise.early_stop={patience: 6}", "augment.mixup=0.2"]
    more += ["schedule={name: plateau, metric: rmse, patience: 1}", "ensemble.soup=false"]
    ends = []
    for name, parts in (("whole", [()]), ("parts", [("--stop-at", "5"), ()])):
        run = make(tmp_path / name, shards("one"), "{name: smooth_l1, beta: 0.5}", *more)
        for options in parts:
            train(run, *options)
        best = min(evals(run), key=lambda e: (e["mae"], e["step"]))
        event = next(e for e in read_jsonl(run.events) if e["kind"] == "best")
        assert (event["step"], event["mae"]) == (best["step"], best["mae"])
        state = json.loads(
            (run.checkpoints / f"step-{int(best['step']):08d}" / "state.json").read_text()
        )
        assert state["mae"] == best["mae"]
        weights = load_file(run.snapshots / "cycle-01" / "model.safetensors")
        ends.append((weights, evals(run)))
    assert ends[0][1] == ends[1][1]
    assert all(torch.equal(ends[0][0][k], ends[1][0][k]) for k in ends[0][0])


@pytest.mark.usefixtures("quick")
def test_shares_of_classes(shards: Callable[[str], Path], tmp_path: Path) -> None:
    run = make(tmp_path / "run", shards("shares"), "{name: kl}", "augment.cutmix=1")
    train(run)
    index = open_index(shards("shares") / "val")
    summary = json.loads(run.summary.read_text())
    (member,) = summary["val"]["members"]
    assert member.keys() == {"name", "kl", "mode", "kept"}
    assert evals(run)[-1]["kl"] < evals(run)[0]["kl"]
    assert index.target is not None
    prior = open_index(shards("shares") / "train").target
    assert prior is not None
    usual = prior.mean(0)
    t = index.target.astype(np.float64)
    of_prior = np.where(t > 0, t * np.log(np.maximum(t, 1e-30) / usual), 0).sum(1).mean()
    assert 0 < member["kl"] < of_prior


@pytest.fixture(scope="module")
def trained_once(shards: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run with two snapshots, of a linear model."""
    path = tmp_path_factory.mktemp("trained") / "run"
    run = make(
        path, shards("numbers"), "{name: l2}", "schedule={name: cycles, cycles: 2, warmup: 0 steps}"
    )
    with pytest.MonkeyPatch.context() as patch:
        _use_net(patch)
        train(run)
    return run


@pytest.fixture
def trained(trained_once: RunDir, tmp_path: Path, quick: None) -> RunDir:
    """A copy of it."""
    return RunDir(Path(shutil.copytree(trained_once.path, tmp_path / "run")))


def test_the_page_has_a_plot_of_predicted_over_true_numbers(trained: RunDir) -> None:
    page = write_report(trained).read_text()
    assert len(re.findall("Predicted over true target_[01]", page)) >= 2
    assert "Confusion matrix" not in page
    assert "evaluations/ is empty" not in page
    assert "val MAE" in page
    (trained.ensemble / ANSWERS).write_text('{"each": {"mae": 1}, "outputs": ["x"]}')
    assert "Predicted over true" not in write_report(trained).read_text()


def test_commands_for_classifiers_refuse(
    trained: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    split = str(Path(trained.recipe().data.path) / "val")
    out = ["--out", str(trained.path / "out")]
    arguments = ["ensemble", str(trained.path), "--source", split, *out]
    assert inference.main(arguments) == 2
    assert "learns targets (loss l2), and `bigbatch ensemble` takes" in capsys.readouterr().err
    with pytest.raises(UserError, match="`bigbatch compress` takes a classifier's answers"):
        compress._only_member(trained.path, "cycle-01")
    with pytest.raises(UserError, match="distill takes a classifier's answers"):
        check_teacher(open_ensemble([trained.path]), load_recipe("digits"), ("0", "1"))
    with pytest.raises(UserError, match="only steps of classifiers are made again"):
        find_past(trained, 3)


def infer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert inference.main([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_evaluate_says_what_the_run_said(
    trained: RunDir, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = str(Path(trained.recipe().data.path) / "test")
    arguments = ("evaluate", str(trained.path), "--source", source, "--members", "all")
    found = infer(capsys, *arguments, "--out", str(tmp_path / "out"))
    summary = json.loads(trained.summary.read_text())["test"]
    told = {m["name"]: {k: m[k] for k in ("mae", "rmse", "r2")} for m in summary["members"]}
    for member in found["members"]:
        scores = dict(member)
        if (name := scores.pop("name").rpartition("/")[2]) in told:
            assert scores == pytest.approx(told[name], rel=1e-6)
    assert found["samples"] == 24
    assert found["mae"] == pytest.approx(np.mean(found["by_target"]["mae"]))
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == found
    answers = json.loads((tmp_path / "out" / ANSWERS).read_text())
    mean = np.array(answers["predicted"])
    assert np.abs(mean - answers["true"]).mean() == pytest.approx(found["mae"])


def test_predict_writes_numbers_in_the_targets_unit(
    trained: RunDir, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = Path(trained.recipe().data.path)
    index = open_index(data / "test")
    tars = Path(shutil.copytree(data / "test", tmp_path / "tars"))
    shutil.rmtree(tars / "index")
    rows = {}
    for name, source in (("indexed", data / "test"), ("tars", tars)):
        out = tmp_path / f"{name}.parquet"
        arguments = ("predict", str(trained.path), "--source", str(source), "--out", str(out))
        found = infer(capsys, *arguments)
        rows[name] = pq.read_table(out).to_pydict()
        known = 24 if name == "indexed" else 0
        assert (found["rows"], found["with_target"], found["notes"]) == (24, known, [])
        assert (found["mae"] is not None) == bool(known)
    assert rows["indexed"]["key"] == index.keys()
    assert index.target is not None
    np.testing.assert_allclose(rows["indexed"]["target"], index.target)
    assert rows["tars"]["target"] == [None] * 24
    assert rows["tars"]["prediction"] == rows["indexed"]["prediction"]
    error = np.abs(np.array(rows["indexed"]["prediction"]) - index.target).mean()
    kept = json.loads(trained.summary.read_text())["test"]["ensemble"]
    assert error == pytest.approx(kept["mae"], rel=1e-5)


@pytest.mark.parametrize("ending", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
def test_export_gives_what_predict_gives(
    trained: RunDir, capsys: pytest.CaptureFixture[str], tmp_path: Path, ending: str
) -> None:
    """Pixels in, numbers in the targets' unit out."""
    data = Path(trained.recipe().data.path)
    table, file = tmp_path / "p.parquet", tmp_path / f"model{ending}"
    arguments = (str(trained.path), "--members", "all")
    infer(capsys, "predict", *arguments, "--source", str(data / "test"), "--out", str(table))
    rows = pq.read_table(table).to_pydict()
    assert export.main([*arguments, "--out", str(file)]) == 0
    pictures = [np.asarray(Image.open(io.BytesIO(picture(int(key))[0]))) for key in rows["key"]]
    pixels = np.array(pictures)[..., None]
    if ending == ".onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        texts = session.get_modelmeta().custom_metadata_map
        description = {key: json.loads(text) for key, text in texts.items()}
        (found,) = session.run(["prediction"], {"pixels": pixels})
    else:
        extra = {"description.json": ""}
        network = torch.export.load(str(file), extra_files=extra).module()
        description = json.loads(extra["description.json"])
        with torch.no_grad():
            found = network(torch.tensor(pixels))[0].numpy()
    assert description["outputs"] == ["target_0", "target_1"]
    assert "classes" not in description
    np.testing.assert_allclose(found, rows["prediction"], rtol=1e-5)
    card = file.with_name(f"{file.name}.md").read_text()
    assert "(prediction,) = " in card
    assert "probabilit" not in card


def test_export_refuses_what_it_cannot_say(
    trained: RunDir, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for more, says in (
        (("--out", str(tmp_path / "a.safetensors")), "in standard deviations of the targets"),
        (("--out", str(tmp_path / "a.pt2"), "--check"), "this model gives numbers"),
    ):
        assert export.main([str(trained.path), "--members", "cycle-01", *more]) == 2
        assert says in capsys.readouterr().err


def test_what_cannot_be_compared_is_refused(
    trained: RunDir,
    digits: Path,
    shards: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for source, says in (
        (digits / "val", "has no targets to compare with"),
        (shards("one") / "val", "has targets of 1 numbers, the members give 2"),
    ):
        assert inference.main(["evaluate", str(trained.path), "--source", str(source)]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_shares_are_evaluated_by_the_names_of_their_classes(
    shards: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path / "run", shards("shares"), "{name: kl}", "duration=4 steps")
    train(run)
    capsys.readouterr()
    source = shards("shares") / "test"
    found = infer(capsys, "evaluate", str(run.path), "--source", str(source))
    (member,) = json.loads(run.summary.read_text())["test"]["members"]
    assert (found["kl"], found["mode"]) == (pytest.approx(member["kl"], rel=1e-6), member["mode"])
    other = Path(shutil.copytree(source, tmp_path / "other" / "test"))
    build_index(other, classes=("right", "middle", "left"))
    assert inference.main(["evaluate", str(run.path), "--source", str(other)]) == 2
    assert "has the classes of the members in another order" in capsys.readouterr().err


def recipe(data: Path, loss: str, *more: str):
    return load_recipe("digits", recipe_of(data, loss, *more), say=None)


def test_a_start_looks_at_what_there_is_to_learn(
    shards: Callable[[str], Path], digits: Path
) -> None:
    found = check(recipe(shards("numbers"), "{name: l2}", "augment.flip=0.5"), None)
    assert any("targets stay as they are where flip move" in note for note in found["notes"])
    inputs = open_inputs(with_measured(recipe(shards("one"), "{name: l2}")))
    assert inputs.outputs == ("target",)
    for data, loss, more, says in (
        ("numbers", "cross_entropy", (), "has targets and no labels, and loss cross_entropy"),
        ("numbers", "l2", ("data.sampling=balanced",), "balanced goes by labels, and the data"),
        (
            "numbers",
            "l2",
            ("loss.mean=[1]", "loss.std=[1]"),
            "loss.mean has 1 numbers, and targets 2",
        ),
        ("numbers", "kl", (), "targets of 2 numbers and 1 classes"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            open_inputs(recipe(shards(data), f"{{name: {loss}}}", *more))
    with pytest.raises(UserError, match=r"learns targets, and .*train has none; write them by"):
        check(recipe(digits, "{name: l1}"), None)


def test_splits_without_targets_are_named(shards: Callable[[str], Path], tmp_path: Path) -> None:
    data = Path(shutil.copytree(shards("one"), tmp_path / "data"))
    for members, says in (
        ((("a.png", picture(0)[0]), ("a.cls", b"0")), r"val has none"),
        ((("a.png", picture(0)[0]), ("a.target.json", b"[1, 2]")), "of 2 numbers, .* has others"),
    ):
        pack(data / "val" / "000000.tar", *members)
        build_index(data / "val", classes=("unlabelled",))
        with pytest.raises(UserError, match=says):
            open_inputs(recipe(data, "{name: l2}"))


def test_what_was_measured_is_the_runs_own(shards: Callable[[str], Path]) -> None:
    written = recipe(shards("one"), "{name: l2}")
    measured = with_measured(written)
    assert isinstance(measured.loss.mean, list)  # type: ignore[union-attr]
    assert as_in(measured, written) == measured
    assert with_measured(measured) is measured


@pytest.mark.slow
@pytest.mark.timeout(1200)  # four starts one after another
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(("kind", "loss"), [("numbers", "{name: tukey}"), ("shares", "{name: kl}")])
def test_the_proof_holds(
    shards: Callable[[str], Path], tmp_path: Path, kind: str, loss: str
) -> None:
    changes = recipe_of(shards(kind), loss, *SHORT, "augment.mixup=0.2", "micro_batch=8")
    written = with_measured(load_recipe("digits", changes, say=None))
    results = prove(written, tmp_path, steps=5, ranks=(1, 2, 3))
    assert [r.difference for r in results] == [0.0, 0.0, 0.0]
    assert all(r.passed and r.same_samples for r in results)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("forked", "no_plots")
def test_numbers_are_learned_and_scored_alike_on_any_number_of_ranks(tmp_path: Path) -> None:
    """R2 above 0.9 on images that nobody trained on; on two ranks the same run, to the last bit."""
    data = write_pictures(tmp_path / "data", "numbers", SPLITS)
    found = []
    for ranks in (1, 2):
        changes = recipe_of(data, "{name: l2}")
        run = create_run(tmp_path / str(ranks), load_recipe("digits", changes), with_measured)
        with Children(ranks, threads=1) as children:
            assert children.start(run).wait() == 0
        found.append((json.loads(run.summary.read_text()), evals(run)))
    (one, first), (two, second) = found
    assert one["test"]["ensemble"]["r2"] > 0.9
    assert one["test"] == two["test"]
    assert [e["mae"] for e in first] == [e["mae"] for e in second]
