"""RandAugment and its kin: which operation an image gets is drawn for each image.

Then all images of one operation are changed together, one operation after another, so that a
device works on batches here as elsewhere. A policy's steps follow each other: a geometric one
resamples what the step before it left, as in torchvision and timm.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bigbatch.configs.augment_ops import AugMix, AutoAugment, Policy, RandAugment, TrivialAugment
from bigbatch.configs.size import Size, height_width
from bigbatch.data import maps
from bigbatch.data.augment import magnitudes, tone
from bigbatch.data.augment.autoaugment import POLICIES
from bigbatch.data.augment.filters import sharpness
from bigbatch.data.augment.operation import (
    Draws,
    change_in_place,
    few_of,
    keep,
    per_image,
    size_of,
    to_device,
)
from bigbatch.data.augment.warp import shift_images, warp_images
from bigbatch.data.geometry import to_theta

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_BINS = 31  # of magnitudes in torchvision's RandAugment and TrivialAugment; elsewhere 10
_CHANCE = 0.5  # of each operation in timm's RandAugment


class Steps(NamedTuple):
    """What is done to each image, step by step: values [steps, B] of `names[picks]`; -1 is none."""

    names: tuple[str, ...]
    picks: Ints
    values: Floats


def apply_policy(images: Tensor, draws: Draws, policy: Policy, fill: Tensor) -> Tensor:
    """Images [B, C, H, W] in [0, 1], overwritten; `fill` [C, 1, 1] where one was moved away."""
    count, size = len(images), size_of(images)
    match policy:
        case RandAugment():
            return apply_steps(images, rand_augment(policy, draws, count, size), fill)
        case TrivialAugment():
            return apply_steps(images, trivial_augment(draws, count, size), fill)
        case AutoAugment():
            return apply_steps(images, auto_augment(policy, draws, count, size), fill)
        case AugMix():
            return _augmix(images, policy, draws, fill)


def rand_augment(policy: RandAugment, draws: Draws, count: int, size: Size) -> Steps:
    """Cubuk et al. 2020, with the set and the magnitudes of timm or of torchvision."""
    pick, chance, sign = draws.uniforms(3, policy.n, count)
    signs = _signs(sign)
    if policy.convention == "torchvision":
        share = np.full((policy.n, count), policy.magnitude / (_BINS - 1))
        picks = _floor(pick, len(magnitudes.TORCHVISION))
        return _torchvision(magnitudes.TORCHVISION, picks, share, signs, magnitudes.STANDARD, size)
    noise = draws.generator().standard_normal((policy.n, count))
    std = 0.5 if policy.std is None else policy.std
    levels = np.clip(policy.magnitude + std * noise, 0, 10)
    picks = np.where(chance < _CHANCE, _floor(pick, len(magnitudes.TIMM)), -1)

    def value(name: str, at: npt.NDArray[np.bool_]) -> Floats:
        return magnitudes.timm(name, levels[at], signs[at], policy.increasing is not False, size)

    return _steps(magnitudes.TIMM, picks, value)


def trivial_augment(draws: Draws, count: int, size: Size) -> Steps:
    """Mueller and Hutter 2021, with torchvision's wide ranges."""
    pick, magnitude, sign = draws.uniforms(3, 1, count)
    share = _floor(magnitude, _BINS) / (_BINS - 1)
    names = magnitudes.TORCHVISION
    picks = _floor(pick, len(names))
    return _torchvision(names, picks, share, _signs(sign), magnitudes.WIDE, size)


def auto_augment(policy: AutoAugment, draws: Draws, count: int, size: Size) -> Steps:
    """Cubuk et al. 2019: one of the pairs for each image, each operation with its probability."""
    pairs = POLICIES[policy.policy]
    names = tuple(sorted({step.name for pair in pairs for step in pair}))
    table = np.array([[(names.index(s.name), s.p, s.level) for s in pair] for pair in pairs])
    u = draws.uniforms(5, count)
    chosen = table[_floor(u[0], len(pairs))]  # [B, 2, 3]
    number, chance, level = np.moveaxis(chosen, 0, 2).transpose(1, 0, 2)  # each [2, B]
    picks = np.where(u[1:3] < chance, number.astype(np.int64), -1)
    return _torchvision(names, picks, level / 9, _signs(u[3:5]), magnitudes.STANDARD, size)


def _augmix(images: Tensor, policy: AugMix, draws: Draws, fill: Tensor) -> Tensor:
    """Hendrycks et al. 2020, algorithm 1, with torchvision's magnitudes."""
    own, weights, chains = augmix(policy, draws, len(images), size_of(images))
    shares = torch.from_numpy(np.stack([own, *weights]).astype(np.float32)).to(images.device)
    mixed = images * per_image(shares[0])
    for share, steps in zip(shares[1:], chains, strict=True):
        mixed.addcmul_(apply_steps(images.clone(), steps, fill), per_image(share))
    return mixed


