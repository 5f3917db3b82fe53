"""The models that a recipe can name, and what they take. Started by `bigbatch models`.

    python -m bigbatch.trainers.models.catalogue PATTERN LIMIT CLASSES

Nothing is allocated: models are built on the meta device. Prints JSON: `names` are all that match,
`models` the first LIMIT of them with parameters, FLOPs and input size.
"""

import fnmatch
import inspect
import sys
from typing import Any

import timm
import torch
from torch import nn

from bigbatch.configs.files import to_json
from bigbatch.configs.model import TEACHING, TORCHVISION, Model
from bigbatch.trainers.models.build import build_model
from bigbatch.trainers.models.size import count_flops
from bigbatch.trainers.models.sources import torchvision_names
from bigbatch.trainers.models.teaching import NETS


def matching(pattern: str) -> list[str]:
    """Names that match a shell's pattern, or that hold a word without * ? [ in it."""
    wildcard = any(sign in pattern for sign in "*?[")
    wanted = pattern if wildcard else f"*{pattern}*"
    names = [*TEACHING, *timm.list_models(), *(TORCHVISION + n for n in torchvision_names())]
    return [name for name in names if fnmatch.fnmatchcase(name, wanted)]


def describe(name: str, classes: int) -> dict[str, Any]:
    """A model at its usual input [C, H, W], by an image: FLOPs of a forward pass, parameters.

    A multiplication and its addition count as two FLOPs. What is not known is None.
    """
    shape = _fixed_input(name)
    channels, side = (3, None) if shape is None else (shape[0], shape[1])
    found: dict[str, Any] = {"name": name, "parameters": None, "flops": None, "input_size": shape}
    try:
        with torch.device("meta"):
            model = build_model(
                Model(name=name), classes=classes, channels=channels, seed=0, image_size=side
            )
            shape = shape or _of_timm(model)
            found["input_size"] = shape
            found["parameters"] = sum(p.numel() for p in model.parameters())
            if shape is not None:
                found["flops"] = count_flops(model.eval(), channels, shape[1])
    except Exception as error:  # some models compute with values, which nothing has here
        found["why"] = str(error).strip().partition("\n")[0]
    return found


def _fixed_input(name: str) -> list[int] | None:
    """Of models that do not say it themselves: a teaching net's paper, torchvision's weights."""
    if name in NETS:
        defaults = inspect.signature(NETS[name]).parameters
        return [defaults["in_chans"].default, *[defaults["image_size"].default] * 2]
    if not name.startswith(TORCHVISION):
        return None
    from torchvision import models

    weights = models.get_model_weights(name.removeprefix(TORCHVISION))
    size = weights.DEFAULT.transforms.keywords["crop_size"]
    return [3, size, size]


def _of_timm(model: nn.Module) -> list[int] | None:
    config: Any = getattr(model, "pretrained_cfg", {})
    size = config.get("input_size")
    return None if size is None else list(size)


def main(pattern: str, limit: int, classes: int) -> dict[str, Any]:
    names = matching(pattern)
    return {"names": names, "models": [describe(name, classes) for name in names[:limit]]}


if __name__ == "__main__":
    print(to_json(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
