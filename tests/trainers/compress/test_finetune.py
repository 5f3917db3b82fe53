"""Training a compressed network further: keyed, masked, and as the recipe says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bigbatch.configs.durations import parse
from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.trainers.compress.finetune import check_finetuning, finetune
from bigbatch.trainers.compress.pruning import magnitudes, masks_of, prunable, prune
from bigbatch.trainers.ensemble.members import Member, find_members
from bigbatch.trainers.models.batch_stats import StepStatistics
from bigbatch.trainers.planning.inputs import open_inputs
from tests.helpers.runs import untrained_run
from tests.trainers.compress.networks import state

CLASSES = tuple("0123456789")


@pytest.fixture(scope="module")
def member(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Member:
    folder = tmp_path_factory.mktemp("runs")
    small = ["global_batch=64", "micro_batch=32", "duration=30 steps"]
    small += ["schedule.name=cosine", "schedule.warmup=0 steps"]
    return find_members(untrained_run(folder / "a", digits, CLASSES, small, 1))[0]


def test_masked_weights_stay_zero_and_all_else_is_trained(member: Member) -> None:
    model = member.build()
    masks = masks_of(magnitudes(model), 0.7)
    network = prune(model, masks)
    before = state(network)
    finetune(network, member.recipe, open_inputs(member.recipe), parse("3 steps"), 0.1, masks)
    assert not network.training
    for name, weight in prunable(network).items():
        assert not weight[~masks[name]].any(), name
        assert not torch.equal(weight, before[name]), name
    assert not torch.equal(network.bn1.running_mean, before["bn1.running_mean"])
    assert StepStatistics(network).momentum[0] == 0.1  # which training sets to 1 meanwhile


def test_the_same_again_and_another_rate_is_another_network(member: Member) -> None:
    inputs, found = open_inputs(member.recipe), []
    for factor in (0.1, 0.1, 0.2):
        network = member.build()
        torch.rand(3)  # what was drawn before does not matter
        finetune(network, member.recipe, inputs, parse("2 steps"), factor)
        found.append(state(network))
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    assert not torch.equal(found[0]["fc.weight"], found[2]["fc.weight"])


def test_steps_go_on_where_the_recipe_ends(member: Member) -> None:
    """Samples, and the randomness of steps, follow the recipe's thirty steps."""
    from bigbatch.trainers.compress import finetune as module

    inputs, seen = open_inputs(member.recipe), []
    batches = module.training_batches

    def watch(*given: Any) -> object:
        for batch in batches(*given):
            seen.append((batch.step, batch.index, batch.samples.tolist()))
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "training_batches", watch)
        finetune(member.build(), member.recipe, inputs, parse("2 steps"), 0.1)
    assert [place[:2] for place in seen] == [(30, 0), (30, 1), (31, 0), (31, 1)]
    assert inputs.order is not None
    positions = np.arange(30 * 64, 32 * 64)
    assert [i for place in seen for i in place[2]] == inputs.order.samples(positions).tolist()


def test_divergence_is_one_error_with_a_remedy(member: Member) -> None:
    network = member.build()
    with pytest.raises(UserError, match=r"no finite gradient in step \d of 4; lower --finetune-lr"):
        finetune(network, member.recipe, open_inputs(member.recipe), parse("4 steps"), 1e30)


def test_what_cannot_be_gone_on_with_is_refused() -> None:
    recipe = load_recipe("digits", ["optimizer.name=lbfgs"])
    with pytest.raises(UserError, match="step by step, and lbfgs does not"):
        check_finetuning(recipe)
    apart = "{name: post_local, batch: 256, workers: 4, every: 2, start: 4 epochs}"
    recipe = load_recipe("digits", [f"global_batch={apart}", "optimizer=sgd"], say=None)
    with pytest.raises(UserError, match="post_local are rounds of several workers"):
        check_finetuning(recipe)
