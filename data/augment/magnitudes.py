"""What a policy's magnitudes mean to each operation: timm's convention, and torchvision's.

Values are those that the operations take: slopes of shears, pixels of translations, degrees,
factors, bits, thresholds of 0..255. A sign of -1 or 1 is drawn beside each magnitude.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bigbatch.configs.size import Size, height_width

Values = npt.NDArray[np.float64]  # [n]

_PLAIN = ("identity", "autocontrast", "equalize", "invert")  # without a magnitude
_BLENDS = ("brightness", "color", "contrast", "sharpness")
# In timm's order (timm 1.0, _RAND_TRANSFORMS) and in torchvision's (RandAugment).
TIMM = (
    "autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add",
    "color", "contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x",
    "translate_y",
)  # fmt: skip
TORCHVISION = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness",
    "color", "contrast", "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
# torchvision's AugMix; what stands last was left out by the paper, being part of ImageNet-C.
AUGMIX = (
    "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "posterize", "solarize",
    "autocontrast", "equalize", "brightness", "color", "contrast", "sharpness",
)  # fmt: skip
AUGMIX_OWN = 9


class Space(NamedTuple):
    """How far torchvision's operations go at the largest magnitude."""

    shear: float
    translate: float  # share of the side; above 1 pixels
    rotate: float
    blend: float
    bits: tuple[int, int]  # of posterize at the smallest and the largest magnitude


STANDARD = Space(0.3, 150 / 331, 30, 0.9, (8, 4))  # RandAugment, AutoAugment
WIDE = Space(0.99, 32, 135, 0.99, (8, 2))  # TrivialAugmentWide
MIXED = Space(0.3, 1 / 3, 30, 0.9, (4, 0))  # AugMix


def torchvision(name: str, share: Values, sign: Values, space: Space, size: Size) -> Values:
    """Values at `share` of the largest magnitude, of torchvision's operations."""
    if name in ("shear_x", "shear_y"):
        return sign * share * space.shear
    if name in ("translate_x", "translate_y"):
        reach = space.translate * (1 if space.translate > 1 else _side(name, size))
        return np.trunc(sign * share * reach)
    if name == "rotate":
        return sign * share * space.rotate
    if name in _BLENDS:
        return 1 + sign * share * space.blend
    if name == "posterize":
        least, most = space.bits
        return np.round(least - share * (least - most))
    if name == "solarize":
        return 255 * (1 - share)
    return _none(name, share)


def timm(name: str, level: Values, sign: Values, increasing: bool, size: Size) -> Values:
    """Values at levels 0 to 10 of timm's operations; `increasing` is its inc1."""
    share = level / 10
    if name in ("shear_x", "shear_y"):
        return sign * share * 0.3
    if name in ("translate_x", "translate_y"):
        return sign * share * 0.45 * _side(name, size)
    if name == "rotate":
        return sign * share * 30
    if name in _BLENDS:
        return np.maximum(0.1, 1 + sign * share * 0.9) if increasing else share * 1.8 + 0.1
    if name == "posterize":
        bits = np.trunc(share * 4)
        return 4 - bits if increasing else bits
    if name == "solarize":
        threshold = np.minimum(256, np.trunc(share * 256))
        return 256 - threshold if increasing else threshold
    if name == "solarize_add":
        return np.minimum(128, np.trunc(share * 110))
    return _none(name, share)


def _side(name: str, size: Size) -> int:
    """The one along which a translation moves."""
    height, width = height_width(size)
    return width if name == "translate_x" else height


def _none(name: str, share: Values) -> Values:
    assert name in _PLAIN, name
    return np.zeros_like(share)
