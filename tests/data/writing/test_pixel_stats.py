"""Statistics of pixels, against all of them in one array."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from bigbatch.configs.augment_ops import FancyPCA
from bigbatch.configs.load import load_recipe
from bigbatch.data.index import open_index
from bigbatch.data.writing.pixel_stats import measure
from tests.helpers.micro_batches import damage, write_shards

SHAPES = ((20, 30), (20, 30), (8, 50), (40, 10), (7, 7)) * 5


def colours(gray: bool = False) -> list[np.ndarray]:
    """Pictures of unlike means, whose channels go together."""
    generator = np.random.default_rng(3)
    found = []
    for height, width in SHAPES:
        base = generator.normal(generator.uniform(60, 190), 30, (height, width, 1))
        own = generator.normal(0, 12, (height, width, 3)) * [1.0, 0.5, 1.5]
        pixels = np.broadcast_to(base, (height, width, 3)) if gray else base + own
        found.append(pixels.clip(0, 255).astype(np.uint8))
    return found


def shards(folder: Path, images: list[np.ndarray]) -> Path:
    def encoded(pixels: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    write_shards(folder, [(encoded(image), i % 2) for i, image in enumerate(images)])
    return folder


def moments(images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance over pixels that weigh 1 / (images x pixels of their image)."""
    pixels = np.concatenate([image.reshape(-1, image.shape[2]) for image in images]) / 255
    weights = np.concatenate([np.full(i.shape[0] * i.shape[1], 1 / i[..., 0].size) for i in images])
    return np.average(pixels, axis=0, weights=weights), np.cov(pixels.T, aweights=weights, ddof=0)


def test_every_image_counts_the_same(tmp_path: Path) -> None:
    images = colours()
    mean, covariance = moments(images)
    found = measure(shards(tmp_path / "data" / "train", images).parent)  # of DEST: its train
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(found.std, np.sqrt(covariance.diagonal()), rtol=1e-12)
    assert (found.images, found.of, found.unreadable) == (25, 25, 0)
    assert (found.mean_error == 0).all()
    rebuilt = found.eigenvectors @ np.diag(found.eigenvalues) @ found.eigenvectors.T
    np.testing.assert_allclose(rebuilt, covariance, atol=1e-12)
    assert (np.diff(found.eigenvalues) < 0).all()
    assert (found.eigenvectors[0] > 0).any()
    again = measure(tmp_path / "data" / "train", threads=3)
    assert all(np.array_equal(vars(again)[key], value) for key, value in vars(found).items())


def test_a_recipe_takes_what_is_measured(tmp_path: Path) -> None:
    found = measure(shards(tmp_path / "train", colours())).recipe(pca=True)
    (op,) = found["augment"]["ops"]
    FancyPCA.model_validate(op)
    recipe = load_recipe("imagenet-resnet50", [f"augment.mean={found['augment']['mean']}"])
    assert recipe.augment.mean == found["augment"]["mean"]
    assert "ops" not in measure(tmp_path / "train").recipe(pca=False)["augment"]


def test_some_images_are_always_the_same_and_say_how_sure_they_are(tmp_path: Path) -> None:
    images = colours()
    folder = shards(tmp_path / "train", images)
    some = measure(folder, images=10)
    assert some.images == 10
    assert np.array_equal(some.mean, measure(folder, images=10).mean)
    means = np.array([image.reshape(-1, 3).mean(0) / 255 for image in images])
    assert (some.mean_error > 0).all()
    assert (np.abs(some.mean - means.mean(0)) < 4 * some.mean_error).all()


def test_gray_images_are_measured_as_one_channel(tmp_path: Path) -> None:
    images = colours(gray=True)
    found = measure(shards(tmp_path / "train", images))
    assert found.recipe(pca=False)["data"] == {"channels": 1}
    np.testing.assert_allclose(found.mean, moments(images)[0][:1], rtol=1e-12)
    three = measure(tmp_path / "train", channels=3)
    assert three.mean.shape == (3,)
    FancyPCA.model_validate(three.recipe(pca=True)["augment"]["ops"][0])  # of one axis alone


def test_unreadable_images_are_left_out(tmp_path: Path) -> None:
    images = colours()
    folder = shards(tmp_path / "train", images)
    index = open_index(folder)
    damage(index, [3, 9])
    found = measure(folder)
    assert (found.images, found.unreadable) == (23, 2)
    kept = [image for i, image in enumerate(images) if i not in (3, 9)]
    np.testing.assert_allclose(found.mean, moments(kept)[0], rtol=1e-12)
