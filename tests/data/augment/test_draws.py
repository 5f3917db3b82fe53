"""What is drawn for a micro-batch, pinned: a resumed run, or one of a new version, must not notice.

Draws are compared with values that were written down; pixels too, but loosely, since vector
code for bytes differs a little from CPU to CPU. The order and the keys are spelled out once
more, independently, and that is compared to the last bit.
"""

import hashlib
from dataclasses import replace

import kornia.enhance as enhance
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bigbatch.configs.augment import Affine, Augment, Crop, Jitter
from bigbatch.data.augment import colour, tone
from bigbatch.data.augment.operation import Draws, Operation
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.batch import MicroBatch
from bigbatch.data.geometry import View
from bigbatch.data.rng import key64, uniforms

SEED, STEP, INDEX, OUT = 7, 12, 3, 16
SHAPES = [(20, 30), (64, 48), (33, 33), (90, 17), (16, 16), (51, 70)]
JITTER = Jitter(brightness=0.3, contrast=0.2, saturation=0.4, hue=0.1)
AFFINE = Affine(degrees=10, translate=0.1, scale=0.1, shear=5)
RECIPES = {
    "crop and flip": Augment(crop=Crop(), flip=0.5),
    "affine, jitter and mixup": Augment(affine=AFFINE, jitter=JITTER, mixup=0.3),
    "gray": Augment(
        crop=Crop(),
        flip=0.5,
        jitter=Jitter(brightness=0.9, contrast=0.5),
        mixup=1.0,
        mean=[0.5],
        std=[0.2],
    ),
}

# Written down with the code as it was before operations had names (commit b6a09d9).
UNIFORMS = {
    "crop": "78987d199139138d",
    "affine": "f51f2c9ff29607ed",
    "flip": "68ccc5020d653aec",
    "jitter": "8b6481291901ee12",
    "partner": "b49e0a38cb7eeb97",
}
BOXES = [5.16458438687, 1.29681977648, 23.2521562981, 18.4267198575,
         0.0, 33.6666666667, 17.0, 22.6666666667]  # fmt: skip
WARPS = [-0.992888151351, 0.245793837707, 14.178281911,
         0.162139304459, 0.979227309677, -0.34424057523,
         -1.01011582316, 0.117765817268, 13.9179693487,
         0.121834296005, 1.01060653941, 0.39860676011]  # fmt: skip
IMAGES = {
    "crop and flip": [-0.0153, -0.2195, 0.0108],
    "affine, jitter and mixup": [-0.2631, -0.3062, -0.0971],
    "gray": [-0.4011, -1.1127, 0.4082],
}
TARGETS = {
    "crop and flip": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0],
    "affine, jitter and mixup": [1.0, 0.0, 0.8438359, 0.0, 0.6646423, 0.0],
    "gray": [1.0, 0.0, 0.4574059, 0.0, 0.4864178, 0.0],
}


def batch_of(channels):
    pixels = [uniforms((h * w * channels,), "image", h, w) for h, w in SHAPES]
    return MicroBatch(
        step=STEP,
        index=INDEX,
        samples=np.arange(len(SHAPES)),
        labels=torch.arange(len(SHAPES)) % 4,
        pixels=torch.from_numpy((np.concatenate(pixels) * 256).astype(np.uint8)),
        sizes=torch.tensor(SHAPES, dtype=torch.int32),
        channels=channels,
    )


def augmenter(augment):
    return Augmenter(
        augment,
        image_size=OUT,
        crop_fraction=0.875,
        classes=4,
        seed=SEED,
        device=torch.device("cpu"),
    )


def augmented(name):
    augment = RECIPES[name]
    return augmenter(augment).train(batch_of(len(augment.mean)))


def projections(images):
    """Three sums over the images in which every pixel has a weight of its own."""
    weights = uniforms((3, images.numel()), "weights") - 0.5
    return weights @ images.numpy().ravel().astype(float) / np.sqrt(images.numel())


@pytest.mark.parametrize("name", ["crop", "affine", "flip", "jitter", "partner"])
def test_uniform_draws_are_those_of_the_first_version(name):
    drawn = uniforms((6, 5), SEED, STEP, INDEX, name).astype("<f8").tobytes()
    assert hashlib.sha256(drawn).hexdigest()[:16] == UNIFORMS[name]


def test_boxes_and_warps_are_those_of_the_first_version():
    view = View(OUT, 0.875, Crop(), AFFINE, 0.5, SEED)
    boxes = view.boxes(np.array(SHAPES), STEP, INDEX)
    assert boxes[[0, 3]].ravel().tolist() == pytest.approx(BOXES, rel=1e-10, abs=1e-9)
    warps = view.warps(len(SHAPES), STEP, INDEX)
    assert warps[[1, 4], :2].ravel().tolist() == pytest.approx(WARPS, rel=1e-10)


