"""When and how a run measures itself; trainers/evaluation does it."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bigbatch.configs.durations import Length, Period
from bigbatch.configs.part import Count, ImageSize, StrictModel

_MANY_STEPS = 500  # behind which BatchNorm has long forgotten where it started
# Training images that running statistics are made of (with more of them an accuracy on CIFAR-10 is
# another by 0.1 to 0.2 points, benchmarks/precise_bn.py), and the fewest that an evaluation's are.
_PRECISE, _FEWEST = 2048, 512


class Evaluate(StrictModel):
    """When a run is scored, and on which view of each image."""

    every: Period = Field(Length(1, "epochs"), description="and at the run's end")
    batch: Count = Field(256, description="images per evaluation batch, on each rank")
    image_size: ImageSize | None = Field(
        None, description="of what is evaluated, predicted and exported; null is data.image_size"
    )
    crop_fraction: Annotated[float, Field(ge=0.1, le=1)] = Field(
        1.0, description="share of the image's short side in the centre crop"
    )
    crop_mode: Literal["center", "squash"] = Field(
        "center",
        description="center: the largest part with the shape of the size; squash: the whole image, "
        "stretched to it. Also of training without augment.crop",
    )

    precise_bn: Literal["auto", "always", "never"] = Field(
        "auto",
        description="evaluate and keep weights with BatchNorm statistics of their own, made anew "
        f"from training images; auto: while fewer than {_MANY_STEPS} steps lie behind",
    )
    precise_bn_images: Count | Literal["auto"] = Field(
        "auto",
        description="training images that those are made from, at most an epoch's, and no more "
        f"than were trained on; auto: {_PRECISE:,}, and for an evaluation without a snapshot at "
        f"most a quarter of those between two, though not below {_FEWEST}. Also those of averaged "
        "weights",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.squash and self.crop_fraction != 1:
            raise ValueError(
                f"crop_fraction {self.crop_fraction:g} leaves out the edges that crop_mode squash "
                "shows; set crop_fraction to 1, or crop_mode to center"
            )
        return self

    @property
    def squash(self) -> bool:
        return self.crop_mode == "squash"

    def is_precise(self, step: int) -> bool:
        """Whether weights after `step` steps are evaluated with statistics made for them."""
        return self.precise_bn == "always" or (self.precise_bn == "auto" and step < _MANY_STEPS)

    def precise_images(self, epoch_samples: int) -> int:
        """How many training images statistics are made of: of snapshots, averages and soups."""
        asked = _PRECISE if self.precise_bn_images == "auto" else self.precise_bn_images
        return min(asked, epoch_samples)

    def evaluated_images(self, trained: int, global_batch: int, epoch_samples: int) -> int:
        """How many of other evaluations, after so many samples and a step of `global_batch`:
        forward passes that cost a share of the training between two."""
        most = min(self.precise_images(epoch_samples), trained)
        if self.precise_bn_images != "auto":
            return most
        between = min(trained, self.every.samples(global_batch, epoch_samples))
        return min(most, max(_FEWEST, int(between) // 4))
