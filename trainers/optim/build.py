"""From a recipe's optimizer to a torch optimizer, and the learning rate of each step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.configs import optimizers as c
from bigbatch.configs.errors import UserError
from bigbatch.trainers.optim.groups import decay_by_layer, hidden_matrices, parameter_groups
from bigbatch.trainers.optim.lamb import LAMB
from bigbatch.trainers.optim.lars import LARS
from bigbatch.trainers.optim.lbfgs import LBFGS
from bigbatch.trainers.optim.muon import Muon
from bigbatch.trainers.optim.stages import Learning
from bigbatch.trainers.optim.state import parameter_names


def build_optimizer(
    model: nn.Module, config: c.Optimizer, learning: Learning | None = None
) -> torch.optim.Optimizer:
    """The optimizer that a recipe names, over the trainable parameters of `model`.

    Norm layers and biases take neither weight decay nor a layer-wise rate. Each group keeps
    its rate as `base_lr`; `set_lr` multiplies it by the schedule's factor. So it keeps
    `base_betas` and `base_weight_decay`, where it has these, for `set_by_batch`. `learning` says
    what has another rate, and what begins to learn later (`Waiting` keeps it out). Raises UserError
    where `layer_decay` is asked of a model whose layers timm cannot order, where
    `weight_decay_of` names no layer, and where Muon finds no matrix.
    """
    decay = 0.0 if isinstance(config, c.SM3 | c.LBFGS) else config.weight_decay
    decays = decay_by_layer(model, getattr(config, "weight_decay_of", {}))
    learning = learning or Learning()
    if isinstance(config, c.Muon):
        optimizer: torch.optim.Optimizer = _build_muon(model, config, decays, learning)
    else:
        groups = parameter_groups(
            model, decay, config.layer_decay, decays, learning.factors, learning.starts
        )
        optimizer = _build(_with_rate(groups, config.lr), config)
    for group in optimizer.param_groups:
        for key in ("lr", "betas", "weight_decay"):
            if key in group:
                group[f"base_{key}"] = group[key]
    return optimizer


def _with_rate(groups: list[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
    return [group | {"lr": lr * group["lr_scale"]} for group in groups]


def _build_muon(
    model: nn.Module, config: c.Muon, decays: dict[nn.Parameter, float], learning: Learning
) -> Muon:
    """Muon over hidden matrices, and over the rest the optimizer that the recipe names for it."""
    hidden = hidden_matrices(model)
    if not hidden:
        raise UserError(
            f"optimizer muon: {type(model).__name__} has no linear layer or convolution to train "
            "but its classifier; choose another optimizer, such as lamb"
        )
    others = {p for p in model.parameters() if p not in hidden}
    decays = dict.fromkeys(others, config.rest.weight_decay) | decays
    groups = parameter_groups(
        model, config.weight_decay, config.layer_decay, decays, learning.factors, learning.starts
    )

    def of(chosen: set[nn.Parameter]) -> list[dict[str, Any]]:
        parts = [g | {"params": [p for p in g["params"] if p in chosen]} for g in groups]
        return [part for part in parts if part["params"]]

    rest = of(others)
    return Muon(
        _with_rate(of(hidden), config.lr),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        adjust_lr=config.adjust_lr,
        ns_steps=config.ns_steps,
        ns_precision=config.ns_precision,
        rest=_build(_with_rate(rest, config.rest.lr), config.rest) if rest else None,
    )


def _build(groups: list[dict[str, Any]], config: c.Optimizer) -> torch.optim.Optimizer:
    options: dict[str, Any] = config.model_dump(
        exclude={
            *("name", "weight_decay", "weight_decay_of", "layer_decay", "scale"),
            "momentum_schedule",
        }
    )
    # One pass over memory, on CPU and GPU, instead of one kernel for each operation.
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    match config:
        case c.LARS():
            return LARS(groups, **options)
        case c.LAMB():
            return LAMB(groups, **options)
        case c.SGD():
            return torch.optim.SGD(groups, **options, fused=fused)
        case c.Adam():
            return torch.optim.Adam(groups, **options, fused=fused)
        case c.AdamW():
            return torch.optim.AdamW(groups, **options, fused=fused)
        case c.Adagrad():
            return torch.optim.Adagrad(groups, **options)
        case c.Adadelta():
            return torch.optim.Adadelta(groups, **options)
        case c.RMSprop():
            return torch.optim.RMSprop(groups, **options)
        case c.Adafactor():
            return torch.optim.Adafactor(
                groups,
                lr=config.lr,
                beta2_decay=config.beta2_decay,
                d=config.clip_threshold,
            )
        case c.LBFGS():
            return LBFGS(
                [p for group in groups for p in group["params"]],  # it knows one group alone
                lr=config.lr,
                max_iter=config.max_iter,
                history_size=config.history,
                line_search_fn=None if config.line_search == "none" else config.line_search,
            )
        case c.Muon():
            raise AssertionError("it is made of two, by _build_muon")
        case c.NovoGrad() | c.SM3() | c.Lion():
            import pytorch_optimizer  # takes a second, which the others need not wait

            kind = getattr(pytorch_optimizer, type(config).__name__)
            optimizer: torch.optim.Optimizer = kind(groups, **options)
            return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr_multiplier: float) -> None:
    """Set each group's rate to `base_lr` times the schedule's value for the coming step.

    A rate held as a tensor is written in place, so that a captured graph sees it.
    """
    for group in optimizer.param_groups:
        lr = group["base_lr"] * lr_multiplier
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def set_momentum(optimizer: torch.optim.Optimizer, momentum: float) -> None:
    """Set the momentum of the coming step, for SGD, LARS and Muon (not for Muon's `rest`)."""
    for group in optimizer.param_groups:
        if group.get("use_muon", True):
            group["momentum"] = momentum


def trust_ratios(
    optimizer: torch.optim.Optimizer, model: nn.Module | Mapping[Tensor, str]
) -> dict[str, float]:
    """The last step's trust ratio of each adapted parameter, by name; {} for other optimizers.

    Reads the device once for each bucket, so call it when logging, not every step.
    """
    names = parameter_names(model)
    ratios = {}
    for params, values in getattr(optimizer, "last_ratios", []):
        for p, value in zip(params, values.tolist(), strict=True):
            ratios[names[p]] = value
    return ratios
