"""One linear head on the features of all members, as one model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import change_recipe
from bigbatch.configs.rundir import RunDir
from bigbatch.data.index import open_index
from bigbatch.trainers.engine import Engine, open_engine
from bigbatch.trainers.ensemble.fit import fit_joined
from bigbatch.trainers.ensemble.folder import open_ensemble, read_record
from bigbatch.trainers.ensemble.held_out import FitData, fold_of
from bigbatch.trainers.ensemble.members import Member, find_members
from bigbatch.trainers.inference import __main__ as entry
from bigbatch.trainers.inference.forward import Forward
from bigbatch.trainers.inference.joined import check_joinable, fit_head
from bigbatch.trainers.models.joined import WHY, Joined, join
from bigbatch.trainers.optim.groups import linear_classifier
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import untrained_run

CLASSES = tuple("0123456789")
MODULE = Path(__file__).parents[3] / "trainers" / "inference" / "__main__.py"
VIT = ("model.name=test_vit", "model.options={img_size: 32, patch_size: 8}")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine("ddp", "fp32")


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    """A ResNet and a ViT."""
    folder = tmp_path_factory.mktemp("runs")
    size = "data.image_size=32"
    return [
        untrained_run(folder / "r", digits, CLASSES, [size], snapshots=1),
        untrained_run(folder / "v", digits, CLASSES, [size, *VIT], snapshots=1, seed=3),
    ]


@pytest.fixture(scope="module")
def members(runs: list[RunDir]) -> list[Member]:
    return [member for run in runs for member in find_members(run)]


def test_the_model_is_a_head_on_what_the_classifiers_took(members: list[Member]) -> None:
    networks = [member.build() for member in members]
    images = torch.randn(5, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    taken: list[Tensor] = []
    for network in networks:
        linear_classifier(network, WHY)[1].register_forward_pre_hook(
            lambda _, inputs: taken.append(inputs[0])
        )
        network(images)
    trees = [member.recipe.model.network() for member in members]
    joined = Joined(10, 1, trees, 32).eval()
    assert joined.widths == [t.shape[1] for t in taken]
    weight = torch.randn(10, sum(joined.widths), generator=torch.Generator().manual_seed(1))
    bias = torch.arange(10.0)
    join(networks, joined, weight, bias)
    with torch.inference_mode():
        found = joined(images)
    wanted = torch.cat(taken, 1).double() @ weight.double().T + bias.double()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_features_of_members_stand_side_by_side(
    engine: Engine, members: list[Member], digits: Path
) -> None:
    index = open_index(digits / "val")
    found = Forward(engine, members, batch=64, features=True).gathered(index)
    assert found is not None
    logits, features = found
    both = Forward(engine, members, batch=64).logits(index)
    assert np.array_equal(logits, both)
    at = 0
    for place, member in enumerate(members):
        _, head = linear_classifier(member.build(), WHY)
        own = torch.from_numpy(features[:, at : at + head.in_features])
        at += head.in_features
        wanted = (own @ head.weight.T + head.bias).detach().numpy()
        np.testing.assert_allclose(wanted, logits[place], rtol=1e-4, atol=1e-4)
    assert at == features.shape[1]


def test_no_sample_is_judged_by_a_head_that_saw_it() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 3
    features = generator.normal(size=(60, 4)).astype(np.float32)
    features[np.arange(60), labels] += 1.5
    keys = [f"k{i}" for i in range(60)]
    data = FitData(np.zeros((2, 60, 3), np.float32), labels, keys, "val")
    weight, bias, own = fit_head(features, data, 4, 0)
    whole = fit_joined(features, data, 4, 0)
    assert np.array_equal(weight.numpy(), whole[0])
    assert np.array_equal(bias.numpy(), whole[1])
    fold = fold_of(data, 4, 0)
    for number in range(4):
        rest = np.flatnonzero(fold != number)
        part = FitData(data.logits[:, rest], labels[rest], [keys[i] for i in rest], "val")
        a, b = fit_joined(features[rest], part, 4, 0)
        outside = fold == number
        np.testing.assert_allclose(own[0, outside], features[outside] @ a.T + b, rtol=1e-5)


def command(runs: list[RunDir], digits: Path, out: Path, *more: str) -> list[str]:
    sources = ["--source", str(digits / "val"), "--report", str(digits / "test")]
    paths = [str(run.path) for run in runs]
    return ["ensemble", *paths, *sources, "--combine", "features", "--out", str(out), *more]


def test_from_the_command_to_a_folder_of_one_model(
    engine: Engine,
    runs: list[RunDir],
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert entry.main(command(runs, digits, tmp_path / "e", "--folds", "3")) == 0
    assert "out of fold" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["e"]
    record = read_record(tmp_path / "e")
    assert record["method"] == "features"
    assert [m["name"] for m in record["joined"]["members"]] == ["r/cycle-01", "v/cycle-01"]
    ensemble = open_ensemble([tmp_path / "e"])
    index = open_index(digits / "test")
    logits = Forward(engine, ensemble.members).logits(index)
    assert logits is not None
    accuracy = float((logits[0].argmax(1) == index.label).mean())
    # Weights that nobody trained: their features tell digits apart, their own heads do not.
    assert accuracy > 0.5
    assert record["candidates"] == ["joined"]


@pytest.mark.slow
def test_any_number_of_ranks_makes_the_same(
    runs: list[RunDir], digits: Path, tmp_path: Path
) -> None:
    for world in (1, 2):
        run_ranks(world, MODULE, *command(runs, digits, tmp_path / f"{world}", "--folds", "3"))
    files = [tmp_path / f"{w}" / "members" / "00.safetensors" for w in (1, 2)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_cannot_be_joined_is_named(members: list[Member]) -> None:
    resnet, vit = members
    with pytest.raises(UserError, match="joins those of several members, and r/cycle-01 is alone"):
        check_joinable([resnet])
    recipe = change_recipe(vit.recipe, ["augment.mean=[0.9]"])
    other = Member("other", vit.weights, recipe, vit.classes)
    with pytest.raises(UserError, match="member other has another mean than r/cycle-01"):
        check_joinable([resnet, other])
    check_joinable(members)
    with pytest.raises(UserError, match="needs a model whose logits are one linear layer's"):
        linear_classifier(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1)), WHY)


def test_no_margin(runs: list[RunDir], digits: Path, tmp_path: Path,
                   capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    assert entry.main(command(runs, digits, tmp_path / "e", "--margin", "0.1")) == 2
    assert "a head on features takes all members" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
