"""Fresh weights by a recipe's `model.init`: each from the seed and its parameter's name alone."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bigbatch.configs import init as options
from bigbatch.configs.errors import UserError
from bigbatch.data.rng import key64
from bigbatch.trainers.optim.groups import linear_classifier

Fill = Callable[..., Any]  # a function of torch.nn.init: a tensor, and generator=


def initialise(
    model: nn.Module,
    config: options.Init,
    seed: int,
    name: str,
    head_prior: Tensor | None = None,
) -> None:
    """Draw what `config` names anew; the rest stays as the model made it.

    Weights are drawn on the CPU, in float32, each by a generator of its own: neither the order of
    construction, nor the rank, nor the device matters. On the meta device nothing happens.
    `head_prior` is the classifier's bias [C] of `prior_bias`. Raises UserError where the model has
    no place for what is asked.
    """
    if any(p.is_meta for p in model.parameters()):
        return
    layers = list(_layers(model))
    if (config.weights is not None or config.bias is not None) and not layers:
        raise UserError(f"model.init: {name} has neither convolutions nor linear layers")
    for path, layer in layers:
        if config.weights is not None:
            _draw(layer.weight, filling(config.weights), seed, f"{path}.weight")
        if config.bias is not None and layer.bias is not None:
            nn.init.constant_(layer.bias, config.bias)
    if config.zero_gamma:
        lrn = any(isinstance(m, nn.LocalResponseNorm) for m in model.modules())
        if lrn or not _zero_last_norms(model):
            why = "norms without weights" if lrn else "no residual blocks that name their last norm"
            raise UserError(
                f"model.init.zero_gamma: {name} has {why}; it fits timm's blocks with "
                "zero_init_last(), and torchvision's ResNets; leave it out"
            )
    if config.head_prior:
        _, head = linear_classifier(model, f"model.init.head_prior of {name}")
        if head.bias is None:
            raise UserError(f"model.init.head_prior: the classifier of {name} has no bias")
        assert head_prior is not None
        with torch.no_grad():
            head.bias.copy_(head_prior)


def prior_bias(class_counts: Sequence[int], sigmoids: bool) -> Tensor:
    """Logits that give each class its share p of the samples, float64 [C]: log p by a softmax,
    log p - log(1 - p) by a sigmoid for each class. A class without samples counts as with one.
    """
    counts = torch.as_tensor(class_counts, dtype=torch.float64).clamp(min=1)
    share = counts / counts.sum()
    return torch.logit(share) if sigmoids else share.log()


def filling(config: options.Weights) -> Fill:
    """The function of torch.nn.init that a scheme is, its numbers included."""
    match config:
        case options.Normal():
            return partial(nn.init.normal_, std=config.std)
        case options.Uniform():
            bound = 3**0.5 * config.std
            return partial(nn.init.uniform_, a=-bound, b=bound)
        case options.TruncatedNormal():
            reach = 2 * config.std
            return partial(nn.init.trunc_normal_, std=config.std, a=-reach, b=reach)
        case options.Xavier():
            xavier = {"normal": nn.init.xavier_normal_, "uniform": nn.init.xavier_uniform_}
            return partial(xavier[config.distribution], gain=config.gain)
        case options.He():
            he = {"normal": nn.init.kaiming_normal_, "uniform": nn.init.kaiming_uniform_}
            return partial(
                he[config.distribution],
                a=config.slope,
                mode="fan_in" if config.fan == "in" else "fan_out",
                nonlinearity=config.nonlinearity,
            )
        case options.Orthogonal():
            return partial(nn.init.orthogonal_, gain=config.gain)


def _draw(weight: Tensor, fill: Fill, seed: int, name: str) -> None:
    generator = torch.Generator().manual_seed(key64(seed, "init", name))
    value = torch.empty(weight.shape)
    fill(value, generator=generator)
    with torch.no_grad():
        weight.copy_(value)


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        if isinstance(module, _ConvNd | nn.Linear):
            yield path, module


def _zero_last_norms(model: nn.Module) -> int:
    """Set what scales each residual branch last, by timm's or torchvision's word, to 0."""
    from torchvision.models.resnet import BasicBlock, Bottleneck

    count = 0
    for module in model.modules():
        zero = getattr(module, "zero_init_last", None)
        if isinstance(module, BasicBlock | Bottleneck):
            last: Any = module.bn2 if isinstance(module, BasicBlock) else module.bn3
            nn.init.zeros_(last.weight)
        elif callable(zero):
            zero()
        else:
            continue
        count += 1
    return count
