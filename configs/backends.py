"""How training is spread over ranks, as a recipe writes it; trainers/engine does it."""

from collections.abc import Iterator
from typing import Any, Literal

from bigbatch.configs.optimizers import SHARDABLE

Backend = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]


def refusals(recipe: Any) -> Iterator[str]:
    """Why a recipe cannot run in pieces, and what to do about it."""
    backend, clip, optimizer = recipe.backend, recipe.clip, recipe.optimizer.name
    if backend == "ddp":
        return
    if backend == "zero3":
        yield (
            "backend: zero3 is not offered: its hooks cut parameters out of modules one by one, "
            "and its weights have not been shown to be those of ddp; fsdp2 shards parameters "
            "too, and is exact: set backend to fsdp2"
        )
        return
    if recipe.reduction == "exact":
        yield (
            f"backend: {backend} cannot have reduction exact, which adds up whole gradients in "
            "float64; set reduction to overlapped, or backend to ddp"
        )
    if optimizer not in SHARDABLE:
        yield (
            f"backend: {backend} gives an optimizer pieces of each layer, and {optimizer} needs "
            f"whole layers; choose one of {', '.join(SHARDABLE)}, or set backend to ddp"
        )
    if clip is not None and clip.name == "adaptive":
        yield (
            f"backend: {backend} cannot clip adaptively: units of a layer are cut apart; set "
            "clip.name to norm or value, or backend to ddp"
        )
