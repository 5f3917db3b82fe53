"""Policies: magnitudes against timm and torchvision, and what is drawn for each image."""

import random

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as v2
from PIL import Image
from timm.data import auto_augment as timm

from bigbatch.configs import augment_ops as c
from bigbatch.data.augment import magnitudes, policies
from bigbatch.data.augment.autoaugment import POLICIES
from bigbatch.data.augment.operation import Draws
from bigbatch.data.augment.policies import Steps, apply_steps

SIDE = 32
DRAWS = Draws(7, 3, 1, "policy")
BLACK = torch.zeros(3, 1, 1)
# Names of theirs.
TORCHVISION = {
    "identity": "Identity", "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateX",
    "translate_y": "TranslateY", "rotate": "Rotate", "brightness": "Brightness", "color": "Color",
    "contrast": "Contrast", "sharpness": "Sharpness", "posterize": "Posterize",
    "solarize": "Solarize", "autocontrast": "AutoContrast", "equalize": "Equalize",
    "invert": "Invert",
}  # fmt: skip
TIMM = TORCHVISION | {
    "solarize_add": "SolarizeAdd", "translate_x": "TranslateXRel", "translate_y": "TranslateYRel"
}  # fmt: skip
INCREASING = ("posterize", "solarize", "color", "contrast", "brightness", "sharpness")
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


def pictures(count=1):
    """Smooth, so that a pixel's neighbours are like it, in steps of 1/255."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=SIDE, mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().byte()


def one_step(name, value, images, fill=BLACK):
    steps = Steps((name,), np.zeros((1, len(images)), np.int64), np.full((1, len(images)), value))
    return apply_steps(images.float() / 255, steps, fill)


def test_the_sets_are_theirs():
    theirs = [name.removesuffix("Increasing") for name in timm._RAND_INCREASING_TRANSFORMS]
    assert [TIMM[name] for name in magnitudes.TIMM] == theirs == timm._RAND_TRANSFORMS
    for cls, names in (
        (v2.RandAugment, magnitudes.TORCHVISION),
        (v2.TrivialAugmentWide, magnitudes.TORCHVISION),
        (v2.AugMix, magnitudes.AUGMIX),
    ):
        assert [TORCHVISION[name] for name in names] == list(cls._AUGMENTATION_SPACE)
    partial = list(v2.AugMix._PARTIAL_AUGMENTATION_SPACE)
    assert [TORCHVISION[n] for n in magnitudes.AUGMIX[: magnitudes.AUGMIX_OWN]] == partial


@pytest.mark.parametrize(
    ("cls", "space", "bins"),
    [
        (v2.RandAugment, magnitudes.STANDARD, 31),
        (v2.AutoAugment, magnitudes.STANDARD, 10),
        (v2.TrivialAugmentWide, magnitudes.WIDE, 31),
        (v2.AugMix, magnitudes.MIXED, 10),
    ],
)
def test_magnitudes_are_torchvisions(cls, space, bins):
    blends = ("brightness", "color", "contrast", "sharpness")
    for name, theirs in TORCHVISION.items():
        if theirs not in cls._AUGMENTATION_SPACE:
            continue
        of_bins, signed = cls._AUGMENTATION_SPACE[theirs]
        given = of_bins(bins, 224, 224)
        for sign in (1.0, -1.0):
            share = np.arange(bins) / (bins - 1)
            found = magnitudes.torchvision(name, share, np.full(bins, sign), space, 224)
            if given is None:
                assert not found.any()
                continue
            expected = given.double().numpy() * (sign if signed else 1)
            if name in blends:
                expected = 1 + expected
            elif name == "solarize":
                expected = 255 * expected
            elif name.startswith("translate"):
                expected = np.trunc(expected + 1e-4 * sign)  # theirs in float32, as whole pixels
                found = np.trunc(found + 1e-4 * sign)
            np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("name", magnitudes.TIMM)
def test_magnitudes_are_timms(monkeypatch, name, increasing):
    theirs = TIMM[name] + ("Increasing" if increasing and name in INCREASING else "")
    of_level = timm.LEVEL_TO_ARG[theirs]
    levels = np.array([0, 1, 2.6, 5, 9, 9.7, 10])
    for sign in (1.0, -1.0):
        monkeypatch.setattr(random, "random", lambda s=sign: 0.9 if s < 0 else 0.1)
        found = magnitudes.timm(name, levels, np.full(7, sign), increasing, 200)
        expected = [0.0] * 7 if of_level is None else [of_level(x, {})[0] for x in levels]
        if name.startswith("translate"):
            expected = [x * 200 for x in expected]
        np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("name", magnitudes.TIMM)
def test_operations_are_timms(name):
    """On uint8 pictures. Geometry, bilinear, within the image: Pillow's rim is hard."""
    values = {"rotate": 27.0, "posterize": 3, "solarize": 90, "solarize_add": 60}
    value = values.get(name, 0.25 if "shear" in name else 5.5 if "translate" in name else 1.6)
    image = pictures()
    picture = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    operation = timm.NAME_TO_OP[TIMM[name]]
    given = () if name in ("autocontrast", "equalize", "invert") else (value,)
    if name.startswith("translate"):
        given = (value / SIDE,)
    options = {"resample": Image.Resampling.BILINEAR, "fillcolor": (0, 0, 0)}
    theirs = torch.from_numpy(np.array(operation(picture, *given, **options))).permute(2, 0, 1)
    found = one_step(name, value, image)[0] * 255
    difference = (found - theirs).abs()
    if name in GEOMETRIC:
        rim = one_step(name, value, torch.full_like(image, 255))[0] < 0.999
        assert rim.float().mean() < 0.4
        assert difference[~rim].max() <= 1.1
        dark = one_step(name, value, torch.full_like(image, 255))[0] == 0
        assert (theirs[dark] == 0).all()
    else:
        exact = ("equalize", "invert", "posterize", "solarize", "solarize_add")
        assert difference.max() <= (2e-3 if name in exact else 2.0)


