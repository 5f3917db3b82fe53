"""The network as a recipe writes it; trainers/models builds it."""

from typing import Literal

from pydantic import Field, JsonValue

from bigbatch.configs.part import StrictModel


class Model(StrictModel):
    """A timm model."""

    name: str
    pretrained: bool = False
    checkpoint: str | None = Field(None, description="local weights to start from")
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
