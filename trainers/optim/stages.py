"""The stages of a network, and what each learns when it starts from trained weights.

A stage is what timm's group_matcher(coarse=True) groups; of a model without it, a part of the
network in the order in which it was built.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn

from bigbatch.configs import transfer as c
from bigbatch.configs.errors import UserError
from bigbatch.configs.schema import Recipe
from bigbatch.trainers.optim.groups import classifiers, is_norm, named_layers
from bigbatch.trainers.planning.unfreezing import start_of

NEVER = math.inf  # the start of what stays as it is
_FEW = 3  # composed parts of a model that are its stages; with fewer, the largest one is opened


@dataclass(frozen=True)
class Stage:
    """Parameters, by name, that are frozen and unfrozen together."""

    name: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Learning:
    """What learns of a network, from which step on, and at which rate; all by parameter name.

    `starts` are finished steps, NEVER of what is frozen for good; `factors` multiply the rate.
    """

    stages: tuple[Stage, ...] = ()  # from the lowest to the head
    starts: Mapping[str, float] = field(default_factory=dict)  # 0 where it says nothing
    factors: Mapping[str, float] = field(default_factory=dict)  # 1 where it says nothing

    def frozen(self, step: int) -> set[str]:
        """What has not begun to learn after `step` finished steps."""
        return {name for name, start in self.starts.items() if step < start}

    def begun(self, step: int) -> list[str]:
        """The stages that begin to learn with this step, and not with the run."""
        return [
            stage.name
            for stage in self.stages
            if any(self.starts.get(name) == step for name in stage.parameters) and step > 0
        ]


def learning_of(
    config: c.Transfer, model: nn.Module, begin: Callable[[int], int], total_steps: int
) -> Learning:
    """What a transfer comes to for a network.

    `begin` gives the step at which the k-th stage from the top begins to learn, of a run of
    `total_steps`. Raises UserError where the network has no such stages or layers, or where one
    would begin only after the run.
    """
    stages = stages_of(model)
    names = {name for stage in stages for name in stage.parameters}
    starts: dict[str, float] = {}
    match config:
        case c.Head():
            head = _names_of(model, _classifiers(model))
            starts = dict.fromkeys(names - head, NEVER)
        case c.Frozen():
            lowest = _lowest(config.stages or 0, stages, "transfer.stages")
            chosen = [_matched(layer, model, stages, "transfer.layers") for layer in config.layers]
            starts = dict.fromkeys(set().union(lowest, *chosen), NEVER)
        case c.Gradual():
            for number, stage in enumerate(reversed(stages[config.stages :])):
                starts |= dict.fromkeys(stage.parameters, float(begin(number)))
            starts |= dict.fromkeys(_lowest(config.stages, stages, "transfer.stages"), NEVER)
            _check_ends(config, stages, begin, total_steps)
    if names <= {name for name, start in starts.items() if start == NEVER}:
        raise UserError(
            f"transfer = {config.name} freezes all of {type(model).__name__}; leave some of it out"
        )
    return Learning(tuple(stages), starts, _factors(config, model, stages))


def fit_transfer(recipe: Recipe, model: nn.Module, epoch_samples: int) -> Learning:
    """What a recipe's transfer comes to for its network, in epochs of so many samples."""
    config, line = recipe.transfer, recipe.timeline(epoch_samples)
    if config is None:
        return Learning()

    def begin(number: int) -> int:
        assert isinstance(config, c.Gradual)
        return start_of(number, config.every, line)

    learning = learning_of(config, model, begin, line.steps(recipe.duration))
    _check_watched(recipe, model, module_starts(model, learning))
    return learning


def _check_watched(recipe: Recipe, model: nn.Module, starts: Mapping[nn.Module, float]) -> None:
    """Raise UserError where something works on a layer in training, and that stands frozen."""
    hint = None if recipe.distill is None else recipe.distill.hint
    layer = dict(model.named_modules()).get(hint.layer) if hint is not None else None
    if hint is not None and layer in starts:
        raise UserError(
            f"distill.hint.layer = {hint.layer} is frozen at first, by transfer: there is nothing "
            "to be learned from it; name a layer that learns from the start, or leave hint out"
        )
    own = recipe.regularise
    asked = {
        f"loss {recipe.loss.name}": recipe.loss.name in ("center", "large_margin"),
        "regularise.drop_connect": own.drop_connect > 0,
        "regularise.input_noise": own.input_noise > 0,
    }
    found = [what for what, there in asked.items() if there]
    if found and any(module in starts for module in _classifiers(model)):
        raise UserError(
            f"{' and '.join(found)} works on the classifier while it trains, and transfer.layers "
            "freezes it; leave one of them out"
        )


