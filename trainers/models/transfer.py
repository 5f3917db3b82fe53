"""Weights to start from: what is loaded, what starts fresh, what is left over.

timm decides by its registry's number of classes whether a file's classifier is kept, so weights
of one's own 10 classes lose theirs, in silence, in another run on the same 10. Here the file
decides: where it names its classes, each row of the classifier goes to the class of its name.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.trainers.models.seal import check_seal
from bigbatch.trainers.models.sources import load_fitting
from bigbatch.trainers.models.weights_file import (
    WeightsInfo,
    differences,
    other_classes,
    shared_classes,
)
from bigbatch.trainers.optim.groups import classifiers

Create = Callable[..., nn.Module]  # timm.create_model, but for its weights
_SHOWN = 6


def start_from(
    path: str,
    create: Create,
    finish: Callable[[nn.Module], None],
    classes: int,
    there: WeightsInfo | None,
    here: WeightsInfo | None,
) -> tuple[nn.Module, list[str]]:
    """A model with the weights of a file, and what is to be said of them.

    `create` makes the model with fresh weights, the same ones at each call, or as told by
    timm's arguments; `finish` changes it after that. Weights that bear the model's own names
    are loaded here, the classifier where it is one for the run's classes, else its rows of
    classes that both know by name; others go through timm, which converts them. `there` and
    `here` are what the weights were trained for, and what this run is for. Raises whatever timm
    and torch do.
    """
    weights = given = timm.models.load_state_dict(path)
    if path.endswith(".safetensors"):
        try:
            check_seal(Path(path), load_file(path))
        except ValueError as error:
            raise UserError(
                f"model.checkpoint = {path} is damaged: {error}; restore it from a backup, or "
                "leave model.checkpoint out"
            ) from None
    model = create()
    finish(model)
    fresh = _state(model)
    head = _head(model)
    notes = differences(there, here) if there and here else []
    fits = {n for n, value in fresh.items() if n in weights and weights[n].shape == value.shape}
    other = there is not None and here is not None and other_classes(there, here) is not None
    kept = head <= fits and not other
    if fresh.keys() - head <= fits:
        chosen = {name: weights[name] for name in fresh if kept or name not in head}
        model.load_state_dict(chosen, strict=False)
        started = [name for name in fresh if name not in chosen]
        left = [name for name in weights if name not in chosen]
    elif not hasattr(model, "pretrained_cfg"):
        model = create()
        weights = _fit_first_layer(model, weights)
        loaded = load_fitting(model, {n: w for n, w in weights.items() if kept or n not in head})
        if missing := [n for n in model.state_dict() if n not in loaded and n not in head]:
            raise ValueError(f"it does not fit this model{_listed(': no', missing)}")
        finish(model)
        started = [name for name in fresh if name not in loaded]
        left = [name for name in weights if name not in loaded]
    else:
        changes = _for_timm(model, weights, head, classes, kept)
        model = create(pretrained=True, pretrained_cfg_overlay={"file": path, **changes})
        finish(model)
        started = [name for name, value in model.state_dict().items() if _same(value, fresh[name])]
        left = [name for name in weights if name not in fresh]
    if other and there is not None and here is not None:
        rows = shared_classes(there, here)
        taken = _take_rows(model, weights, head, rows, (len(there.classes), classes))
        started = [name for name in started if name not in taken]
        left = [name for name in left if name not in taken]
        if rows and head and not taken:
            notes.append("its classifier has no row for each class; this one starts fresh")
    if first := _first_layer(model, given):
        notes.append(first)
    if kept and head and (there is None or here is None):
        notes.append(
            f"the classifier is kept: it is one for {classes:,} classes, but the file names none; "
            "they must be this run's, in this order"
        )
    elif not other and head & set(started):
        notes += _lost_head(weights, head, classes)
    counts = f"{len(fresh) - len(started):,} of the model's {len(fresh):,} tensors are loaded"
    parts = [counts, _listed("fresh", started), _listed("left over in the file", left)]
    return model, ["; ".join(filter(None, parts)), *notes]


def said_of_pretrained(model: nn.Module, here: WeightsInfo) -> list[str]:
    """What became of the classifier of timm's own weights, which knows its classes by number."""
    config: Any = getattr(model, "pretrained_cfg", None)
    if config is None or not config.get("num_classes"):
        return []
    there, classes = config["num_classes"], here.classes
    notes = []
    if here.channels == 3 and config.get("mean") and config.get("std"):
        mean, std = tuple(config["mean"]), tuple(config["std"])
        notes = differences(replace(here, mean=mean, std=std), here)
    if there != len(classes):
        fresh = f"its classifier is for {there:,} classes, this run has {len(classes):,}: fresh"
        return [*notes, fresh]
    known: list[str] = []
    if subset := timm.data.infer_imagenet_subset(model):
        known = timm.data.ImageNetInfo(subset).label_names()
    if tuple(known) == classes:
        return notes
    by_number = (
        f"the classifier is kept, since there are {there:,} classes too, but by their numbers "
        "alone: this run's must be its classes, in its order; otherwise train shards with another "
        "number of classes, or give the weights by model.checkpoint"
    )
    return [*notes, by_number]


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _same(value: Tensor, fresh: Tensor) -> bool:
    """Whether a tensor was not loaded: random numbers do not come out alike otherwise."""
    if value.shape != fresh.shape or not torch.equal(value, fresh):
        return False
    return fresh.numel() > 0 and not bool((fresh == fresh.flatten()[0]).all())


