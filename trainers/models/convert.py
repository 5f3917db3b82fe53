"""Parts of a model changed for others: by the type of a module, never by its name.

What takes a module's place stands at the same path, and takes the tensors over that mean the same
in it, so that weights trained either way fit as far as they can.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bigbatch.configs import norm as options
from bigbatch.configs.errors import UserError
from bigbatch.configs.model import Model
from bigbatch.configs.size import Size, height_width, in_words
from bigbatch.trainers.models import norm_layers as layers
from bigbatch.trainers.models.blocks import (
    add_attention,
    change_pool,
    recompute,
    swap_activations,
)
from bigbatch.trainers.models.stage_features import join_stages
from bigbatch.trainers.optim.groups import classifiers, linear_classifier


def convert(model: nn.Module, config: Model, images: Tensor | None) -> None:
    """Change `model` to what a recipe's model says beyond its name and options.

    `images` are an example [2, C, S, S], which shows what is called after what; None where the
    size is not known. Raises UserError where the model has nothing to change.
    """
    if config.activation is not None:
        swap_activations(model, config.activation, config.name)
    if config.weight_standardization:
        _standardize(model, config.name)
    if config.norm is not None:
        _swap_norms(model, config.norm, config.name, images)
    if config.joined_stages:
        join_stages(model, config.joined_stages, config.name)
    if config.head is not None:
        _change_head(model, config.head, config.name)
    if config.pool is not None:
        change_pool(model, config.pool, config.name)
    if config.attention is not None:  # with activations and norms of its own
        add_attention(model, config.attention, config.name)
    if config.recompute:
        recompute(model, config.name)


def _standardize(model: nn.Module, name: str) -> None:
    last = classifiers(model)
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m not in last}
    odd = [path for path, layer in found.items() if type(layer) is not nn.Conv2d]
    if odd or not found:
        why = f"{odd[0]} of {name} is another one" if odd else f"{name} has none"
        raise UserError(
            f"model.weight_standardization changes torch's Conv2d, and {why}; leave it out"
        )
    for layer in found.values():
        layer.__class__ = layers.StandardizedConv2d


def _swap_norms(model: nn.Module, norm: options.Norm, name: str, images: Tensor | None) -> None:
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, _BatchNorm)]
    if not found:
        raise UserError(f"model.norm: {name} has no BatchNorm to put {norm.name} in place of")
    for path, layer in found:
        usual = type(layer) in (nn.BatchNorm2d, BatchNormAct2d) and layer.affine
        if not usual or layer.running_mean is None:
            raise UserError(
                f"model.norm = {norm.name} takes the place of torch's BatchNorm2d with weights "
                f"and running statistics, and {path} of {name} is {layer}; leave model.norm out"
            )
    acts = _activations_after(model, name, images) if norm.name == "filter_response" else {}
    for path, layer in found:
        assert isinstance(layer, nn.BatchNorm2d)
        model.set_submodule(path, _in_place_of(layer, norm, path, thresholded=path in acts))
    for path in {act for act in acts.values() if act is not None}:
        model.set_submodule(path, nn.Identity())


def _in_place_of(
    old: nn.BatchNorm2d, norm: options.Norm, path: str, thresholded: bool
) -> nn.Module:
    count = old.num_features
    new: Any
    drop, act = getattr(old, "drop", nn.Identity()), getattr(old, "act", nn.Identity())
    match norm:
        case options.Group():
            if count % norm.groups:
                raise UserError(
                    f"model.norm.groups = {norm.groups} does not divide the {count} channels of "
                    f"{path}; choose a divisor, such as {math.gcd(count, norm.groups)}"
                )
            new = layers.Group(norm.groups, count, eps=old.eps)
        case options.Layer():
            new = layers.Layer(count, eps=old.eps)
        case options.Instance():
            new = layers.Instance(count, eps=old.eps, affine=True)
        case options.FilterResponse():
            new = layers.FilterResponse(count, apply_act=thresholded, eps=1e-6)
            if thresholded:
                act = nn.Identity()
        case options.LocalResponse():
            alpha = norm.alpha * norm.size  # torch's is a mean over channels
            new = layers.LocalResponse(norm.size, alpha, norm.beta, norm.k)
        case options.BatchRenorm():
            new = layers.BatchRenorm(count, eps=old.eps)
            new.r_max, new.d_max, new.ramp_steps = norm.r_max, norm.d_max, norm.ramp_steps
        case options.GhostBatch():
            new = layers.GhostBatch(count, eps=old.eps)
            new.samples = norm.samples
        case options.FrozenBatch():
            new = layers.FrozenBatch(count, eps=old.eps)
    for key in old._parameters.keys() & new._parameters.keys():
        new._parameters[key] = old._parameters[key]
    for key in old._buffers.keys() & new._buffers.keys():
        new._buffers[key] = old._buffers[key]
    if isinstance(new, nn.BatchNorm2d):
        new.momentum = old.momentum
    if isinstance(norm, options.FrozenBatch):
        for parameter in new.parameters(recurse=False):
            parameter.requires_grad_(norm.train_affine)
    new.drop, new.act = drop, act
    found: nn.Module = new.to(old.weight.device)
    return found


def _activations_after(model: nn.Module, name: str, images: Tensor | None) -> dict[str, str | None]:
    """By BatchNorm, the ReLU whose place its threshold takes: a path, None where it is its own."""
    found: dict[str, str | None] = {}
    others: set[str] = set()
    # Tensors by number, held so that no other one gets it; a version tells what was added to one.
    outputs: dict[int, tuple[str, Tensor, int]] = {}
    handles = []

    def normed(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            outputs[id(output)] = path, output, output._version

        return hook

    def activated(path: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            before = outputs.get(id(inputs[0]))
            if before is None or before[2] != inputs[0]._version:
                others.add(path)
            else:
                found[before[0]] = path

        return hook

    for path, module in model.named_modules():
        if isinstance(module, BatchNormAct2d):
            if isinstance(module.act, nn.ReLU):
                found[path] = None
        elif isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_hook(normed(path)))
        elif isinstance(module, nn.ReLU):
            handles.append(module.register_forward_pre_hook(activated(path)))
    with torch.no_grad(), _evaluating(model):
        if images is None:
            raise UserError("model.norm = filter_response needs the images' size")
        model(images)
    for handle in handles:
        handle.remove()
    if shared := sorted(others & set(found.values())):
        raise UserError(
            f"model.norm = filter_response: {shared[0]} of {name} follows a BatchNorm in one place "
            "and something else in another, so that no threshold can take its place; take timm's "
            "model of that name, or another norm"
        )
    return found


class _evaluating:
    """A model in eval mode for a while, then as it was, module by module."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]
        self._model = model

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *error: object) -> None:
        for module, mode in self._modes:
            module.training = mode


