"""The network as a recipe writes it; trainers/models builds it."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from bigbatch.configs.part import StrictModel

_ELSEWHERE = {  # arguments of timm.create_model that are no options here, and what says them
    "model_name": "write model.name",
    "pretrained": "write model.pretrained",
    "checkpoint_path": "write model.checkpoint",
    "pretrained_cfg_overlay": "write model.checkpoint",
    "num_classes": "it follows from the classes of the data",
    "in_chans": "write data.channels",
    "features_only": "training needs a classifier's logits; drop it",
}


class Model(StrictModel):
    """A timm model."""

    name: str
    pretrained: bool = False
    checkpoint: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="local weights to start from"
    )
    stem: Literal["standard", "small"] = Field(
        "standard",
        description="small: for images of about 32 pixels, a ResNet's first convolution becomes "
        "3x3 of stride 1, without the pooling after it (He et al. 2016, section 4.2)",
    )
    channels_last: bool = Field(
        False,
        description="images and convolutions in the memory order NHWC on a GPU, where its tensor "
        "cores work in it; without effect on a CPU",
    )
    options: dict[str, JsonValue] = Field(
        default_factory=dict, description="keyword arguments of timm.create_model"
    )


def refusals(recipe: Any) -> Iterator[str]:
    """What a recipe's options cannot say of its model."""
    options, size = recipe.model.options, recipe.data.image_size
    for key, remedy in _ELSEWHERE.items():
        if key in options:
            yield f"model.options.{key}: {remedy}"
    for key, rate in options.items():
        if "drop" in key and key.endswith("_rate") and rate is not None and not _is_rate(rate):
            yield (
                f"model.options.{key} = {rate!r} is no probability; give a number from 0 to less "
                "than 1"
            )
    written = options.get("img_size", size)
    if written not in (size, [size, size]):
        yield (
            f"model.options.img_size = {written} and data.image_size = {size} differ; set "
            "data.image_size to what the model shall see, and img_size likewise"
        )


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