@pytest.mark.parametrize("name", magnitudes.TORCHVISION)
def test_operations_are_torchvisions(name):
    values = {"rotate": 27.0, "posterize": 3, "solarize": 90, "translate_x": 5, "translate_y": -5}
    value = values.get(name, 0.25 if "shear" in name else 1.6)
    image = pictures()
    theirs = v2.RandAugment()._apply_image_or_video_transform(
        image,
        TORCHVISION[name],
        value - 1 if name in ("brightness", "color", "contrast", "sharpness")
        else value / 255 if name == "solarize" else value,
        v2.InterpolationMode.BILINEAR,
        {torch.Tensor: None},
    )  # fmt: skip
    # Of geometry, the direction of a sign is a matter of taste: both are as likely.
    found = [
        one_step(name, v, image) * 255 for v in ({value, -value} if name in GEOMETRIC else [value])
    ]
    inside = [
        one_step(name, v, torch.full_like(image, 255)) > 0.999
        for v in ({value, -value} if name in GEOMETRIC else [value])
    ]
    difference = [
        ((one - theirs).abs()[part if name in GEOMETRIC else ...]).max().item()
        for one, part in zip(found, inside, strict=True)
    ]
    assert min(difference) <= 2.0


def test_the_learned_policies_are_torchvisions():
    for name, pairs in POLICIES.items():
        theirs = v2.AutoAugment(v2.AutoAugmentPolicy[name.upper()])._policies
        ours = [tuple((TORCHVISION[s.name], s.p, s.level) for s in pair) for pair in pairs]
        assert ours == [tuple((n, p, m or 0) for n, p, m in pair) for pair in theirs]


POLICIES_OF = {
    "timm": c.RandAugment(name="randaugment", n=3),
    "torchvision": c.RandAugment(name="randaugment", n=3, convention="torchvision"),
    "trivial": c.TrivialAugment(name="trivialaugment"),
    "imagenet": c.AutoAugment(name="autoaugment", policy="imagenet"),
    "cifar10": c.AutoAugment(name="autoaugment", policy="cifar10"),
    "svhn": c.AutoAugment(name="autoaugment", policy="svhn"),
    "augmix": c.AugMix(name="augmix"),
}


