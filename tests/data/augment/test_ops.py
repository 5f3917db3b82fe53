"""The list `augment.ops`: what each does in the pipeline, and what it leaves alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from bigbatch.configs import augment_ops as c
from bigbatch.configs.augment import Augment, Crop, Jitter
from bigbatch.data.augment.operation import few_of, on_rows
from tests.data.augment.test_pipeline import PLAIN, augmenter, batch_of

# Each operation, as it is bound to change every image.
EVERY: dict[str, dict[str, Any]] = {
    "rotate": {},
    "shear": {},
    "translate": {},
    "scale": {},
    "perspective": {"p": 1},
    "vertical_flip": {"p": 1},
    "pad_crop": {"padding": 3},
    "hsv": {},
    "grayscale": {"p": 1},
    "pca": {},
    "blur": {"p": 1, "sigma": [1, 2]},
    "sharpen": {"p": 1, "factor": [2, 3]},
    "noise": {"p": 1, "std": [0.05, 0.1]},
    "solarize": {"p": 1},
    "posterize": {"p": 1},
    "equalize": {"p": 1},
    "autocontrast": {"p": 1},
    "invert": {"p": 1},
    "randaugment": {"n": 4},
    "trivialaugment": {},
    "autoaugment": {"policy": "imagenet"},
    "augmix": {},
    "erasing": {"p": 1},
    "cutout": {"size": 6},
}
POLICIES = ("randaugment", "trivialaugment", "autoaugment", "augmix")
# Another value of each key, which gives other images.
CHANGED: dict[str, dict[str, Any]] = {
    "rotate": {"p": 0.5, "degrees": 90},
    "shear": {"p": 0.5, "x": 40, "y": 30},
    "translate": {"p": 0.5, "x": 0.4, "y": 0.4},
    "scale": {"p": 0.5, "factor": [0.5, 0.6]},
    "perspective": {"p": 0.5, "distortion": 0.2},
    "vertical_flip": {"p": 0.5},
    "pad_crop": {"p": 0.5, "padding": 5},
    "hsv": {"p": 0.5, "hue": 0.4, "saturation": 0.1, "value": 0.1},
    "grayscale": {"p": 0.5},
    "pca": {
        "p": 0.5,
        "std": 0.5,
        "eigenvalues": [0.1, 0.2, 0.3],
        "eigenvectors": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    },
    "blur": {"p": 0.5, "sigma": [0.5, 0.6]},
    "sharpen": {"p": 0.5, "factor": [0, 0.5]},
    "noise": {"p": 0.5, "std": [0.2, 0.3]},
    "solarize": {"p": 0.5, "threshold": 40},
    "posterize": {"p": 0.5, "bits": 2},
    "equalize": {"p": 0.5},
    "autocontrast": {"p": 0.5},
    "invert": {"p": 0.5},
    "randaugment": {
        "n": 1, "magnitude": 3, "convention": "torchvision", "std": 3, "increasing": False,
        "fill": "black",
    },
    "trivialaugment": {"fill": "black"},
    "autoaugment": {"policy": "svhn", "fill": "black"},
    "augmix": {
        "severity": 9, "width": 1, "depth": 1, "alpha": 5, "all_ops": False, "fill": "black"
    },
    "erasing": {
        "p": 0.5, "area": [0.5, 0.6], "ratio": [1, 1], "count": 4, "fill": "black"
    },
    "cutout": {"p": 0.5, "size": 3, "fill": "black"},
}  # fmt: skip


def batch(step: int = 0, count: int = 12):
    return batch_of([(20, 20)] * count, step=step)


def images(*ops: dict[str, Any], step: int = 0, **options: Any) -> torch.Tensor:
    augment = Augment(ops=list(ops), **{"mean": [0.5] * 3, "std": [1.0] * 3} | options)
    return augmenter(augment, out=20).images(batch(step))


def test_every_operation_is_here():
    assert set(EVERY) == {op.model_fields["name"].annotation.__args__[0] for op in c.OPS}
    for op in c.OPS:
        name = op.model_fields["name"].annotation.__args__[0]
        assert {*CHANGED[name]} == {*op.model_fields} - {"name"}, name
        assert op.__doc__, name


@pytest.mark.parametrize("name", EVERY)
def test_each_changes_images_and_stays_in_range(name):
    found, plain = images({"name": name, **EVERY[name]}), images()
    changed = (found != plain).flatten(1).any(1)
    assert changed.float().mean() > (0.5 if name in ("trivialaugment", "autoaugment") else 0.9)
    assert found.dtype == torch.float32
    assert found.min() >= -1e-6
    assert found.max() <= 1 + 1e-6


@pytest.mark.parametrize("name", EVERY)
def test_each_key_changes_something(name):
    first = {"name": name, **EVERY[name]}
    for key, value in CHANGED[name].items():
        other = {**first, key: value}
        one, two = images(first), images(other)
        assert not torch.equal(one, two), (name, key)


@pytest.mark.parametrize("name", EVERY)
def test_two_of_a_name_draw_apart(name):
    one = {"name": name, **EVERY[name]} | ({"p": 0.5} if "p" in CHANGED[name] else {})
    once, twice = images(one), images(one, one)
    if name in ("invert", "vertical_flip"):  # with the same draws they would undo each other
        assert not torch.equal(twice, images())
    assert not torch.equal(once, twice)


@pytest.mark.parametrize("name", [name for name in EVERY if name not in POLICIES])
def test_an_operation_more_changes_no_draws_of_the_others(name):
    """Those before it undo each other: twice upside down, and all pixels inverted twice."""
    one = {"name": name, **EVERY[name]}
    around = [
        {"name": "invert", "p": 1},
        {"name": "solarize", "p": 1, "threshold": 0},
        {"name": "vertical_flip", "p": 1},
        {"name": "vertical_flip", "p": 1},
    ]
    torch.testing.assert_close(images(*around, one), images(one), atol=2e-4, rtol=0)


def test_a_list_leaves_jitter_crop_and_mixup_as_they_were():
    old = Augment(crop=Crop(), jitter=Jitter(brightness=0.4), mixup=0.3, **PLAIN)
    new = old.model_copy(update={"ops": [c.Cutout(name="cutout", size=1)]})
    first, second = (augmenter(one, out=20) for one in (old, new))
    assert torch.equal(first.train(batch())[1], second.train(batch())[1])
    different = (first.images(batch()) != second.images(batch())).any(1).sum((1, 2))
    assert different.tolist() == [1] * 12  # one pixel each


def test_a_name_alone_takes_its_defaults():
    ops = TypeAdapter(c.Ops).validate_python(["grayscale", {"name": "cutout"}])
    assert ops == [c.Grayscale(name="grayscale"), c.Cutout(name="cutout")]


def test_the_result_depends_on_the_key_alone():
    every = [{"name": name, **values} for name, values in EVERY.items()]
    first, again, later = images(*every), images(*every), images(*every, step=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


@pytest.mark.parametrize("rows", [[], [3], [0, 1, 2], [1, 4, 5], list(range(7))])
def test_rows_are_changed_in_parts_or_at_once_alike(monkeypatch, rows):
    source = torch.rand(7, 3, 8, 8)
    values = np.arange(len(rows), dtype=float)
    changed = []

    def add(some, value, way):
        return way(some, value[:, None, None, None])

    for way in (torch.Tensor.add_, torch.add):
        for cached in (1, 400, 10**6):
            monkeypatch.setattr("bigbatch.data.augment.operation._CACHED", cached)
            assert few_of(source) == max(1, cached // 192)
            found = on_rows(
                source.clone(), np.array(rows, int), lambda s, v, way=way: add(s, v, way), values
            )
            changed.append(found)
    expected = source.clone()
    expected[rows] += torch.from_numpy(values).float()[:, None, None, None]
    assert all(torch.equal(one, expected) for one in changed)


def test_a_batch_is_augmented_alike_however_it_is_stored():
    """As decoded by another worker: the same samples at another resolution show the same crop."""
    every = [{"name": n, **EVERY[n]} for n in ("rotate", "perspective", "pad_crop", "solarize")]
    one = augmenter(Augment(ops=every, **PLAIN), out=20)
    whole = batch()
    assert torch.equal(one.images(whole), one.images(replace(whole, stored=whole.frames)))
