"""Small real data sets that the tests of this folder share."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bigbatch.data.index import Index
from bigbatch.data.writing.shard import shard
from tests.helpers.micro_batches import batches_of, by_place, pictures, write_shards


@pytest.fixture(scope="session")
def digits_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scikit-learn's digits as shards: train (4 shards), val and test (2 each)."""
    root = tmp_path_factory.mktemp("shards") / "digits"
    shard("digits", root, samples_per_shard=300, progress=False)
    return root


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLASS/NAME images: 3 classes of 12, JPEG and PNG, gray and RGB, 16 to 120 pixels."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number, name in enumerate(("cat", "dog", "tree frog")):
        (root / name).mkdir()
        for i in range(12):
            height, width = rng.integers(16, 121, 2)
            # Blurred noise: compresses like a picture, and no two images are alike.
            small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
            if (i + number) % 3 == 0:
                image = image.convert("L")
            image.save(root / name / f"{i:02d}.{'jpg' if i % 2 else 'png'}")
    return root


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """41 small pictures in three classes."""
    return write_shards(tmp_path_factory.mktemp("data") / "train", pictures())


@pytest.fixture(scope="session")
def reference(index: Index) -> dict[tuple[int, int], Any]:
    """Its micro-batches, by step and number, as one process makes them."""
    return by_place(batches_of(index))
