"""BatchNorm statistics against their definition."""

import pytest
import torch
from torch import nn

from bigbatch.trainers.models.batch_stats import StepStatistics, recompute_statistics


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, momentum=0.2), nn.ReLU())


def micro_batches(count):
    torch.manual_seed(1)
    return [torch.randn(8, 3, 6, 6) + i for i in range(count)]


def features(model, batch):
    """Mean and unbiased variance of what the BatchNorm layer sees, per channel."""
    values = model[0](batch).transpose(0, 1).flatten(1)
    return values.mean(1), values.var(1)


@torch.no_grad()
def run_step(models, batches):
    """One step with the micro-batches dealt out to `models`, as ranks would have them."""
    ranks = [StepStatistics(m) for m in models]
    for number, statistics in enumerate(ranks):
        statistics.begin()
        for batch in batches[number :: len(ranks)]:
            models[number](batch)
            statistics.add()
    total = torch.stack([s.local() for s in ranks]).sum(0)
    for statistics in ranks:
        statistics.finish(total, len(batches))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_running_statistics_move_once_a_step_towards_the_mean_over_all_micro_batches(model, world):
    batches = micro_batches(4)
    means, variances = zip(*(features(model, b) for b in batches), strict=True)
    models = [model] + [nn.Sequential(*(m(**k) for m, k in LAYERS)) for _ in range(world - 1)]
    for other in models[1:]:
        other.load_state_dict(model.state_dict())
    run_step(models, batches)
    for rank in models:
        expected = 0.8 * 0 + 0.2 * torch.stack(means).mean(0)
        torch.testing.assert_close(rank[1].running_mean, expected.detach())
        expected = 0.8 * 1 + 0.2 * torch.stack(variances).mean(0)
        torch.testing.assert_close(rank[1].running_var, expected.detach())
        assert rank[1].num_batches_tracked == 1  # steps, not forward passes


LAYERS = [
    (nn.Conv2d, {"in_channels": 3, "out_channels": 5, "kernel_size": 3}),
    (nn.BatchNorm2d, {"num_features": 5, "momentum": 0.2}),
    (nn.ReLU, {}),
]


def test_a_skipped_step_leaves_the_statistics_untouched(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    statistics = StepStatistics(model)
    statistics.begin()
    model(torch.full((8, 3, 6, 6), float("nan")))
    statistics.add()
    statistics.discard()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_recomputed_statistics_are_the_plain_mean_and_dropout_does_not_disturb_them(model):
    batches = micro_batches(3)
    means, variances = zip(*(features(model, b) for b in batches), strict=True)
    dropped = nn.Sequential(nn.Dropout(0.9), *model).eval()
    recompute_statistics(dropped, batches, 3, lambda total: total)
    torch.testing.assert_close(model[1].running_mean, torch.stack(means).mean(0).detach())
    torch.testing.assert_close(model[1].running_var, torch.stack(variances).mean(0).detach())
    assert not dropped.training
    assert model[1].momentum == 0.2


def test_a_model_without_batch_norm_needs_nothing():
    statistics = StepStatistics(nn.Linear(2, 2))
    statistics.begin()
    statistics.add()
    assert statistics.local().numel() == 0
    statistics.finish(torch.zeros(0), 1)
