"""The operations of `augment.ops`: each a name and its values; data/augment does them.

p is the probability with which an image takes part, each by a draw of its own.
"""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from bigbatch.configs.part import Count, Fraction, NonNegative, Positive, Range, Share, StrictModel

Fill = Literal["mean", "black"]
_Degrees = Annotated[float, Field(ge=0, lt=90)]


class _Op(StrictModel):
    p: Share = Field(1.0, description="probability, each image for itself")


def _in_order(**ranges: tuple[float, float]) -> None:
    for name, (low, high) in ranges.items():
        if low > high:
            raise ValueError(f"{name} [{low:g}, {high:g}]: put the lower bound first")


class Rotate(_Op):
    """About the centre, by an angle uniform in [-degrees, degrees]."""

    name: Literal["rotate"]
    degrees: Annotated[float, Field(gt=0, le=180)] = Field(15.0, description="largest angle")


class Shear(_Op):
    """About the centre, by angles uniform in [-x, x] along rows and [-y, y] along columns."""

    name: Literal["shear"]
    x: _Degrees = Field(10.0, description="degrees")
    y: _Degrees = Field(0.0, description="degrees")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.x and not self.y:
            raise ValueError("x and y are 0: nothing is sheared; set one of them, or drop shear")
        return self


class Translate(_Op):
    """By shares of the input size uniform in [-x, x] and [-y, y]."""

    name: Literal["translate"]
    x: Fraction = Field(0.1, description="share of the width")
    y: Fraction = Field(0.1, description="share of the height")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.x and not self.y:
            raise ValueError("x and y are 0: nothing moves; set one of them, or drop translate")
        return self


class Scale(_Op):
    """About the centre, by a factor whose logarithm is uniform; 2 shows twice as large."""

    name: Literal["scale"]
    factor: Range = Field((0.8, 1.25), description="[smallest, largest]")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _in_order(factor=self.factor)
        if self.factor[0] < 0.1 or self.factor[1] > 10:
            low, high = self.factor
            raise ValueError(f"factor [{low:g}, {high:g}]: stay within [0.1, 10]")
        return self


class Perspective(_Op):
    """Each corner drawn inwards by up to distortion / 2 of the side, as torchvision does."""

    name: Literal["perspective"]
    p: Share = Field(0.5, description="probability, each image for itself")
    # Beyond 2/3 four corners can form a shape with a dent, which no perspective gives.
    distortion: Annotated[float, Field(gt=0, le=0.6)] = Field(
        0.5, description="share of the sides, twice the corners' way"
    )


class VerticalFlip(_Op):
    """Upside down: for images without an up, from above or through a microscope."""

    name: Literal["vertical_flip"]
    p: Share = Field(0.5, description="probability, each image for itself")


class PadCrop(_Op):
    """A window at any whole pixel of the image with `padding` around it (He et al. 2016, 4.2).

    What stands in the padding is `augment.border`.
    """

    name: Literal["pad_crop"]
    padding: Count = Field(4, description="pixels of the input size, on each side")


class HSV(_Op):
    """Hue shifted, saturation and value multiplied, each by a draw of its own per image."""

    name: Literal["hsv"]
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(0.015, description="turns, [-x, x]")
    saturation: Fraction = Field(0.7, description="factor in [1-x, 1+x]")
    value: Fraction = Field(0.4, description="factor in [1-x, 1+x]")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.hue or self.saturation or self.value):
            raise ValueError("hue, saturation and value are 0: set one of them, or drop hsv")
        return self


class Grayscale(_Op):
    """Luma (0.299 R + 0.587 G + 0.114 B) in all three channels."""

    name: Literal["grayscale"]
    p: Share = Field(0.2, description="probability, each image for itself")