def test_each_image_gets_operations_of_its_own_as_often_as_is_right():
    steps = policies.rand_augment(POLICIES_OF["timm"], DRAWS, 4000, SIDE)
    counts = np.bincount(steps.picks.ravel() + 1, minlength=16) / steps.picks.size
    assert counts[0] == pytest.approx(0.5, abs=0.02)  # not done
    assert counts[1:] == pytest.approx(np.full(15, 0.5 / 15), abs=0.006)
    steps = policies.rand_augment(POLICIES_OF["torchvision"], DRAWS, 4000, SIDE)
    counts = np.bincount(steps.picks.ravel(), minlength=14) / steps.picks.size
    assert counts == pytest.approx(np.full(14, 1 / 14), abs=0.01)
    steps = policies.trivial_augment(DRAWS, 4000, SIDE)
    assert steps.picks.shape == (1, 4000)
    rotated = steps.values[steps.picks == steps.names.index("rotate")]
    assert np.unique(np.abs(rotated)) == pytest.approx(np.arange(31) * 4.5)
    assert (rotated < 0).mean() == pytest.approx(0.48, abs=0.12)
    steps = policies.auto_augment(POLICIES_OF["svhn"], DRAWS, 4000, SIDE)
    first = np.bincount(steps.picks[0] + 1, minlength=len(steps.names) + 1)[1:] / 4000
    for number, name in enumerate(steps.names):
        share = sum(pair[0].p for pair in POLICIES["svhn"] if pair[0].name == name) / 25
        assert first[number] == pytest.approx(share, abs=0.03)


def test_timms_magnitude_varies_and_stays_in_range():
    policy = c.RandAugment(name="randaugment", n=1, magnitude=9, std=0.5)
    steps = policies.rand_augment(policy, DRAWS, 20000, SIDE)
    degrees = np.abs(steps.values[steps.picks == steps.names.index("rotate")])
    assert degrees.max() == pytest.approx(30)
    assert np.median(degrees) == pytest.approx(27, abs=0.3)
    assert degrees[degrees < 29.99].std() == pytest.approx(1.5, abs=0.3)


def test_augmixs_shares_are_those_of_its_paper():
    policy = c.AugMix(name="augmix", width=4, alpha=2.0, severity=2)
    own, weights, chains = policies.augmix(policy, DRAWS, 3000, SIDE)
    assert own + sum(weights) == pytest.approx(1)
    assert own.mean() == pytest.approx(0.5, abs=0.02)
    assert own.var() == pytest.approx(1 / 20, abs=0.005)  # of Beta(2, 2)
    assert [w.mean() for w in weights] == pytest.approx([0.125] * 4, abs=0.01)
    depth = (chains[0].picks >= 0).sum(0)
    assert np.bincount(depth, minlength=4) / 3000 == pytest.approx(
        [0, 1 / 3, 1 / 3, 1 / 3], abs=0.04
    )
    rotated = chains[1].values[chains[1].picks == chains[1].names.index("rotate")]
    assert np.unique(np.abs(rotated)) == pytest.approx([0, 30 / 9])  # bins 0 and 1 of 10
    shallow = policy.model_copy(update={"all_ops": False, "depth": 2})
    _, _, chains = policies.augmix(shallow, DRAWS, 300, SIDE)
    assert (chains[0].picks >= 0).all()
    assert "brightness" not in chains[0].names


@pytest.mark.parametrize("name", POLICIES_OF)
def test_a_policy_changes_images_within_range_and_by_its_key_alone(name):
    images = pictures(24).float() / 255
    found = policies.apply_policy(images.clone(), DRAWS, POLICIES_OF[name], BLACK)
    again = policies.apply_policy(images.clone(), DRAWS, POLICIES_OF[name], BLACK)
    other = policies.apply_policy(
        images.clone(), Draws(7, 3, 1, "policy", 1), POLICIES_OF[name], BLACK
    )
    assert torch.equal(found, again)
    assert not torch.equal(found, other)
    assert not torch.equal(found, images)
    assert found.min() >= -1e-6
    assert found.max() <= 1 + 1e-6


def test_grouped_by_operation_is_image_by_image():
    """Trap 9: grouping changes no image."""
    images = pictures(16).float() / 255
    steps = policies.rand_augment(POLICIES_OF["timm"], DRAWS, 16, SIDE)
    together = apply_steps(images.clone(), steps, BLACK)
    for i in range(16):
        one = Steps(steps.names, steps.picks[:, i : i + 1], steps.values[:, i : i + 1])
        alone = apply_steps(images[i : i + 1].clone(), one, BLACK)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=0)