@pytest.mark.parametrize("name", RECIPES)
def test_images_and_targets_are_those_of_the_first_version(name):
    images, targets = augmented(name)
    assert projections(images).tolist() == pytest.approx(IMAGES[name], abs=2e-3)
    assert targets[:, 0].tolist() == pytest.approx(TARGETS[name], abs=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_operations_follow_each_other_by_their_keys(name):
    augment, key = RECIPES[name], (SEED, STEP, INDEX)
    batch = batch_of(len(augment.mean))
    geometry = augment.model_copy(update={"jitter": None, "mixup": 0.0})
    images = augmenter(geometry).images(batch)
    count = len(images)
    if augment.jitter is not None:
        drawn = uniforms((4, count), *key, "jitter") * 2 - 1
        parts = "brightness", "contrast", "saturation", "hue"
        most = np.array([[getattr(augment.jitter, part)] for part in parts])
        light, contrast, colour, hue = torch.from_numpy((drawn * most).astype(np.float32))
        images = enhance.adjust_brightness_accumulative(images, 1 + light)
        images = enhance.adjust_contrast_with_mean_subtraction(images, 1 + contrast)
        if augment.jitter.hue:
            images = enhance.adjust_saturation_with_gray_subtraction(images, 1 + colour)
            images = enhance.adjust_hue(images, hue * (2 * torch.pi))
    assert torch.equal(augmenter(augment).images(batch), images)
    targets = F.one_hot(batch.labels, 4).float()
    if augment.mixup:
        other = np.argsort(uniforms((count,), *key, "partner"))
        generator = np.random.Generator(np.random.Philox(key=key64(*key, "mixup")))
        drawn = generator.beta(augment.mixup, augment.mixup, count).astype(np.float32)
        share = torch.from_numpy(drawn)
        targets = share[:, None] * targets + (1 - share[:, None]) * targets[other]
        share = share[:, None, None, None]
        images = share * images + (1 - share) * images[other]
    mean, std = (torch.tensor(v)[:, None, None] for v in (augment.mean, augment.std))
    found = augmenter(augment).train(batch)
    assert torch.equal(found[0], (images - mean) / std)
    assert torch.equal(found[1], targets)


def test_another_operation_changes_no_draws_of_the_others():
    batch = batch_of(3)
    every = Augment(affine=AFFINE, crop=Crop(), flip=0.5, jitter=JITTER, mixup=0.3)
    for without in ("jitter", "flip", "crop", "affine"):
        fewer = every.model_copy(update={without: 0.0 if without == "flip" else None})
        assert torch.equal(augmenter(fewer).train(batch)[1], augmenter(every).train(batch)[1])
    one, other = augmenter(every).view, augmenter(every.model_copy(update={"affine": None})).view
    sizes = np.array(SHAPES)
    assert np.array_equal(one.boxes(sizes, STEP, INDEX), other.boxes(sizes, STEP, INDEX))
    mirrored = [np.linalg.det(v.warps(len(SHAPES), STEP, INDEX)) < 0 for v in (one, other)]
    assert np.array_equal(*mirrored)


def test_an_operation_more_changes_no_draws_wherever_it_stands(monkeypatch):
    """Of a name that stands there already, or that geometry has: as a second one of its name."""
    augment, batch = RECIPES["affine, jitter and mixup"], batch_of(3)
    drawn = {}

    def spy(name):
        def apply(images, draws):
            drawn[name, draws.occurrence] = draws.uniforms(len(images))
            return images

        return Operation(name, apply)

    expected = augmenter(augment).train(batch)
    (jitter,) = colour.operations(augment)
    monkeypatch.setattr(
        colour,
        "operations",
        lambda _: [spy("solarise"), jitter, spy("jitter"), spy("flip"), spy("solarise")],
    )
    found = augmenter(augment).train(batch)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    places = [("solarise", 0), ("jitter", 1), ("flip", 1), ("solarise", 1)]
    assert list(drawn) == places
    first = uniforms((len(SHAPES),), SEED, STEP, INDEX, "solarise")
    again = uniforms((len(SHAPES),), SEED, STEP, INDEX, "solarise", 1)
    assert np.array_equal(drawn["solarise", 0], first)
    assert np.array_equal(drawn["solarise", 1], again)
    taken = [uniforms((len(SHAPES),), SEED, STEP, INDEX, n) for n in (*UNIFORMS, "mixup")]
    assert len({values.tobytes() for values in [*drawn.values(), *taken]}) == 10


def test_no_other_key_gives_the_same_images():
    batch = batch_of(3)
    images = augmenter(RECIPES["crop and flip"]).images(batch)
    for changes in ({"step": STEP + 1}, {"index": INDEX + 1}):
        other = augmenter(RECIPES["crop and flip"]).images(replace(batch, **changes))
        assert not torch.equal(images, other)


def test_bits_do_not_depend_on_the_number_of_threads():
    """Threads share the sums of large images, and a sum's bits depend on how it is shared."""
    images = torch.from_numpy(uniforms((3, 3, 224, 224), "large").astype(np.float32))
    draws, factors = Draws(SEED, STEP, INDEX, "jitter"), torch.tensor([0.5, 1.5, 1.9])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            jittered = colour.jitter(images.clone(), draws, Jitter(contrast=0.5))
            alone = [tone.contrast(images[i : i + 1].clone(), factors[i : i + 1]) for i in range(3)]
            found.append((jittered, torch.cat(alone)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for one in found for a, b in zip(one, found[0], strict=True))
