"""A single network as timm keeps one: weights, and the config.json that says how to build it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.size import height_width
from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.ensemble.members import Member
from bigbatch.trainers.models.compressed import compression_of

CONFIG = "config.json"


def config_path(weights: Path) -> Path:
    """Where the config of a weights file goes.

    timm looks for config.json beside model.safetensors; beside another name it stands as
    NAME.json, so that files in one folder do not share one.
    """
    return weights.with_name(CONFIG if weights.stem == "model" else f"{weights.stem}.json")


def check_single(members: Sequence[Member], combination: Combination) -> None:
    """Raise UserError where weights alone would compute something else."""
    remedy = "export .onnx or .pt2, which hold all of it"
    if len(members) > 1:
        raise UserError(
            f".safetensors holds the weights of one network, and there are {len(members)} members; "
            f"{remedy}; or choose one, such as the soup, with --members"
        )
    alone = combination.method in ("mean", "logits", "weights")
    if not alone or combination.temperature != 1 or combination.reject_below is not None:
        raise UserError(
            f".safetensors has no place for a combination by {combination.method}, temperature "
            f"{combination.temperature:g} or the threshold {combination.reject_below}; {remedy}"
        )


def timm_config(member: Member, network: nn.Module) -> dict[str, Any]:
    """timm's config of a network on the Hugging Face hub (timm/models/_hub.py, 1.0).

    Raises UserError for a network that timm itself cannot build.
    """
    recipe = member.recipe
    method = compression_of(member.weights)
    if method not in (None, "codebook"):  # whose weights become plain ones when they are loaded
        raise UserError(
            f"member {member.name} was compressed by {method} to a network that timm cannot build, "
            "so that its weights alone would be of no use; export .onnx or .pt2"
        )
    if beyond := recipe.model.beyond_timm():
        raise UserError(
            f"member {member.name} has {' and '.join(beyond)}, which timm cannot build, "
            "so that its weights alone would be of no use; export .onnx or .pt2"
        )
    channels = recipe.data.channels
    size, seen = ([channels, *height_width(s)] for s in (recipe.data.image_size, recipe.eval_size))
    architecture, _, _ = recipe.model.name.partition(".")
    other = {"test_input_size": seen} if seen != size else {}
    given = getattr(network, "pretrained_cfg", {})
    return {
        "architecture": architecture,
        "num_classes": len(member.classes),
        "num_features": network.num_features,
        "label_names": list(member.classes),
        "model_args": {**recipe.model.options, "in_chans": channels},
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": size,
            **other,
            "fixed_input_size": given.get("fixed_input_size", False),
            "interpolation": "bilinear",
            "crop_pct": recipe.evaluate.crop_fraction,
            "crop_mode": recipe.evaluate.crop_mode,
            "mean": recipe.augment.pixel_mean,
            "std": recipe.augment.pixel_std,
            "num_classes": len(member.classes),
            "pool_size": None,
            "first_conv": given.get("first_conv"),
            "classifier": given.get("classifier"),
        },
    }
