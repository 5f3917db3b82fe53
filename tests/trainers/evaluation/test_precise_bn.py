"""Precise BatchNorm: what is evaluated, kept and exported has statistics of its own weights."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.evaluation import Evaluate
from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.data.batch import BatchPlan
from bigbatch.data.index import open_index
from bigbatch.data.kept import KeptBatches
from bigbatch.trainers import worker
from bigbatch.trainers.engine import open_engine
from bigbatch.trainers.ensemble.members import find_members
from bigbatch.trainers.evaluation.evaluate import Evaluator
from bigbatch.trainers.evaluation.metrics import score, softmax
from bigbatch.trainers.evaluation.precise_bn import PreciseBatchNorm, check_precise
from bigbatch.trainers.job import precise_statistics, training_batches
from bigbatch.trainers.models.batch_stats import averaged_layers, running_statistics
from bigbatch.trainers.models.build import build_augmenter
from bigbatch.trainers.planning.inputs import open_inputs
from bigbatch.trainers.recovery.stored import MODEL, OPTIMIZER, STATISTICS, checkpoint_path
from tests.helpers.runs import SMALL

IMAGES = 128  # four micro-batches


def start(folder: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, *changes: str) -> RunDir:
    monkeypatch.setattr("bigbatch.trainers.finish.say_results", lambda *_: [])  # takes seconds
    settings = [
        *(*SMALL, f"data.path={digits}", "log.wandb=off", "duration=4 steps", "global_batch=64"),
        *("micro_batch=32", "schedule={name: constant}", "optimizer={name: muon, lr: 0.05}"),
        *("checkpoint={every: 1 steps, keep: 99}", "evaluate.every=2 steps"),
        *(f"evaluate.precise_bn_images={IMAGES}", "ensemble.soup=false", *changes),
    ]
    return create_run(folder, load_recipe("digits", settings))


def train(run: RunDir, *options: str) -> RunDir:
    assert worker.main([str(run.path), *options]) == 0
    return run


def saved(run: RunDir, step: int, name: str = MODEL) -> dict[str, Tensor]:
    return load_file(checkpoint_path(run.checkpoints, step) / name)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs of four steps, of which 2 and 4 are evaluated: precise, and stopped after 3; and not."""
    folder = tmp_path_factory.mktemp("precise")
    with pytest.MonkeyPatch.context() as patch:
        whole = start(folder / "whole", digits, patch)
        train(whole, "--stop-at", "3")
        train(whole)
        never = train(start(folder / "never", digits, patch, "evaluate.precise_bn=never"))
    return SimpleNamespace(whole=whole, never=never)


def test_training_s_own_statistics_and_all_else_stay_as_they_are(runs: Any) -> None:
    for step in range(1, 5):
        own, plain = saved(runs.whole, step), saved(runs.never, step)
        beside = checkpoint_path(runs.whole.checkpoints, step) / STATISTICS
        assert beside.exists() == (step % 2 == 0)  # where the step was evaluated
        if beside.exists():
            changed = {name for name, value in own.items() if not torch.equal(value, plain[name])}
            assert changed == {name for name in plain if "running" in name}
            own |= load_file(beside)
        assert_same(own, plain)
        assert_same(saved(runs.whole, step, OPTIMIZER), saved(runs.never, step, OPTIMIZER))
        assert not (checkpoint_path(runs.never.checkpoints, step) / STATISTICS).exists()