def augmix(
    policy: AugMix, draws: Draws, count: int, size: Size
) -> tuple[Floats, list[Floats], list[Steps]]:
    """The share of the image itself [B], that of each chain [B], and the chains."""
    names = magnitudes.AUGMIX if policy.all_ops else magnitudes.AUGMIX[: magnitudes.AUGMIX_OWN]
    deepest = policy.depth or 3
    u = draws.uniforms(policy.width, 3 * deepest + 1, count)
    generator = draws.generator()
    mixed = generator.beta(policy.alpha, policy.alpha, count)
    weights = generator.dirichlet([policy.alpha] * policy.width, count) * mixed[:, None]
    chains = []
    for one in u:
        pick, magnitude, sign = one[1:].reshape(3, deepest, count)
        depth = np.full(count, deepest) if policy.depth else 1 + _floor(one[0], 3)
        picks = np.where(np.arange(deepest)[:, None] < depth, _floor(pick, len(names)), -1)
        share = _floor(magnitude, policy.severity) / 9
        steps = _torchvision(names, picks, share, _signs(sign), magnitudes.MIXED, size)
        chains.append(steps)
    return 1 - mixed, list(weights.T), chains


def apply_steps(images: Tensor, steps: Steps, fill: Tensor) -> Tensor:
    """The steps, one after another; in each, the images of one operation together."""
    values = to_device(steps.values, images.device)
    maps = to_device(_maps(steps, size_of(images)), images.device)
    few = few_of(images)
    if few == 1:
        for row, picks in enumerate(steps.picks.T.tolist()):
            image, one = images[row : row + 1], slice(row, row + 1)
            for step, number in enumerate(picks):
                if number >= 0:
                    given = values[step, one], maps[step, one]
                    keep(image, _change(steps.names[number], fill, image, *given))
        return images
    for start in range(0, len(images), few):
        here = slice(start, start + few)
        for step, picks in enumerate(steps.picks[:, here]):
            for number in np.unique(picks[picks >= 0]).tolist():
                rows = np.flatnonzero(picks == number)
                given = values[step, here][rows], maps[step, here][rows]
                change = partial(_change, steps.names[number], fill)
                change_in_place(images[here], rows, change, *given)
    return images


def _maps(steps: Steps, size: Size) -> npt.NDArray[np.float32]:
    """Of geometric operations, as `warp_images` takes them: [steps, B, 2, 3]."""
    maps = np.zeros((*steps.picks.shape, 2, 3), np.float32)
    for number, name in enumerate(steps.names):
        at = steps.picks == number
        if name in _GEOMETRIC and at.any():
            found = policy_map(name, steps.values[at], size)
            maps[at] = to_theta(found, size, height_width(size))
    return maps


_GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


def _change(name: str, fill: Tensor, images: Tensor, values: Tensor, maps: Tensor) -> Tensor:
    """One operation on images [n, C, H, W], overwritten, by values [n] or maps [n, 2, 3]."""
    if name == "identity":
        return images
    if name in _PLAIN:
        return _PLAIN[name](images)
    if name in _VALUED:
        return _VALUED[name](images, values)
    if name.startswith("translate") and len(images) == 1 and images.device.type == "cpu":
        return shift_images(images, values.item(), 3 if name == "translate_x" else 2, fill)
    return warp_images(images, maps, fill)


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "autocontrast": tone.autocontrast,
    "equalize": tone.equalize,
    "invert": tone.invert,
}
_VALUED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": tone.brightness,
    "color": tone.color,
    "contrast": tone.contrast,
    "posterize": tone.posterize,
    "sharpness": sharpness,
    "solarize": tone.solarize,
    "solarize_add": tone.solarize_add,
}


def policy_map(name: str, values: Floats, size: Size) -> maps.Matrices:
    """Where each pixel comes from; shears leave the top left corner in its place."""
    if name == "shear_x":
        return maps.linear(1, values, 0, 1)
    if name == "shear_y":
        return maps.linear(1, 0, values, 1)
    if name == "translate_x":
        return maps.translation(values, 0)
    if name == "translate_y":
        return maps.translation(0, values)
    return maps.rotation(values, size)


def _torchvision(
    names: tuple[str, ...],
    picks: Ints,
    share: Floats,
    signs: Floats,
    space: magnitudes.Space,
    size: Size,
) -> Steps:
    def value(name: str, at: npt.NDArray[np.bool_]) -> Floats:
        return magnitudes.torchvision(name, share[at], signs[at], space, size)

    return _steps(names, picks, value)


def _steps(
    names: tuple[str, ...],
    picks: Ints,
    value: Callable[[str, npt.NDArray[np.bool_]], Floats],
) -> Steps:
    values = np.zeros(picks.shape)
    for number, name in enumerate(names):
        at = picks == number
        values[at] = value(name, at)
    return Steps(names, picks, values)


def _floor(uniform: Floats, count: int) -> Ints:
    return np.floor(uniform * count).astype(np.int64)


def _signs(uniform: Floats) -> Floats:
    return np.where(uniform < 0.5, -1.0, 1.0)
