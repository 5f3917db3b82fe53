"""Features of several stages of a network side by side, before its classifier."""

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.trainers.optim.groups import linear_classifier


class _JoinedStages(nn.Module):
    """A timm model whose classifier also takes the means of maps on the way."""

    joined_indices: list[int]  # in timm's feature_info
    joined_classifier: str  # its path

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] to logits [B, classes]."""
        model: Any = self
        last, maps = model.forward_intermediates(
            images, indices=self.joined_indices, output_fmt="NCHW"
        )
        own = model.forward_head(last, pre_logits=True).flatten(1)
        features = [*(m.mean((2, 3)) for m in maps), own]
        logits: Tensor = self.get_submodule(self.joined_classifier)(torch.cat(features, 1))
        return logits


def join_stages(model: nn.Module, names: Sequence[str], model_name: str) -> None:
    """Give `model` a fresh classifier of the means of maps of stages, and of its own features.

    `names` are paths of timm's feature_info; the features stand in the network's order, its own
    last. Weights keep their names. Raises UserError where the model has no such stages.
    """
    path, old = linear_classifier(model, f"model.joined_stages of {model_name}")
    info: Any = getattr(model, "feature_info", None)
    known = {entry["module"]: n for n, entry in enumerate(getattr(info, "info", info) or [])}
    entries = list(getattr(info, "info", info) or [])
    if not known or not callable(getattr(model, "forward_intermediates", None)):
        raise UserError(
            f"model.joined_stages: {model_name} has no stages that timm can take maps of "
            "(forward_intermediates); leave it out, or take another model"
        )
    if missing := [name for name in names if name not in known]:
        near = difflib.get_close_matches(missing[0], known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"model.joined_stages: {model_name} has no stage {missing[0]!a:.60}; {hint}its stages "
            f"are {', '.join(known)}"
        )
    indices = sorted(known[name] for name in names)
    width = old.in_features + sum(int(entries[index]["num_chs"]) for index in indices)
    like: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
    new = nn.Linear(width, old.out_features, bias=old.bias is not None, **like)
    model.set_submodule(path, new)
    kind = type(model)
    joined: Any = model
    joined.__class__ = type(kind.__name__, (_JoinedStages, kind), {})
    joined.joined_indices, joined.joined_classifier = indices, path