def _check_ends(
    config: c.Gradual, stages: Sequence[Stage], begin: Callable[[int], int], total: int
) -> None:
    number = len(stages) - config.stages - 1
    if begin(number) >= total:
        late = [s.name for k, s in enumerate(reversed(stages)) if k <= number]
        late = [name for k, name in enumerate(late) if begin(k) >= total]
        raise UserError(
            f"transfer.every = {config.every}: {', '.join(late)} would begin to learn after the "
            f"run's {total:,} steps; shorten every, train longer, or keep so many frozen by "
            f"transfer.stages={config.stages + len(late)}"
        )


def _lowest(count: int, stages: Sequence[Stage], key: str) -> set[str]:
    if count >= len(stages):
        raise UserError(
            f"{key} = {count}: there are {len(stages)} stages, "
            f"{', '.join(stage.name for stage in stages)}; give at most {len(stages) - 1}"
        )
    return {name for stage in stages[:count] for name in stage.parameters}


def _factors(config: c.Transfer, model: nn.Module, stages: Sequence[Stage]) -> dict[str, float]:
    if isinstance(config, c.Head):
        return {}
    found: dict[str, float] = {}
    for depth, stage in enumerate(reversed(stages)):
        found |= dict.fromkeys(stage.parameters, config.stage_decay**depth)
    own: dict[str, float] = {}
    for layer, factor in config.rates.items():
        own |= dict.fromkeys(_matched(layer, model, stages, "transfer.rates"), factor)
    for name, factor in own.items():
        found[name] *= factor
    return {name: factor for name, factor in found.items() if factor != 1.0}


def _matched(layer: str, model: nn.Module, stages: Sequence[Stage], key: str) -> set[str]:
    """The parameters of the stage, or else the layers, that `layer` names."""
    for stage in stages:
        if stage.name == layer:
            return set(stage.parameters)
    found = _names_of(model, named_layers(layer, model))
    if not found:
        known = [stage.name for stage in stages]
        paths = [path for path, _ in model.named_modules() if path]
        near = difflib.get_close_matches(layer, [*known, *paths], 3) or known
        raise UserError(
            f"{key}: {layer!a:.80} names no stage and no layer with weights of "
            f"{type(model).__name__}; there are {', '.join(near)}, ..., or type:Conv2d"
        )
    return found


def _names_of(model: nn.Module, modules: Iterable[nn.Module]) -> set[str]:
    wanted = {p for module in modules for p in module.parameters()}
    return {name for name, p in model.named_parameters() if p in wanted}


def _classifiers(model: nn.Module) -> list[nn.Module]:
    found = [m for m in classifiers(model) if next(m.parameters(), None) is not None]
    if not found:
        raise UserError(
            f"transfer: {type(model).__name__} names no classifier, so that none can learn first; "
            "choose another model, or transfer frozen with layers"
        )
    return found


def stages_of(model: nn.Module) -> list[Stage]:
    """The stages of a network, from the lowest, `stem`, to its classifier, `head`.

    What stands between the last blocks and the classifier, such as a norm, belongs to the stage
    below. Every parameter is in one stage, also those that do not learn.
    """
    head = _names_of(model, _classifiers(model))
    groups = _by_timm(model) or _by_parts(model)
    below = [[name for name in group if name not in head] for group in groups]
    below = [group for group in below if group]
    if len(groups) > 1 and set(groups[-1]) & head and below and below[-1][0] in groups[-1]:
        last = below.pop()  # what the matcher knows no place for
        below = [*below[:-1], [*below[-1], *last]] if below else [last]
    stages = []
    for number, group in enumerate(below):
        name = _name(model, group) or f"stage{number}"
        stages.append(Stage(name if number else "stem", tuple(group)))
    order = [name for name, _ in model.named_parameters() if name in head]
    return [*stages, Stage("head", tuple(order))]


def _by_timm(model: nn.Module) -> list[list[str]]:
    matcher = getattr(model, "group_matcher", None)
    if not callable(matcher):
        return []
    from timm.models import group_parameters  # two seconds; whoever has such a model has it

    found: dict[int, list[str]] = group_parameters(model, matcher(coarse=True))
    return [found[number] for number in sorted(found)]


def _by_parts(model: nn.Module) -> list[list[str]]:
    """The parts of a model in the order in which it was built: its rows of blocks, one by one.

    A norm belongs to the layer before it. Parameters outside of all parts come first.
    """
    parts = [(name, m) for name, m in model.named_children() if _weights(m)]
    while sum(map(_composed, (m for _, m in parts))) < _FEW:
        composed = [(sum(p.numel() for p in m.parameters()), n) for n, m in parts if _composed(m)]
        if not composed:
            break
        largest = max(composed)[1]
        opened = []
        for name, part in parts:
            inner = [(f"{name}.{n}", m) for n, m in part.named_children() if _weights(m)]
            opened += inner if name == largest else [(name, part)]
        parts = opened
    groups: list[list[str]] = []
    seen: set[nn.Parameter] = set()
    for path, part in parts:
        mine = [f"{path}.{n}" for n, p in part.named_parameters() if p not in seen]
        seen |= set(part.parameters())
        if groups and is_norm(part):
            groups[-1] += mine
        elif mine:
            groups.append(mine)
    known = {name for group in groups for name in group}
    if outside := [name for name, _ in model.named_parameters() if name not in known]:
        groups = [outside + groups[0], *groups[1:]] if groups else [outside]
    return groups


