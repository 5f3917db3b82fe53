"""What happens to images before the network, as a recipe writes it; data/augment does it."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from bigbatch.configs import augment_ops as c
from bigbatch.configs.part import Fraction, NonNegative, Positive, Range, Share, StrictModel
from bigbatch.configs.size import height_width, in_words

_LONGEST = 100  # times as wide as high: a crop beyond it is less than a pixel high
_MOVING = (c.Rotate, c.Shear, c.Translate, c.Scale, c.Perspective, c.PadCrop)
_MOST = 10.0  # of a mean or std of pixels in [0, 1]; those of 0..255 are far above it


def _parse_statistic(value: Any) -> Any:
    numbers = isinstance(value, list | tuple) and all(
        isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in value
    )
    if not numbers and value != "measured":
        raise ValueError(
            f"{value!r} is neither a list of numbers, one for each channel, nor measured"
        )
    return [float(x) for x in value] if numbers else value


_NUMBERS = {"type": "array", "items": {"type": "number"}}
Statistic = Annotated[
    list[float] | Literal["measured"],
    BeforeValidator(_parse_statistic),
    WithJsonSchema({"anyOf": [_NUMBERS, {"const": "measured"}]}),
]


class Crop(StrictModel):
    """Random resized crop: area as a fraction of the image, aspect ratio log-uniform.

    The ratio is relative to that of data.image_size.
    """

    scale: tuple[Share, Share] = Field(
        (0.35, 1.0), description="area of the crop over the image's, [smallest, largest]"
    )
    ratio: Range = Field((3 / 4, 4 / 3), description="width over height, [smallest, largest]")

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

    degrees: Annotated[float, Field(ge=0, le=360)] = Field(0.0, description="rotation in [-x, x]")
    translate: Fraction = Field(0.0, description="fraction of the image size")
    scale: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="zoom in [1-x, 1+x]")
    shear: Annotated[float, Field(ge=0, lt=90)] = Field(0.0, description="degrees")


class Jitter(StrictModel):
    """Colour jitter: factors in [1-x, 1+x]; hue as a fraction of the colour circle."""

    brightness: Fraction = Field(0.0, description="factor in [1-x, 1+x]")
    contrast: Fraction = Field(0.0, description="factor in [1-x, 1+x]")
    saturation: Fraction = Field(0.0, description="factor in [1-x, 1+x]")
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(0.0, description="turns, [-x, x]")


class ClassStrength(StrictModel):
    """By the number n of a class's training samples: (smallest n / n)^alpha, or `least` of it."""

    alpha: Positive = Field(0.5, description="1: a class of twice the samples half as often")
    least: Fraction = Field(0.2, description="no class takes part less often")


class Augment(StrictModel):
    """Device-side augmentation. A part that is null is off."""

    crop: Crop | None = Field(None, description="a random crop, resized to data.image_size")
    affine: Affine | None = Field(None, description="a small rotation, shift, zoom and shear")
    flip: Fraction = Field(0.0, description="probability of a horizontal flip")
    jitter: Jitter | None = Field(
        None, description="brightness, contrast, saturation and hue of each image"
    )
    ops: c.Ops = Field(
        [],
        description="further operations, in order; geometric ones join the one warp, erasing and "
        "cutout stand last. A name alone takes its defaults",
    )
    border: Literal["edge", "reflect", "mean", "black"] = Field(
        "edge", description="what shows beyond an image that affine or ops moved"
    )
    class_strength: ClassStrength | list[Fraction] | None = Field(
        None,
        description="augment rare classes more: the share of a class's images that each operation "
        "of jitter and ops changes, geometric ones left out; {alpha, least} by the number of "
        "samples, or a list in the order of classes.txt",
    )
    mixup: NonNegative = Field(0.0, description="alpha of the Beta distribution; 0 is off")
    cutmix: NonNegative = Field(0.0, description="alpha of the Beta distribution; 0 is off")
    mix_switch: Fraction | None = Field(
        None, description="share of images that cutmix gets where mixup is on too; null is 0.5"
    )
    mean: Statistic = Field(
        [0.485, 0.456, 0.406],
        description="per channel, of pixels in [0,1]; measured: that of the training split, as "
        "`bigbatch inspect --stats` has it, which the run's own recipe then says",
    )
    std: Statistic = Field([0.229, 0.224, 0.225], description="per channel, or measured")

    @property
    def pixel_mean(self) -> list[float]:
        """The mean as numbers, which a run's recipe has (data/measured.py)."""
        assert isinstance(self.mean, list), "it is measured before it is used"
        return self.mean

    @property
    def pixel_std(self) -> list[float]:
        assert isinstance(self.std, list), "it is measured before it is used"
        return self.std