def _head(model: nn.Module) -> set[str]:
    """The names of the classifier's parameters, by timm's word where it is timm's model."""
    config: Any = getattr(model, "pretrained_cfg", None)
    if config is None:
        last = classifiers(model)
        modules: Any = [name for name, module in model.named_modules() if module in last]
    else:
        names = config.get("classifier") or ()
        modules = (names,) if isinstance(names, str) else names
    wanted = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    return wanted & model.state_dict().keys()


@torch.no_grad()
def _take_rows(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    head: set[str],
    rows: list[tuple[int, int]],
    counts: tuple[int, int],
) -> set[str]:
    """Take the classifier's `rows`, (number here, there), for `counts` classes there and here.

    The names of its tensors, or none where they do not have a row for each class.
    """
    own = model.state_dict()
    for name in head:
        value, wanted = weights.get(name), own[name]
        if value is None or (value.shape[:1], wanted.shape[:1]) != ((counts[0],), (counts[1],)):
            return set()
        if value.shape[1:] != wanted.shape[1:]:
            return set()
    if not rows:
        return set()
    here, there = (list(numbers) for numbers in zip(*rows, strict=True))
    for name in head:
        own[name][here] = weights[name][there].to(own[name])
    return head


def _first_of(model: nn.Module) -> str | None:
    """The name of the weights of the first layer over images, by timm's word where it has one."""
    config: Any = getattr(model, "pretrained_cfg", None)
    first = config.get("first_conv") if config is not None else None
    if config is None:
        first = next((n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)), None)
    return f"{first}.weight" if isinstance(first, str) else None


def _fit_first_layer(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's weights, those of the first layer for the model's channels, as timm does it."""
    name, found = _first_of(model), dict(weights)
    own = model.state_dict()
    if name is None or name not in own or name not in found or found[name].ndim != 4:
        return found
    channels, there = own[name].shape[1], found[name].shape[1]
    if there == 3 and channels != 3:
        found[name] = timm.models.adapt_input_conv(channels, found[name])
    elif there == 1 and channels != 1:  # so that a gray image gives what it gave
        found[name] = found[name].repeat(1, channels, 1, 1) / channels
    return found


def _first_layer(model: nn.Module, weights: Mapping[str, Tensor]) -> str | None:
    """What became of a first layer for other channels; None where they are the same."""
    name, own = _first_of(model), model.state_dict()
    if name is None or name not in own or name not in weights or weights[name].ndim != 4:
        return None
    there, here = weights[name].shape[1], own[name].shape[1]
    how = "summed" if here == 1 else f"divided among {here}"
    return None if there == here else f"{name}: its {there} input channels are {how}, as timm does"


def _lost_head(weights: Mapping[str, Tensor], head: set[str], classes: int) -> list[str]:
    rows = _rows(weights, head)
    if not rows:
        return []  # the names of what is fresh say it
    counts = " and ".join(f"{count:,}" for count in rows)
    return [f"the file's classifier is for {counts} classes, this run has {classes:,}: it is fresh"]


def _rows(weights: Mapping[str, Tensor], head: set[str]) -> list[int]:
    """For how many classes a file's classifier is."""
    return sorted({len(weights[name]) for name in head if name in weights and weights[name].ndim})


def _for_timm(
    model: nn.Module, weights: Mapping[str, Tensor], head: set[str], classes: int, kept: bool
) -> dict[str, Any]:
    """What timm has to be told of a file, in place of what its registry says of its own."""
    config: Any = model.pretrained_cfg
    told: dict[str, Any] = {}
    offset = config.get("label_offset", 0)  # classes of the file before the first one
    if kept and head:
        told |= {"num_classes": classes, "label_offset": 0}
    elif (rows := _rows(weights, head)) and not (offset and rows == [classes + offset]):
        told |= {"num_classes": -1}  # no number of classes: timm drops the classifier
    first = config.get("first_conv")
    first = weights.get(f"{first}.weight") if isinstance(first, str) else None
    if first is not None and first.ndim == 4 and first.shape[1] in (1, 3):
        told["input_size"] = (first.shape[1], *config.get("input_size", (3, 224, 224))[1:])
    return told


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"{what}: {', '.join(names[:_SHOWN])}{more}"