class FancyPCA(_Op):
    """Along the principal axes of the data's colours (Krizhevsky et al. 2012, section 4.1).

    Adds sum_i a_i lambda_i v_i to every pixel, a_i ~ N(0, std). The defaults are ImageNet's,
    of pixels in [0, 1], as fb.resnet.torch gives them.
    """

    name: Literal["pca"]
    std: Positive = Field(0.1, description="of a_i")
    eigenvalues: list[NonNegative] = Field(
        [0.2175, 0.0188, 0.0045], description="lambda_i, of pixels in [0, 1]"
    )
    eigenvectors: list[list[float]] = Field(
        [
            [-0.5675, 0.7192, 0.4009],
            [-0.5808, -0.0045, -0.8140],
            [-0.5836, -0.6948, 0.4203],
        ],
        description="a row per channel, a column v_i per eigenvalue",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(len(row) != len(self.eigenvalues) for row in self.eigenvectors):
            raise ValueError(
                f"eigenvectors need a column for each of {len(self.eigenvalues)} eigenvalues "
                "in every row"
            )
        return self


class Blur(_Op):
    """Gaussian, sigma uniform in pixels; the kernel reaches 3 of the largest sigma."""

    name: Literal["blur"]
    p: Share = Field(0.5, description="probability, each image for itself")
    sigma: Range = Field((0.1, 2.0), description="pixels of the input size")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _in_order(sigma=self.sigma)
        if self.sigma[1] > 20:
            raise ValueError(f"sigma up to {self.sigma[1]:g}: stay at or below 20 pixels")
        return self


class Sharpen(_Op):
    """Away from the smoothed image, by a factor uniform in a range: 1 changes nothing."""

    name: Literal["sharpen"]
    p: Share = Field(0.5, description="probability, each image for itself")
    factor: tuple[NonNegative, NonNegative] = Field(
        (1.0, 2.0), description="0 is smoothed, 2 is twice as far from it as the image"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        _in_order(factor=self.factor)
        if self.factor == (1, 1):
            raise ValueError("factor [1, 1] changes nothing; widen it, or drop sharpen")
        return self


class Noise(_Op):
    """Gaussian noise, a value for every pixel and channel; its std is uniform per image."""

    name: Literal["noise"]
    p: Share = Field(0.5, description="probability, each image for itself")
    std: tuple[NonNegative, Share] = Field((0.0, 0.1), description="of pixels in [0, 1]")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _in_order(std=self.std)
        return self


class Solarize(_Op):
    """Pixels at or above a threshold inverted."""

    name: Literal["solarize"]
    p: Share = Field(0.2, description="probability, each image for itself")
    threshold: Annotated[int, Field(ge=0, le=255)] = Field(128, description="of 0..255")


class Posterize(_Op):
    """Only the highest bits of each pixel."""

    name: Literal["posterize"]
    p: Share = Field(0.2, description="probability, each image for itself")
    bits: Annotated[int, Field(ge=1, le=7)] = Field(4, description="how many stay, of 8")


class Equalize(_Op):
    """Histogram equalisation of each channel, as Pillow's, on steps of 1/255."""

    name: Literal["equalize"]
    p: Share = Field(0.2, description="probability, each image for itself")


class AutoContrast(_Op):
    """Each channel stretched over [0, 1]."""

    name: Literal["autocontrast"]
    p: Share = Field(0.2, description="probability, each image for itself")


class Invert(_Op):
    """The negative."""

    name: Literal["invert"]
    p: Share = Field(0.1, description="probability, each image for itself")


class RandAugment(StrictModel):
    """n operations of 14 or 15, drawn for each image, at one magnitude (Cubuk et al. 2020).

    Magnitudes mean what the `convention` says. timm's go to 10, each operation is done with
    probability 1/2, and its solarize, posterize and colour operations grow stronger with the
    magnitude only where `increasing`; torchvision's go to 30, and each is done.
    """

    name: Literal["randaugment"]
    n: Count = Field(2, description="operations on each image")
    magnitude: NonNegative = Field(9.0, description="how strong, by the convention")
    convention: Literal["timm", "torchvision"] = Field(
        "timm", description="whose magnitudes: 9 is 9/10 of the range in timm, 9/30 in torchvision"
    )
    std: NonNegative | None = Field(
        None, description="of timm's magnitude, per operation: its mstd; null is 0.5"
    )
    increasing: bool | None = Field(
        None, description="timm's inc1: stronger with magnitude throughout; null is true"
    )
    fill: Fill = Field("mean", description="where an image was moved away: augment.mean, or 0")

    @model_validator(mode="after")
    def _check(self) -> Self:
        most = 10 if self.convention == "timm" else 30
        if self.magnitude > most:
            raise ValueError(
                f"magnitude {self.magnitude:g} is above {most}, {self.convention}'s largest; "
                f"lower it, or set convention"
            )
        if self.convention == "torchvision":
            if self.std is not None or self.increasing is not None:
                raise ValueError("std and increasing are timm's; drop them, or convention")
            if self.magnitude != int(self.magnitude):
                raise ValueError(f"magnitude {self.magnitude:g}: torchvision's are whole; round it")
        return self


class TrivialAugment(StrictModel):
    """One operation of 14, at a random magnitude of its wide range (Mueller and Hutter 2021)."""

    name: Literal["trivialaugment"]
    fill: Fill = Field("mean", description="where an image was moved away: augment.mean, or 0")


class AutoAugment(StrictModel):
    """One of 25 learned pairs of operations for each image (Cubuk et al. 2019, appendix)."""

    name: Literal["autoaugment"]
    policy: Literal["imagenet", "cifar10", "svhn"] = Field(
        description="the data set that it was learned on"
    )
    fill: Fill = Field("mean", description="where an image was moved away: augment.mean, or 0")


class AugMix(StrictModel):
    """The image mixed with chains of operations on it (Hendrycks et al. 2020, algorithm 1)."""

    name: Literal["augmix"]
    severity: Annotated[int, Field(ge=1, le=10)] = Field(
        3, description="how strong each operation is"
    )
    width: Count = Field(3, description="chains")
    depth: Annotated[int, Field(ge=1, le=10)] | None = Field(
        None, description="operations in a chain; null draws 1 to 3"
    )
    alpha: Positive = Field(1.0, description="of the Dirichlet and Beta distributions")
    all_ops: bool = Field(
        True,
        description="also brightness, color, contrast and sharpness, as no test of ImageNet-C"
        " allows",
    )
    fill: Fill = Field("mean", description="where an image was moved away: augment.mean, or 0")


class Erasing(_Op):
    """A random rectangle replaced (Zhong et al. 2020), after all else but mixing.

    Its area is a share of the image's, the logarithm of its ratio of sides uniform. `mean`
    becomes 0 by normalisation; `noise` is normal by augment.mean and std: timm's pixel mode.
    """

    name: Literal["erasing"]
    p: Share = Field(0.25, description="probability, each image for itself")
    area: tuple[Share, Share] = Field((0.02, 1 / 3), description="share of the image's area")
    ratio: Range = Field((0.3, 1 / 0.3), description="width over height, [smallest, largest]")
    count: Annotated[int, Field(ge=1, le=20)] = Field(1, description="rectangles share the area")
    fill: Literal["mean", "black", "noise"] = Field("mean", description="what the rectangle shows")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _in_order(area=self.area, ratio=self.ratio)
        return self


class Cutout(_Op):
    """A square replaced whose centre is any pixel (DeVries and Taylor 2017), after all else
    but mixing. What leads beyond the image is cut off."""

    name: Literal["cutout"]
    size: Count = Field(16, description="side in pixels of the input size")
    fill: Fill = Field("mean", description="what the square shows")


Geometric = Rotate | Shear | Translate | Scale | Perspective | VerticalFlip | PadCrop
Policy = RandAugment | TrivialAugment | AutoAugment | AugMix
Eraser = Erasing | Cutout
Op = (
    Geometric
    | HSV
    | Grayscale
    | FancyPCA
    | Blur
    | Sharpen
    | Noise
    | Solarize
    | Posterize
    | Equalize
    | AutoContrast
    | Invert
    | Policy
    | Eraser
)
OPS: tuple[type[StrictModel], ...] = get_args(Op)


def _from_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Ops = list[Annotated[Annotated[Op, Field(discriminator="name")], BeforeValidator(_from_name)]]