def test_statistics_are_the_means_over_the_first_training_images(runs: Any) -> None:
    """What the first normalisation sees of them, by the evaluated weights."""
    (member,) = find_members(runs.whole, "step-00000002")
    recipe, model, means, variances = member.recipe, member.build(), [], []
    name, first = averaged_layers(model)[0]

    def look(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        values = inputs[0].double().transpose(0, 1).flatten(1)
        means.append(values.mean(1))
        variances.append(values.var(1))

    first.register_forward_pre_hook(look)
    device = torch.device("cpu")
    augmenter = build_augmenter(recipe, len(member.classes), device)
    plan = BatchPlan(IMAGES, recipe.micro_batch, 0, 1, 0, 1)
    batches = training_batches(recipe, open_inputs(recipe), plan, augmenter.view, device)
    with torch.inference_mode():
        for batch in batches:
            model(augmenter.train(batch)[0])
    assert len(means) == IMAGES // recipe.micro_batch
    found = saved(runs.whole, 2)
    for kind, values in (("running_mean", means), ("running_var", variances)):
        torch.testing.assert_close(found[f"{name}.{kind}"], torch.stack(values).mean(0).float())


@pytest.mark.parametrize("member", ["cycle-01", "step-00000002"])
def test_what_is_kept_gives_the_number_that_was_recorded(
    runs: Any, digits: Path, member: str
) -> None:
    (kept,) = find_members(runs.whole, member)
    engine, recipe = open_engine("ddp", "fp32"), kept.recipe
    augmenter = build_augmenter(recipe, len(kept.classes), engine.device)
    index = open_index(digits / "val")
    logits = Evaluator(engine, augmenter, recipe).logits(kept.build(), index)
    step = 4 if member == "cycle-01" else 2
    records = [r for r in read_jsonl(runs.whole.metrics) if r["kind"] == "eval"]
    recorded = next(r for r in records if r["step"] == step)
    found = score(softmax(logits), index.label)
    assert (found["accuracy"], found["nll"]) == (recorded["accuracy"], recorded["nll"])
    if member == "cycle-01":
        summary = json.loads(runs.whole.summary.read_text())
        assert summary["val"]["members"][0]["nll"] == recorded["nll"]


def test_statistics_are_the_same_at_any_world_size(runs: Any) -> None:
    """Bit for bit: the sums of all ranks, in float64, are those of one."""
    (member,) = find_members(runs.whole, "cycle-01")
    recipe, inputs = member.recipe, open_inputs(member.recipe)
    device = torch.device("cpu")
    totals = []
    for world in (1, 3, 5):  # of which one has nothing to do
        parts: list[Tensor] = []

        def keep(vector: Tensor, parts: list[Tensor] = parts) -> Tensor:
            parts.append(vector.clone())
            return vector

        for rank in range(world):
            engine: Any = SimpleNamespace(rank=rank, world=world, device=device, sum=keep)
            precise_statistics(recipe, inputs, engine).recompute(member.build())
        totals.append(torch.stack(parts).sum(0))
    for total in totals[1:]:
        assert torch.equal(total, totals[0])


def test_images_that_grow_are_seen_at_their_last_size(digits: Path) -> None:
    """That of the evaluation, and not of step 0."""
    settings = [
        *(*SMALL, f"data.path={digits}", "data.image_size=16", "duration=4 steps"),
        *("global_batch=64", "micro_batch=32", "schedule={name: constant}"),
        "data.progressive={start: 8, until: 3 steps, multiple: 8}",
    ]
    recipe = load_recipe("digits", settings)
    inputs, engine = open_inputs(recipe), open_engine("ddp", "fp32")
    model, seen = nn.Sequential(nn.BatchNorm2d(1)), set()
    model.register_forward_pre_hook(lambda _, images: seen.add(tuple(images[0].shape)))
    assert inputs.sizes[0] == (0, 8)
    precise_statistics(recipe, inputs, engine).recompute(model, 64)
    assert seen == {(32, 1, 16, 16)}


def test_statistics_go_by_the_strength_of_each_class(digits: Path) -> None:
    """Also where they are made after the run, for a soup."""
    settings = [*SMALL, f"data.path={digits}", "micro_batch=32", "augment.jitter=null"]
    strong = "augment.ops=[{name: invert, p: 1.0}]"
    none = f"augment.class_strength={[0.0] * 10}"
    means = []
    for changes in ([], [strong, none]):
        recipe, model = load_recipe("digits", [*settings, *changes]), nn.BatchNorm2d(1)
        engine = open_engine("ddp", "fp32")
        precise_statistics(recipe, open_inputs(recipe), engine).recompute(model, 32)
        means.append(model.running_mean)
    assert torch.equal(means[0], means[1])


def test_the_own_statistics_come_back_even_after_an_error(runs: Any) -> None:
    (member,) = find_members(runs.never, "cycle-01")
    model, recipe, engine = member.build(), member.recipe, open_engine("ddp", "fp32")
    inputs = open_inputs(recipe)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail() -> None:
        with precise_statistics(recipe, inputs, engine).applied(model, 4, snapshot=True) as made:
            assert_same(made, running_statistics(model))
            assert not torch.equal(
                model.state_dict()["bn1.running_mean"], before["bn1.running_mean"]
            )
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fail()
    assert_same(dict(model.state_dict()), before)


def test_when_weights_are_evaluated_with_statistics_of_their_own() -> None:
    precise_at = {
        said: Evaluate(precise_bn=said).is_precise for said in ("auto", "always", "never")
    }
    assert [precise_at["auto"](step) for step in (1, 499, 500)] == [True, True, False]
    assert precise_at["always"](10**6)
    assert not precise_at["never"](1)


@pytest.mark.parametrize(
    ("every", "said", "epoch", "trained", "kept", "evaluated"),
    [
        ("1 epochs", "auto", 50_000, 50_000, 2048, 2048),
        ("1 epochs", "auto", 4096, 9000, 2048, 1024),
        ("2 epochs", "auto", 1078, 9000, 1078, 539),
        ("1 epochs", "auto", 1078, 9000, 1078, 512),
        ("1 epochs", "auto", 300, 9000, 300, 300),
        ("25 steps", "auto", 10_000, 30_000, 2048, 1600),
        ("6000 samples", "auto", 10**6, 10**5, 2048, 1500),
        ("1000 epochs", "auto", 4096, 4096, 2048, 1024),  # longer than the run: at its end
        ("10000 samples", "auto", 10**6, 256, 2048, 256),
        ("1 epochs", 8192, 4096, 9000, 4096, 4096),
        ("1 steps", 96, 4096, 9000, 96, 96),
    ],
)
def test_statistics_of_an_evaluation_cost_a_share_of_the_training_between(
    every: str, said: Any, epoch: int, trained: int, kept: int, evaluated: int
) -> None:
    config = Evaluate(every=every, precise_bn_images=said)
    assert config.precise_images(epoch) == kept
    assert config.evaluated_images(trained, 256, epoch) == evaluated


def test_the_share_is_that_of_the_batch_that_was_trained_on() -> None:
    """All that a snapshot may have; else a quarter, where batches grow and shrink."""
    first = "{batch: 1024, until: 8192 samples}"
    stages = f"{first}, {{batch: 256, until: 10240 samples}}, {{batch: 1024}}"
    recipe = load_recipe(
        "digits",
        [
            *("duration=24 steps", "micro_batch=64", "schedule={name: constant}"),
            *(f"global_batch={{name: stages, pieces: [{stages}]}}", "evaluate.every=4 steps"),
        ],
        say=None,
    )
    engine: Any = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), sum=lambda v: v)
    found = list[int]()

    def batches(recipe: Any, plan: BatchPlan) -> Any:
        assert isinstance(plan.global_batch, int)
        found.append(plan.global_batch)
        return iter([SimpleNamespace(pixels=torch.zeros(1))])

    augmenter: Any = SimpleNamespace(train=lambda batch: (torch.rand(2, 1, 2, 2), None))
    line = recipe.timeline(50_000)
    precise = PreciseBatchNorm(engine, recipe, augmenter, line, batches, KeptBatches(most=0))
    model = nn.Sequential(nn.BatchNorm2d(1))
    for step, snapshot in ((4, False), (12, False), (20, False), (20, True)):
        with precise.applied(model, step, snapshot=snapshot):
            pass
    assert found == [1024, 512, 1024, 2048]


