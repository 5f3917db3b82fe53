"""Monte Carlo dropout: a batch's logits are a function of member, batch, look and pass alone."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bigbatch.configs.errors import UserError
from bigbatch.data.index import Index, open_index, some_samples
from bigbatch.data.rng import key64
from bigbatch.trainers.engine import Engine, open_engine
from bigbatch.trainers.ensemble.combination import log_softmax
from bigbatch.trainers.ensemble.members import Member, find_members
from bigbatch.trainers.inference import __main__ as entry
from bigbatch.trainers.inference.cost import cost_of
from bigbatch.trainers.inference.forward import Forward
from bigbatch.trainers.monitoring.flops import flops_per_image, forward_flops
from tests.helpers.runs import untrained_run

CLASSES = tuple("0123456789")
SIZES = "img_size: 32, patch_size: 16"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine("ddp", "fp32")


@pytest.fixture(scope="module")
def members(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Member]:
    """Of the digits recipe, whose network drops by a function, and has running statistics."""
    run = untrained_run(tmp_path_factory.mktemp("runs") / "a", digits, CLASSES)
    return find_members(run)


@pytest.fixture(scope="module")
def few(digits: Path) -> Index:
    return some_samples(open_index(digits / "val"), np.arange(70))


def logits_of(engine: Any, members: list[Member], index: Index, **options: Any) -> list[np.ndarray]:
    """Of each batch of a rank, with its number."""
    forward = Forward(engine, members, batch=16, **options)
    return [(outputs.number, outputs.logits) for outputs in forward.outputs(index)]


def as_rank(engine: Engine, rank: int, world: int) -> Any:
    return SimpleNamespace(rank=rank, world=world, device=engine.device, autocast=engine.autocast)


def test_passes_are_averaged_in_probability(
    engine: Engine, members: list[Member], few: Index
) -> None:
    member = members[0]
    seen: list[torch.Tensor] = []
    forward = Forward(engine, [member], batch=16)
    forward._loaded[0].model.register_forward_pre_hook(lambda m, x: seen.append(x[0].clone()))
    list(forward.outputs(few))
    model = member.build()
    model.training = True  # the functional dropout of the head looks at nothing else
    for (number, found), images in zip(
        logits_of(engine, [member], few, mc_dropout=3), seen, strict=True
    ):
        passes = []
        for one in range(3):
            torch.manual_seed(key64("mc-dropout", member.name, 0, number, 0, one))
            with torch.inference_mode():
                passes.append(log_softmax(model(images).numpy()))
        assert len({p.tobytes() for p in passes}) == 3
        mean = np.log(np.mean(np.exp(passes), axis=0))
        np.testing.assert_allclose(log_softmax(found[0]), mean, atol=1e-6)


def test_neither_rank_nor_order_nor_other_members_change_a_bit(
    engine: Engine, members: list[Member], few: Index
) -> None:
    whole = logits_of(engine, members, few, mc_dropout=2, tta="five")
    ranks = [logits_of(as_rank(engine, r, 2), members, few, mc_dropout=2, tta="five")
             for r in (1, 0)]  # fmt: skip
    together = dict(ranks[0] + ranks[1])
    assert len(whole) == len(together) == 5
    turned = dict(logits_of(engine, members[::-1], few, mc_dropout=2, tta="five"))
    for number, found in whole:
        assert np.array_equal(found, together[number])
        assert np.array_equal(found, turned[number][::-1])
    assert not np.array_equal(whole[0][1], dict(logits_of(engine, members, few, tta="five"))[0])


def test_running_statistics_and_the_callers_random_numbers_stay(
    engine: Engine, members: list[Member], few: Index
) -> None:
    forward = Forward(engine, members[:1], batch=16, mc_dropout=2)
    model = forward._loaded[0].model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(1)
    stream = torch.rand(3)
    torch.manual_seed(1)
    list(forward.outputs(few))
    assert torch.equal(torch.rand(3), stream)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("option", ["drop_path_rate", "attn_drop_rate", "proj_drop_rate"])
def test_stochastic_depth_and_dropped_attention_count(
    engine: Engine, digits: Path, few: Index, tmp_path: Path, option: str
) -> None:
    options = f"model.options={{{SIZES}, {option}: 0.5}}"
    run = untrained_run(tmp_path / "v", digits, CLASSES, ["model.name=test_vit", options])
    (_, dropped), *_ = logits_of(engine, find_members(run), few, mc_dropout=1)
    (_, plain), *_ = logits_of(engine, find_members(run), few)
    assert not np.allclose(dropped, plain)


def test_a_model_that_drops_nothing_is_refused(
    engine: Engine, digits: Path, few: Index, tmp_path: Path
) -> None:
    run = untrained_run(tmp_path / "dry", digits, CLASSES, ["model.options.drop_rate=0"])
    with pytest.raises(UserError, match="member dry/cycle-01 drops nothing in training"):
        logits_of(engine, find_members(run), few, mc_dropout=2)


def test_the_command_says_passes_and_cost(
    members: list[Member], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(members[0].weights.parents[2]), "--source", str(digits / "val")]
    given += ["--mc-dropout", "2"]
    assert (
        entry.main(["evaluate", *given, "--members", "cycle-01", "--tta", "scales", "--json"]) == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert (result["mc_dropout"], result["tta"]) == (2, "scales")
    cost, recipe = result["cost"], members[0].recipe
    own = forward_flops(recipe, 10, recipe.eval_size)
    assert cost["flops_per_image"] == 2 * 3 * own
    assert flops_per_image(recipe, 10) == 3 * own
    assert cost["parameters"] == sum(p.numel() for p in members[0].build().parameters())
    assert cost["images_per_s"] * cost["seconds"] == pytest.approx(120, rel=0.02)
    assert cost["peak_memory"] > 2**20
    assert (cost["ranks"], cost["device"]) == (1, "cpu")
    assert entry.main(["ensemble", *given, "--out", str(tmp_path / "e")]) == 2
    assert "--mc-dropout: an ensemble is fitted on plain looks" in capsys.readouterr().err


def test_costs_add_up(
    engine: Engine, members: list[Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = cost_of(Forward(engine, members[:1]), 100, 4.0)
    both = cost_of(Forward(engine, members), 100, 4.0)
    assert both["flops_per_image"] == 2 * one["flops_per_image"]
    assert both["parameters"] == 2 * one["parameters"]
    assert both["images_per_s"] == 25
    monkeypatch.setattr("bigbatch.trainers.inference.cost.forward_flops", lambda *a: None)
    assert cost_of(Forward(engine, members), 100, 4.0)["flops_per_image"] is None
