"""BatchNorm statistics against their definition."""

import copy

import pytest
import torch
from timm.layers.evo_norm import EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2
from torch import nn

from bigbatch.configs.errors import UserError
from bigbatch.trainers.models.batch_stats import (
    StepStatistics,
    check_state,
    recompute_statistics,
)


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


def test_a_step_of_a_larger_batch_moves_statistics_as_several_steps(model):
    """Three times the batch, power 3: as three steps that see the same, each by 0.2."""
    (batch,) = micro_batches(1)
    mean, variance = (value.detach() for value in features(model, batch))
    statistics = StepStatistics(model)
    statistics.begin()
    model(batch)
    statistics.add()
    statistics.finish(statistics.local(), 1, power=3.0)
    for found, start, new in (
        (model[1].running_mean, 0, mean),
        (model[1].running_var, 1, variance),
    ):
        expected = torch.full_like(new, start)
        for _ in range(3):
            expected = 0.8 * expected + 0.2 * new
        torch.testing.assert_close(found, expected)
    assert model[1].num_batches_tracked == 1


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


def test_no_image_goes_through_a_model_without_statistics():
    def batches():
        pytest.fail("an image was asked for")
        yield

    recompute_statistics(nn.Linear(2, 2), batches(), 1, lambda total: pytest.fail("ranks waited"))


def test_a_model_without_batch_norm_needs_nothing():
    statistics = StepStatistics(nn.Linear(2, 2))
    statistics.begin()
    statistics.add()
    assert statistics.local().numel() == 0
    statistics.finish(torch.zeros(0), 1)


@pytest.mark.parametrize("kind", [EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evonorm_s_running_variance_is_averaged_like_batch_norm_s(kind, world):
    batches = micro_batches(4)
    variances = [b.transpose(0, 1).flatten(1).var(1) for b in batches]
    models = [nn.Sequential(kind(3, momentum=0.2)) for _ in range(world)]
    run_step(models, batches)
    expected = 0.8 * 1 + 0.2 * torch.stack(variances).mean(0)
    for rank in models:
        torch.testing.assert_close(rank[0].running_var, expected)
        assert torch.equal(rank[0].running_var, models[0][0].running_var)
    statistics = StepStatistics(models[0])
    statistics.begin()
    models[0](torch.full((8, 3, 6, 6), float("nan")))
    statistics.add()
    assert statistics.non_finite(statistics.local()) == ["0.running_var"]
    statistics.discard()
    torch.testing.assert_close(models[0][0].running_var, expected)


def test_statistics_that_are_not_finite_are_refused_at_the_start(model):
    statistics = StepStatistics(model)
    statistics.check()
    model[1].running_mean[2] = float("inf")
    with pytest.raises(UserError, match=r"^1.running_mean of the model is not finite \(1 of 2"):
        statistics.check()


class Odd(nn.Module):
    """State of several kinds that a forward pass changes; `kind` says which."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.trained = nn.Embedding(3, 2)
        self.table = copy.deepcopy(self.trained).requires_grad_(False)
        self.register_buffer("cache", torch.zeros(0), persistent=False)
        self.register_buffer("counter", torch.tensor(0))
        self.register_buffer("average", torch.full((2,), float("nan")), persistent=False)

    def forward(self, x):
        if self.kind == "counter":
            self.counter += 1
        if self.kind == "average":
            self.average.copy_(x.mean((0, 2, 3))[:2])
        if self.kind == "frozen weight":
            self.table.weight.lerp_(self.trained.weight, 0.1)
        if self.kind == "initialised by data" and self.counter == 0:
            self.counter += 1
            self.average.copy_(x.mean((0, 2, 3))[:2])
        if self.kind == "cache" and self.cache.numel() == 0:
            self.cache = torch.arange(x.shape[-1])
        return x


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("counter", "1.counter"),
        ("average", "1.average"),
        ("frozen weight", "1.table.weight"),
        ("initialised by data", "1.average"),
    ],
)
def test_state_that_a_forward_pass_changes_is_found(kind, name):
    model = nn.Sequential(nn.BatchNorm2d(3), Odd(kind))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=f"^{name} of the model .* changes in a forward pass"):
        check_state(model, lambda m, x: m(x), micro_batches(1)[0])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    "layer",
    [
        Odd("cache"),
        Odd(None),  # frozen weights and buffers that stay: the pass is made
        nn.utils.parametrizations.orthogonal(nn.Conv2d(3, 3, 1)),
        EvoNorm2dB0(3),
        nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3), nn.SyncBatchNorm(3).eval()),
    ],
)
def test_what_training_leaves_alone_or_averages_is_let_through(layer):
    images = micro_batches(1)[0]
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    stream = torch.get_rng_state()
    check_state(layer, lambda m, x: m(x), images)
    assert torch.equal(torch.get_rng_state(), stream)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


def test_no_pass_is_made_where_nothing_could_change():
    def forward(model, images):
        raise AssertionError

    check_state(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), forward, torch.zeros(1))
    check_state(Odd(None).to("meta"), forward, torch.zeros(1))