def test_without_running_statistics_it_is_refused_where_it_is_asked_for(digits: Path) -> None:
    settings = [f"data.path={digits}", "model.name=test_vit", "evaluate.precise_bn=always"]
    model = nn.Linear(2, 2)
    with pytest.raises(UserError, match="test_vit keeps none; set it to auto or never"):
        check_precise(load_recipe("digits", settings), model)
    check_precise(load_recipe("digits", settings[:2]), model)
    pieces = "pieces: [{batch: 64, until: 1 epochs}, {batch: 128}], batch_norm: power"
    changing = ["schedule={name: constant}", f"global_batch={{name: stages, {pieces}}}"]
    with pytest.raises(UserError, match="test_vit keeps none; set it to none"):
        check_precise(load_recipe("digits", [*settings[:2], *changing], say=None), model)


def test_statistics_that_are_not_finite_are_said_and_do_not_stay() -> None:
    """An evaluation recorded scores of NaN, and its snapshot and checkpoint kept the statistics."""
    recipe = load_recipe("digits", ["global_batch=4", "micro_batch=4"])
    engine: Any = SimpleNamespace(
        rank=0, world=1, device=torch.device("cpu"), sum=lambda sums: sums
    )
    large = torch.linspace(-1e30, 1e30, 16).view(4, 1, 2, 2)  # their variance is no float32
    augmenter: Any = SimpleNamespace(train=lambda batch: (large, None))
    batches: Any = lambda recipe, plan: iter([SimpleNamespace(pixels=large)])  # noqa: E731
    none = KeptBatches(most=0)
    precise = PreciseBatchNorm(engine, recipe, augmenter, recipe.timeline(4), batches, none)
    model = nn.Sequential(nn.BatchNorm2d(1))
    before = {name: value.clone() for name, value in running_statistics(model).items()}
    refused = pytest.raises(UserError, match=r"after step 3 0\.running_var is not finite")
    with refused, precise.applied(model, 3, snapshot=False):
        raise AssertionError("evaluated")
    assert_same(dict(running_statistics(model)), before)