def refusals(recipe: Any) -> Iterator[str]:
    """What a recipe's augmentation cannot do to its images."""
    for name in ("mean", "std"):
        values = getattr(recipe.augment, name)
        if values == "measured":
            if recipe.data.stream is not None:
                yield (
                    f"augment.{name}: measured looks at the training split, and a stream has none; "
                    "give one value per channel"
                )
        elif len(values) != recipe.data.channels:
            yield (
                f"augment.{name} has {len(values)} values for data.channels = "
                f"{recipe.data.channels}; give one value per channel"
            )
    mean, std = recipe.augment.mean, recipe.augment.std
    if any(abs(x) > _MOST for x in _numbers(mean)) or not all(
        1 / 1000 <= x <= _MOST for x in _numbers(std)
    ):
        yield (
            f"augment.mean {mean} and std {std} are no values of pixels in [0, 1]: divide those "
            "of pixels in 0..255 by 255, and give no channel a std below 0.001"
        )
    yield from _colourless(recipe)
    yield from _beside(recipe.augment)
    if isinstance(recipe.augment.class_strength, ClassStrength) and recipe.data.stream is not None:
        yield (
            "augment.class_strength goes by the number of samples, and a stream has no index to "
            "count them by; give a list with a number for each class"
        )
    for name in ("mixup", "cutmix"):
        if getattr(recipe.augment, name) and recipe.micro_batch == 1:
            yield (
                f"augment.{name} = {getattr(recipe.augment, name):g} mixes the images of a "
                f"micro-batch, and micro_batch is 1; set {name} to 0, or micro_batch to 2 or more"
            )
    for i, op in enumerate(recipe.augment.ops):
        size = recipe.data.smallest_size
        if isinstance(op, c.PadCrop) and op.padding >= min(height_width(size)):
            yield (
                f"augment.ops.{i}.padding = {op.padding} is no less than the images' "
                f"{in_words(size)} pixels: a crop may show nothing of the image; lower it"
            )
        if isinstance(op, c.Cutout) and op.size >= 2 * max(height_width(size)):
            yield (
                f"augment.ops.{i}.size = {op.size} covers every image of {in_words(size)} "
                "pixels; lower it"
            )


def _numbers(values: list[float] | str) -> list[float]:
    return values if isinstance(values, list) else []


def _colourless(recipe: Any) -> Iterator[str]:
    """Operations on colours that the images do not have."""
    channels, jitter = recipe.data.channels, recipe.augment.jitter
    if jitter is not None and channels == 1 and (jitter.hue or jitter.saturation):
        yield (
            "augment.jitter changes hue or saturation, and images of data.channels = 1 have no "
            "colour; set augment.jitter.hue and augment.jitter.saturation to 0, or data.channels "
            "to 3"
        )
    for i, op in enumerate(recipe.augment.ops):
        if isinstance(op, c.HSV | c.Grayscale) and channels != 3:
            yield (
                f"augment.ops.{i}: {op.name} needs three channels, and data.channels is "
                f"{channels}; drop it, or set data.channels to 3"
            )
        if isinstance(op, c.FancyPCA) and len(op.eigenvectors) != channels:
            yield (
                f"augment.ops.{i}: pca has eigenvectors of {len(op.eigenvectors)} channels, and "
                f"data.channels is {channels}; give a row for each channel"
            )


def _beside(augment: Augment) -> Iterator[str]:
    """What says something that another key leaves without a meaning."""
    moves = augment.affine not in (None, Affine()) or any(
        isinstance(op, _MOVING) for op in augment.ops
    )
    if augment.border != "edge" and not moves:
        yield (
            f"augment.border = {augment.border}, and nothing moves images beyond their edge; drop "
            "it, or add affine or an operation such as pad_crop to augment.ops"
        )
    if augment.mix_switch in (0, 1):
        off = "mixup" if augment.mix_switch else "cutmix"
        yield (
            f"augment.mix_switch = {augment.mix_switch:g} leaves nothing to {off}; set "
            f"augment.{off} to 0 instead"
        )
    if augment.mix_switch is not None and not (augment.mixup and augment.cutmix):
        yield (
            f"augment.mix_switch = {augment.mix_switch:g} chooses between mixup and cutmix, and "
            "not both are on; drop it, or set both"
        )
    listed = [op for op in augment.ops if not isinstance(op, c.Geometric)]
    if augment.class_strength is not None and augment.jitter is None and not listed:
        yield (
            "augment.class_strength says how often jitter and the operations of augment.ops change "
            "a class's images, and there are none but geometric ones, which it leaves out; drop "
            "it, or add operations, such as randaugment"
        )
    erasers = [isinstance(op, c.Eraser) for op in augment.ops]
    for i, op in enumerate(augment.ops):
        if not erasers[i] and not isinstance(op, c.Geometric) and any(erasers[:i]):
            first = augment.ops[erasers.index(True)].name
            yield (
                f"augment.ops.{i}: {op.name} would change what {first} filled in; put erasing and "
                "cutout last"
            )
