"""SAM and ASAM against their equations, and the loop's step with them on any number of ranks."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.regularise import ASAM, SAM
from bigbatch.trainers.engine.ddp import DdpEngine
from bigbatch.trainers.engine.sharpness import Sharpness
from bigbatch.trainers.models.batch_stats import StepStatistics
from bigbatch.trainers.optim import build_optimizer

SGD = load_recipe("digits", ["optimizer={name: sgd, lr: 0.1}"]).optimizer
CONFIGS = {"sam": SAM(name="sam", rho=0.3), "asam": ASAM(name="asam", rho=0.7, eta=0.05)}


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(dropout), nn.Linear(5, 2)]
    return nn.Sequential(*layers).double()


def draw(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(8, 3, generator=generator).double(), torch.arange(8) % 2


def gradient_at_the_top(model: nn.Module, x: Tensor, y: Tensor, config: Any) -> list[Tensor]:
    """The papers' equations with a functional model: no weight is changed."""

    def loss(values: dict[str, Tensor]) -> Tensor:
        state = {k: v.clone() for k, v in model.named_buffers()}
        return nn.functional.cross_entropy(
            torch.func.functional_call(model, values | state, (x,)), y
        )

    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    slope = torch.func.grad(loss)(weights)
    one = {name: torch.ones_like(w) for name, w in weights.items()}
    if isinstance(config, ASAM):
        one = {k: w.abs() + config.eta if "weight" in k else one[k] for k, w in weights.items()}
    length = sum(((one[k] * g) ** 2).sum() for k, g in slope.items()) ** 0.5
    top = {k: w + config.rho * one[k] ** 2 * slope[k] / length for k, w in weights.items()}
    return list(torch.func.grad(loss)(top).values())


def one_step(model: nn.Module, config: Any, batches: list[tuple[Tensor, Tensor]]) -> DdpEngine:
    """The loop's own order of calls."""
    engine = DdpEngine("fp32", "exact")
    engine.prepare(model, build_optimizer(model, SGD), len(batches))
    statistics, sharpness = StepStatistics(model), Sharpness(config, model)
    engine.zero_grad()
    statistics.begin()
    for number, (x, y) in enumerate(batches):
        torch.manual_seed(number)
        sharpness.climb(nn.functional.cross_entropy(engine.module(x), y))
        statistics.add()
        torch.manual_seed(number)
        with engine.micro_batch(last=number == len(batches) - 1):
            engine.backward(nn.functional.cross_entropy(engine.model(x), y))
        sharpness.descend()
    engine.reduce()
    statistics.finish(statistics.local(), len(batches))
    return engine


@pytest.mark.parametrize("name", CONFIGS)
def test_each_micro_batch_climbs_by_its_own_gradient(name: str) -> None:
    batches = [draw(1), draw(2), draw(3)]
    model, reference = network(), network()
    tops = [gradient_at_the_top(reference, x, y, CONFIGS[name]) for x, y in batches]
    one_step(model, CONFIGS[name], batches)
    for parameter, *gradients in zip(model.parameters(), *tops, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, sum(gradients) / 3, rtol=1e-6, atol=1e-9)
    for here, there in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(here, there)  # back where they were, bit for bit


def test_running_statistics_are_those_of_the_weights_themselves() -> None:
    """Not those of the weights that a micro-batch climbed to, which nothing is evaluated with."""
    batches = [draw(1), draw(2)]
    model, reference = network(), network()
    one_step(model, CONFIGS["sam"], batches)
    inner = [reference[0](x) for x, _ in batches]  # type: ignore[index]
    mean = sum(h.mean(0) for h in inner) / 2
    torch.testing.assert_close(model[1].running_mean, 0.1 * mean)  # type: ignore[index]
    assert int(model[1].num_batches_tracked) == 1  # type: ignore[index]


def test_both_passes_drop_the_same_units() -> None:
    """At rho towards 0 the second pass is the first: with other masks it would not be."""
    (x, y), tiny = draw(1), SAM(name="sam", rho=1e-9)
    model, plain = network(0.5), network(0.5)
    one_step(model, tiny, [(x, y)])
    torch.manual_seed(0)
    nn.functional.cross_entropy(plain(x), y).backward()
    for here, there in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(here.grad, there.grad, rtol=1e-5, atol=1e-7)


def test_a_flat_place_has_no_way_up() -> None:
    layer = nn.Linear(2, 2)
    before = layer.weight.clone()
    sharpness = Sharpness(CONFIGS["sam"], layer)
    sharpness.climb((layer(torch.zeros(1, 2)) * 0).sum())
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("backend=zero2", "sharpness needs whole gradients, which backend: zero2 cuts apart"),
        ("precision=fp16", "gradients without a loss scale"),
        ("optimizer={name: lbfgs, lr: 1}", "changes weights between the passes"),
    ],
)
def test_where_it_would_not_be_exact_it_is_refused(change: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_recipe("digits", ["regularise.sharpness={name: sam}", "clip=null", change])
