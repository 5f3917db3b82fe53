"""Where a model comes from: timm, torchvision, the teaching nets, or a user's own callable."""

import difflib
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.model import TORCHVISION, Model
from bigbatch.configs.size import Size
from bigbatch.trainers.models.teaching import NETS
from bigbatch.trainers.optim.groups import classifiers

# `create(pretrained)`; arguments behind that are timm.create_model's own.
Create = Callable[..., nn.Module]

# Arguments of timm.create_model that name weights, or a place for them.
_SOURCES = {"checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay"}
# Second heads would give several logits in training; and what torchvision shall do by default.
_ONE_HEAD = {"aux_logits": False, "init_weights": True}


def find_source(config: Model, *, classes: int, channels: int, image_size: Size | None) -> Create:
    """What builds a recipe's network of `classes` outputs, before anything in it is changed.

    It draws from torch's stream alone. `image_size` may be None for what does not
    depend on it. Raises UserError for a name that leads nowhere.
    """
    name, options = config.name, dict(config.options)
    if config.from_timm:
        return _timm(name, options, classes, channels)
    if name in NETS:
        return _teaching(name, options, classes, channels, image_size)
    if name.startswith(TORCHVISION):
        return _torchvision(name, options, classes, channels)
    return _own(name, options, classes, channels)


def _timm(name: str, options: dict[str, Any], classes: int, channels: int) -> Create:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*timm.list_models(), *NETS], 3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(
            f"model.name = {name!r} is no timm model; {hint}`bigbatch models` lists all of them, "
            "and those of torchvision"
        )
    if hidden := _SOURCES & options.keys():
        raise UserError(
            f"model.options holds {', '.join(sorted(hidden))}: where weights come from is said by "
            "model.checkpoint, model.pretrained and a tag in model.name, such as resnet50.a1_in1k"
        )

    def create(pretrained: bool = False, **more: Any) -> nn.Module:
        model: nn.Module = timm.create_model(
            name, pretrained=pretrained, num_classes=classes, in_chans=channels, **more, **options
        )
        return model

    return create


def _teaching(
    name: str, options: dict[str, Any], classes: int, channels: int, image_size: Size | None
) -> Create:
    net: Any = NETS[name]
    size = {} if image_size is None else {"image_size": image_size}
    return lambda: net(num_classes=classes, in_chans=channels, **size, **options)


def torchvision_names() -> list[str]:
    """torchvision's classification models."""
    from torchvision import models

    return list(models.list_models(module=models))


def _torchvision(name: str, options: dict[str, Any], classes: int, channels: int) -> Create:
    from torchvision import models

    short, known = name.removeprefix(TORCHVISION), torchvision_names()
    if short not in known:
        near = difflib.get_close_matches(short, known, 3)
        hint = f"did you mean {' or '.join(TORCHVISION + n for n in near)}? " if near else ""
        raise UserError(
            f"model.name = {name!r} is no classification model of torchvision; {hint}`bigbatch "
            "models 'torchvision:*'` lists them"
        )
    fixed: dict[str, Any] = _ONE_HEAD if short in ("googlenet", "inception_v3") else {}

    def create(pretrained: bool = False) -> nn.Module:
        model = _anywhere(
            lambda: models.get_model(short, weights=None, num_classes=classes, **fixed, **options)
        )
        if channels != 3:
            _take_channels(model, channels)
        if pretrained:
            if channels != 3:
                raise UserError(
                    "model.pretrained: torchvision's weights are for 3 channels, and "
                    f"data.channels = {channels}; set it to 3, or leave model.pretrained out"
                )
            weights = models.get_model_weights(short).DEFAULT
            loaded = load_fitting(model, weights.get_state_dict(check_hash=True, weights_only=True))
            last = classifiers(model)
            head = {
                f"{path}.{part}"
                for path, module in model.named_modules()
                if module in last
                for part in ("weight", "bias")
            }
            if missing := sorted(model.state_dict().keys() - loaded - head):
                raise UserError(
                    f"model.pretrained: torchvision's weights lack or do not fit {len(missing)} "
                    f"tensors of {short} with these options, such as {missing[0]}; leave "
                    "model.options or model.pretrained out"
                )
        return model

    return create


def _own(name: str, options: dict[str, Any], classes: int, channels: int) -> Create:
    module_name, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # a module may do anything when it is imported
        raise UserError(
            f"model.name = {name!r} cannot be imported ({type(error).__name__}: {error}); it is "
            "package.module:callable, of a package that is installed or on PYTHONPATH"
        ) from error
    if not callable(found):
        raise UserError(
            f"model.name = {name!r} is a {type(found).__name__}; name a class or a function that "
            "takes num_classes and in_chans"
        )

    def create() -> nn.Module:
        model = _anywhere(lambda: found(num_classes=classes, in_chans=channels, **options))
        if not isinstance(model, nn.Module):
            raise UserError(
                f"model.name = {name!r} gives a {type(model).__name__}, and has to give an "
                "nn.Module from images [B, C, H, W] to logits [B, classes]"
            )
        return model

    return create


def _anywhere(build: Callable[[], nn.Module]) -> nn.Module:
    """A model on the device that is the default; by way of the CPU where it computes its sizes."""
    device = torch.get_default_device()
    if device.type != "meta":
        return build()
    try:
        return build()
    except (NotImplementedError, RuntimeError):
        with torch.device("cpu"):
            return build().to(device)


def _take_channels(model: nn.Module, channels: int) -> None:
    """Give a model's first convolution other inputs, drawn as torch draws them."""
    name, first = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    like: dict[str, Any] = {"device": first.weight.device, "dtype": first.weight.dtype}
    other = nn.Conv2d(
        channels,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type]  # a pair, as every Conv2d has it
        first.stride,  # type: ignore[arg-type]
        first.padding,  # type: ignore[arg-type]
        first.dilation,  # type: ignore[arg-type]
        bias=first.bias is not None,
        **like,
    )
    model.set_submodule(name, other)


def load_fitting(model: nn.Module, weights: Mapping[str, Tensor]) -> set[str]:
    """Load what bears the model's names and has their shapes; the names of that."""
    own = model.state_dict()
    fitting = {n: w for n, w in weights.items() if n in own and own[n].shape == w.shape}
    model.load_state_dict(fitting, strict=False)
    return set(fitting)