def _weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _composed(module: nn.Module) -> bool:
    return any(map(_weights, module.children()))


def _name(model: nn.Module, group: Sequence[str]) -> str:
    """The path of the module that a stage is, or of its largest; empty where there is none.

    Modules are counted that are wholly in the stage, as far up as that goes.
    """
    mine, inside = set(group), ""
    sizes: dict[str, int] = {}
    for path, module in model.named_modules():
        names = {f"{path}.{n}" for n, _ in module.named_parameters()}
        if path and names and names <= mine and not (inside and path.startswith(inside)):
            sizes[path] = sum(p.numel() for p in module.parameters())
            inside = f"{path}."
    return max(sizes, key=sizes.__getitem__, default="")


def module_starts(model: nn.Module, learning: Learning) -> dict[nn.Module, float]:
    """When each module that is frozen at first begins to learn: the first of its parameters.

    One without parameters, such as a dropout, goes by the module around it.
    """
    starts: dict[nn.Module, float] = {}
    for path, module in model.named_modules():
        own = [
            learning.starts.get(f"{path}.{n}" if path else n, 0.0)
            for n, _ in module.named_parameters()
        ]
        around = model.get_submodule(path.rpartition(".")[0])
        starts[module] = min(own) if own else starts.get(around, 0.0)
    return {module: start for module, start in starts.items() if start > 0}


def freeze(model: nn.Module, learning: Learning) -> None:
    """Let what never learns ask for no gradient, and stay in evaluation whatever `train()` says.

    So its dropout and stochastic depth are off, and its BatchNorm keeps its statistics.
    """
    for name, parameter in model.named_parameters():
        if learning.starts.get(name) == NEVER:
            parameter.requires_grad_(False)
    for module, start in module_starts(model, learning).items():
        if start == NEVER:
            kept: Any = module
            kept.keeps_statistics = True  # trainers/models/batch_stats.py
            kept.train = MethodType(_stay, module)  # goes with copies of the model
            kept.train()


def keep_statistics(model: nn.Module, config: c.Transfer | None) -> None:
    """Let BatchNorm that a run never trained keep its statistics where they are made anew."""
    if config is not None:
        starts = module_starts(model, learning_of(config, model, lambda number: 0, 1))
        for module in starts:
            kept: Any = module
            kept.keeps_statistics = True


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)


class Waiting:
    """Leaves groups out of an optimizer's steps until they begin to learn.

    A parameter that waits is not moved, decays not, and gets neither momentum nor a count of
    steps: when it begins, its optimizer does as at a first step, whatever it is.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.step = 0  # finished steps
        self._all: list[dict[str, Any]] = []
        optimizer.register_step_pre_hook(self._leave_out)
        optimizer.register_step_post_hook(self._put_back)

    def _leave_out(self, optimizer: Any, *step: Any) -> None:
        self._all = list(optimizer.param_groups)
        optimizer.param_groups[:] = [g for g in self._all if g.get("start", 0) <= self.step]

    def _put_back(self, optimizer: Any, *step: Any) -> None:
        optimizer.param_groups[:] = self._all


def rate_table(
    model: nn.Module, learning: Learning, optimizer: torch.optim.Optimizer, scale: float
) -> list[dict[str, Any]]:
    """Which parameters learn at which rate: rows by stage, from the lowest to the head.

    `scale` is what optimizer.scale multiplies rates by; the schedule comes on top. A row has
    stage, tensors, parameters, lr (None of frozen ones), weight_decay, and start, the finished
    steps from which it learns.
    """
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    stage_of = {name: s.name for s in learning.stages for name in s.parameters}
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        group = group_of.get(parameter)
        lr = None if group is None else float(group.get("base_lr", group["lr"])) * scale
        decay = 0.0 if group is None else float(group.get("weight_decay", 0.0))
        start = None if group is None else int(group.get("start", 0))
        stage = stage_of.get(name, "head")
        row = rows.setdefault(
            (stage, lr, decay, start),
            {
                "stage": stage,
                "tensors": 0,
                "parameters": 0,
                "lr": lr,
                "weight_decay": decay,
                "start": start,
            },
        )
        row["tensors"] += 1
        row["parameters"] += parameter.numel()
    order = [stage.name for stage in learning.stages]
    return sorted(rows.values(), key=lambda row: order.index(row["stage"]))
