"""What happens to images before the network, as a recipe writes it; data/augment does it."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field

from bigbatch.configs.part import Fraction, NonNegative, Positive, Range, Share, StrictModel


class Crop(StrictModel):
    """Random resized crop: area as a fraction of the image, aspect ratio log-uniform."""

    scale: tuple[Share, Share] = (0.35, 1.0)
    ratio: Range = (3 / 4, 4 / 3)


class Affine(StrictModel):
    """Small random affine map: each value is drawn uniformly from [-x, x]."""

    degrees: NonNegative = 0.0
    translate: Fraction = Field(0.0, description="fraction of the image size")
    scale: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="zoom in [1-x, 1+x]")
    shear: NonNegative = Field(0.0, description="degrees")


class Jitter(StrictModel):
    """Colour jitter: factors in [1-x, 1+x]; hue as a fraction of the colour circle."""

    brightness: NonNegative = 0.0
    contrast: NonNegative = 0.0
    saturation: NonNegative = 0.0
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