def _change_head(model: nn.Module, head: options.Head, name: str) -> None:
    path, old = linear_classifier(model, f"model.head of {name}")
    like: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
    kind = head.feature_norm
    norm: nn.Module = nn.Identity()
    if kind == "layer":
        norm = nn.LayerNorm(old.in_features, **like)
    elif kind == "batch":
        norm = nn.BatchNorm1d(old.in_features, **like)
    new: Any
    if isinstance(head, options.LinearHead):
        if kind == "l2":
            norm = layers.UnitLength(head.feature_scale)
        new = layers.NormedLinear(
            old.in_features, old.out_features, bias=old.bias is not None, **like
        )
        new.bias = old.bias
    else:
        new = layers.CosineLinear(old.in_features, old.out_features, bias=False, **like)
        new.scale = head.scale
    new.weight, new.norm = old.weight, norm
    model.set_submodule(path, new)


def example_images(model: nn.Module, channels: int, image_size: Size) -> Tensor:
    """Two images [2, C, H, W] on the model's device."""
    shape = 2, channels, *height_width(image_size)
    device = next(_tensors(model)).device
    return torch.linspace(-1, 1, math.prod(shape), device=device).view(shape)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    yield torch.empty(0)


def see_classifier(model: nn.Module, images: Tensor) -> None:
    """Let a model that names no classifier have none, unless its last layer gives its output."""
    last = classifiers(model)
    if images.is_meta or callable(getattr(model, "get_classifier", None)) or not last:
        return
    seen: list[Tensor] = []
    handle = last[0].register_forward_hook(lambda layer, inputs, output: seen.append(output))
    try:
        with torch.no_grad(), _evaluating(model), torch.random.fork_rng(devices=[]):
            output = model(images)
    except Exception:  # `check_output` says it
        return
    finally:
        handle.remove()
    if not (len(seen) == 1 and isinstance(output, Tensor) and torch.equal(seen[0], output)):
        unnamed: Any = model
        unnamed.get_classifier = list


def check_sizes(
    model: nn.Module, channels: int, trained: Size, others: Iterable[tuple[str, Size]], name: str
) -> None:
    """Raise UserError where a model of `trained` pixels cannot take images of another size.

    `others` are sizes behind the key of the recipe that asks for them.
    """
    for key, size in others:
        if size == trained:
            continue
        images = example_images(model, channels, size)
        try:
            with torch.no_grad(), _evaluating(model), torch.random.fork_rng(devices=[]):
                model(images)
        except Exception as error:  # each model says it in its own way
            reason = str(error).strip().partition(chr(10))[0] or type(error).__name__
            raise UserError(
                f"{key} = {in_words(size)}: model {name} takes images of {in_words(trained)} "
                f"alone ({reason:.200}); "
                f"leave {key} out, or let the model take any size, as timm's transformers do by "
                "model.options.dynamic_img_size=true"
            ) from error


def check_output(model: nn.Module, images: Tensor, classes: int, name: str) -> None:
    """Raise UserError where two images give anything but their logits [2, classes].

    On the meta device a model that looks at values cannot run, and nothing is said.
    """
    if images.is_meta:
        return
    try:
        with torch.no_grad(), _evaluating(model), torch.random.fork_rng(devices=[]):
            output = model(images)
    except Exception as error:  # whatever a user's own model does
        size = list(images.shape[1:])
        raise UserError(
            f"model {name} cannot take images of {size} ({type(error).__name__}: "
            f"{str(error).strip().partition(chr(10))[0]:.200}); set data.image_size and "
            "data.channels to what it takes (`bigbatch models` lists it), or "
            "model.options={img_size: ...} where it has that option, or change model"
        ) from error
    found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if found != [2, classes]:
        raise UserError(
            f"model {name} gives {found} for two images, and the data has {classes} classes; it "
            f"has to give logits [2, {classes}]"
        )
