"""One model of members' weights, from the command: barriers first, then the soup, with reasons."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bigbatch.configs.errors import UserError
from bigbatch.configs.rundir import RunDir
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.batch import BatchPlan
from bigbatch.data.index import open_index
from bigbatch.trainers.engine import Engine, open_engine
from bigbatch.trainers.ensemble.folder import open_ensemble, read_record
from bigbatch.trainers.ensemble.members import Member, find_members
from bigbatch.trainers.ensemble.soup import Barrier
from bigbatch.trainers.evaluation.evaluate import Evaluator
from bigbatch.trainers.evaluation.metrics import score, softmax
from bigbatch.trainers.inference import __main__ as entry
from bigbatch.trainers.inference import soup
from bigbatch.trainers.inference.soup import check_alike, make_soup
from bigbatch.trainers.job import training_batches
from bigbatch.trainers.models.batch_stats import averaged_layers
from bigbatch.trainers.planning.inputs import open_inputs
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import untrained_run

CLASSES = tuple("0123456789")
# A model without running statistics.
VIT = ("model.name=test_vit", "model.options={img_size: 16, patch_size: 8}", "data.image_size=16")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine("ddp", "fp32")


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return untrained_run(tmp_path_factory.mktemp("runs") / "a", digits, CLASSES, snapshots=3)


@pytest.fixture(scope="module")
def vit(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Member]:
    folder = tmp_path_factory.mktemp("runs") / "v"
    return find_members(untrained_run(folder, digits, CLASSES, VIT, snapshots=3))


def run_of(members: list[Member]) -> str:
    return str(members[0].weights.parents[2])


def scores_of(engine: Engine, member: Member, model: torch.nn.Module, data: Path) -> dict:
    recipe = member.recipe
    augmenter = Augmenter(
        recipe.augment, image_size=recipe.data.image_size, crop_fraction=1.0, classes=10, seed=0,
        device=engine.device,
    )  # fmt: skip
    index = open_index(data / "val")
    logits = Evaluator(engine, augmenter, recipe).logits(model, index)
    return score(softmax(logits), index.label.astype(np.int64))


def test_from_the_command_to_a_folder_of_one_model(
    vit: list[Member], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "e"
    arguments = ["--source", str(digits / "val"), "--report", str(digits / "test")]
    arguments = ["ensemble", run_of(vit), *arguments, "--soup", "greedy", "--out", str(out)]
    assert entry.main(arguments) == 0
    said = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["e"]
    record = read_record(out)
    made = record["soup"]
    best = max(made["members"], key=lambda m: m["accuracy"])["name"]
    assert made["steps"][0]["name"] == best
    assert {row["from"] for row in made["barriers"]} == {best}
    assert {best, *(row["to"] for row in made["barriers"])} == {m.name for m in vit}
    assert all(len(row["losses"]) == 5 and row["images"] == 120 for row in made["barriers"])
    assert said.index("loss barriers to") < said.index(f"soup takes {best}")
    for row in made["barriers"]:
        assert f"{row['to']}: {row['height']:.4f} nats" in said
    assert "* of samples that chose the soup" in said
    (member,) = open_ensemble([out]).members
    assert member.name == "soup"
    kept = [step["name"] for step in made["steps"] if step["kept"]]
    each = [load_file(m.weights) for m in vit if m.name in kept]
    for key, value in load_file(member.weights).items():
        mean = torch.stack([weights[key].double() for weights in each]).mean(0)
        torch.testing.assert_close(value, mean.float(), rtol=1e-6, atol=0)
    assert record["reported"]["samples"] == len(open_index(digits / "test"))


def test_a_uniform_soup_is_the_mean_with_statistics_of_its_own(
    engine: Engine, run: RunDir, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soup, "_IMAGES", 60)
    first, second = find_members(run)[:2]
    few = first.recipe.evaluate.model_copy(update={"precise_bn_images": 180})
    first = replace(first, recipe=first.recipe.model_copy(update={"evaluate": few}))
    index = open_index(digits / "val")
    member, record = make_soup(engine, [first, second], "uniform", index, tmp_path)
    assert record["barriers"][0]["images"] == 60
    one = load_file(member.weights)
    each = [load_file(member.weights) for member in find_members(run)[:2]]
    for key, value in one.items():
        mean = torch.stack([weights[key].double() for weights in each]).mean(0)
        if "running" in key:
            assert not torch.allclose(value, mean.float())
        elif value.is_floating_point():
            torch.testing.assert_close(value, mean.float(), rtol=1e-6, atol=0)
    # What the first normalisation sees of the training images, by the weights of the soup.
    model, recipe, seen = member.build(), member.recipe, []
    name, first = averaged_layers(model)[0]
    first.register_forward_pre_hook(
        lambda layer, inputs: seen.append(inputs[0].double().mean((0, 2, 3)))
    )
    augmenter = Augmenter(
        recipe.augment, image_size=32, crop_fraction=1.0, classes=10, seed=recipe.seed,
        device=engine.device,
    )  # fmt: skip
    inputs = open_inputs(recipe)
    plan = BatchPlan(3 * 64, 64, 0, 1, 0, 1)  # 180 images, in whole micro-batches
    with torch.inference_mode():
        for batch in training_batches(recipe, inputs, plan, augmenter.view, engine.device):
            model(augmenter.train(batch)[0])
    assert len(seen) == 3
    torch.testing.assert_close(one[f"{name}.running_mean"], torch.stack(seen).mean(0).float())


def test_a_barrier_is_what_the_line_says(
    engine: Engine, vit: list[Member], digits: Path, tmp_path: Path
) -> None:
    """Of a model without running statistics, and a split that is small enough to be seen whole."""
    said: list[str] = []
    _, record = make_soup(
        engine, vit[:2], "greedy", open_index(digits / "val"), tmp_path, say=said.append
    )
    alone = {m["name"]: m["accuracy"] for m in record["members"]}
    states = {m.name: load_file(m.weights) for m in vit}
    model = vit[0].build()
    for row in record["barriers"]:
        start, end = states[row["from"]], states[row["to"]]
        losses = []
        for t in np.linspace(0, 1, 5):
            between = {k: ((1 - t) * v.double() + t * end[k].double()) for k, v in start.items()}
            model.load_state_dict({k: v.float() for k, v in between.items()})
            losses.append(scores_of(engine, vit[0], model, digits)["nll"])
        np.testing.assert_allclose(row["losses"], losses, rtol=1e-5)
        above = np.array(losses) - np.linspace(losses[0], losses[-1], 5)
        assert row["height"] == pytest.approx(max(0, above.max()), abs=1e-5)
        assert alone[row["from"]] >= alone[row["to"]]
    assert said[0].startswith("loss barriers to v/cycle-0")
    assert sum(line.startswith("soup ") for line in said) == 2


def test_a_soup_of_equal_members_is_that_member(
    engine: Engine, vit: list[Member], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soup, "_IMAGES", 30)
    twins = [vit[0], Member("twin", vit[0].weights, vit[0].recipe, CLASSES)]
    for kind in ("greedy", "uniform"):
        made, record = make_soup(engine, twins, kind, open_index(digits / "val"), tmp_path)
        assert [row["height"] for row in record["barriers"]] == [0.0]
        own, kept = load_file(twins[0].weights), load_file(made.weights)
        assert all(torch.equal(own[key], kept[key]) for key in own)


# Fewer images than a real soup settles on: five micro-batches, which two and three ranks share.
FEW = """
import sys
from bigbatch.trainers.inference import __main__ as entry, soup
soup._IMAGES, soup._SETTLING = 70, 300
sys.exit(entry.main())
"""


@pytest.mark.slow
def test_any_number_of_ranks_makes_the_same_soup(run: RunDir, digits: Path, tmp_path: Path) -> None:
    program = tmp_path / "few.py"
    program.write_text(FEW)
    for world in (1, 2, 3):
        options = ["--source", str(digits / "val"), "--out", str(tmp_path / f"e{world}")]
        run_ranks(world, program, "ensemble", str(run.path), "--soup", "greedy", *options)
    one, *others = (load_file(tmp_path / f"e{w}/members/00.safetensors") for w in (1, 2, 3))
    record, *records = (read_record(tmp_path / f"e{w}")["soup"] for w in (1, 2, 3))
    for other in others:
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert records == [record, record]


@pytest.mark.parametrize(("height", "high"), [(0.57, False), (0.58, True)])
def test_a_quarter_of_the_loss_of_guessing_is_a_high_barrier(
    engine: Engine,
    vit: list[Member],
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    height: float,
    high: bool,
) -> None:
    ridge = Barrier((1.0, 1.0 + height, 1.0))
    monkeypatch.setattr(soup, "loss_barrier", lambda *line: ridge)
    said: list[str] = []
    index = open_index(digits / "val")
    make_soup(engine, vit[:2], "uniform", index, tmp_path, say=said.append)
    assert any("do not share a trunk" in line for line in said) == high


def test_weights_that_have_no_average_are_refused_by_name(
    run: RunDir, vit: list[Member], digits: Path, tmp_path: Path
) -> None:
    first = find_members(run)[0]
    small = [f"data.image_size={first.recipe.data.image_size + 8}"]
    others = (
        (find_members(untrained_run(tmp_path / "s", digits, CLASSES, small))[0], "image_size"),
        (find_members(untrained_run(tmp_path / "m", digits, CLASSES, ["augment.mean=[0.4]"]))[1],
         "mean"),
        (vit[1], "model"),
    )  # fmt: skip
    for other, what in others:
        with pytest.raises(UserError, match=rf"member {other.name} has another .*{what}"):
            check_alike([first, other])
    with pytest.raises(UserError, match="a soup of a/cycle-01 alone"):
        check_alike([first])
    dropping = ["model.options={drop_rate: 0.1}"]
    check_alike([first, find_members(untrained_run(tmp_path / "d", digits, CLASSES, dropping))[0]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--combine", "stack"], "a soup is one model, with nothing to combine"),
        (["--source", "TEST"], "the split 'test' would decide"),
        (["--members", "cycle-01"], "a soup of v/cycle-01 alone"),
    ],
)
def test_what_cannot_be_is_one_message_and_leaves_nothing(
    vit: list[Member],
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    given = ["--source", str(digits / "val"), "--out", str(tmp_path / "e"), "--soup", "greedy"]
    arguments = [argument.replace("TEST", str(digits / "test")) for argument in arguments]
    assert entry.main(["ensemble", run_of(vit), *given, *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert not said.out
    assert not list(tmp_path.iterdir())


def test_json_says_all_of_it(
    vit: list[Member], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--source", str(digits / "val"), "--out", str(tmp_path / "e"), "--margin", "0"]
    assert entry.main(["ensemble", run_of(vit), *given, "--soup", "uniform", "--json"]) == 0
    members = json.loads(capsys.readouterr().out)["soup"]["members"]
    best = max(m["accuracy"] for m in members)
    assert [m["within_margin"] for m in members] == [m["accuracy"] == best for m in members]
