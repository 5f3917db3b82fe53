"""What happens to images before the network, as a recipe writes it; data/augment does it."""

from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from bigbatch.configs.part import Fraction, NonNegative, Positive, Range, Share, StrictModel

_LONGEST = 100  # times as wide as high: a crop beyond it is less than a pixel high
_MOST = 10.0  # of a mean or std of pixels in [0, 1]; those of 0..255 are far above it


class Crop(StrictModel):
    """Random resized crop: area as a fraction of the image, aspect ratio log-uniform."""

    scale: tuple[Share, Share] = (0.35, 1.0)
    ratio: Range = (3 / 4, 4 / 3)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if low > high:
                raise ValueError(f"{name} [{low:g}, {high:g}]: put the lower bound first")
        if self.ratio[0] < 1 / _LONGEST or self.ratio[1] > _LONGEST:
            low, high = self.ratio
            raise ValueError(
                f"ratio [{low:g}, {high:g}]: a crop is at most {_LONGEST} times as wide as high, "
                f"or as high as wide; stay within [{1 / _LONGEST:g}, {_LONGEST}]"
            )
        return self


class Affine(StrictModel):
    """Small random affine map: each value is drawn uniformly from [-x, x]."""

    degrees: Annotated[float, Field(ge=0, le=360)] = 0.0
    translate: Fraction = Field(0.0, description="fraction of the image size")
    scale: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="zoom in [1-x, 1+x]")
    shear: Annotated[float, Field(ge=0, lt=90)] = Field(0.0, description="degrees")


class Jitter(StrictModel):
    """Colour jitter: factors in [1-x, 1+x]; hue as a fraction of the colour circle."""

    brightness: Fraction = 0.0
    contrast: Fraction = 0.0
    saturation: Fraction = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0


class Augment(StrictModel):
    """Device-side augmentation. A part that is null is off."""

    crop: Crop | None = None
    affine: Affine | None = None
    flip: Fraction = Field(0.0, description="probability of a horizontal flip")
    jitter: Jitter | None = None
    mixup: NonNegative = Field(0.0, description="alpha of the Beta distribution; 0 is off")
    mean: list[float] = Field([0.485, 0.456, 0.406], description="per channel, of pixels in [0,1]")
    std: list[Positive] = Field([0.229, 0.224, 0.225], description="per channel")


def refusals(recipe: Any) -> Iterator[str]:
    """What a recipe's augmentation cannot do to its images."""
    for name in ("mean", "std"):
        values = getattr(recipe.augment, name)
        if len(values) != recipe.data.channels:
            yield (
                f"augment.{name} has {len(values)} values for data.channels = "
                f"{recipe.data.channels}; give one value per channel"
            )
    mean, std = recipe.augment.mean, recipe.augment.std
    if any(abs(x) > _MOST for x in mean) or not all(1 / 1000 <= x <= _MOST for x in std):
        yield (
            f"augment.mean {mean} and std {std} are no values of pixels in [0, 1]: divide those "
            "of pixels in 0..255 by 255, and give no channel a std below 0.001"
        )
    jitter = recipe.augment.jitter
    if jitter is not None and recipe.data.channels == 1 and (jitter.hue or jitter.saturation):
        yield (
            "augment.jitter changes hue or saturation, and images of data.channels = 1 have no "
            "colour; set augment.jitter.hue and augment.jitter.saturation to 0, or data.channels "
            "to 3"
        )
    if recipe.augment.mixup and recipe.micro_batch == 1:
        yield (
            f"augment.mixup = {recipe.augment.mixup:g} mixes the images of a micro-batch, and "
            "micro_batch is 1; set mixup to 0, or micro_batch to 2 or more"
        )
