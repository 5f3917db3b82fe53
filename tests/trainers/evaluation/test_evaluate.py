"""Evaluation over whole splits: what the model is shown."""

import io
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bigbatch.configs.augment import Augment
from bigbatch.configs.load import load_recipe
from bigbatch.data.augment import pipeline
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.index import Index, draw_samples
from bigbatch.data.loader import eval_batches
from bigbatch.trainers.evaluation import evaluate
from bigbatch.trainers.evaluation.evaluate import Evaluator
from tests.helpers.micro_batches import write_shards

SIZES = 40
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Pictures of 40 random sizes, none of them square."""
    generator = np.random.default_rng(1)
    images = []
    for number in range(SIZES):
        height, width = generator.integers(40, 400, 2).tolist()
        small = generator.integers(0, 256, (height // 3, width // 3 + 1, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(small).resize((width + (width == height), height)).save(file, "JPEG")
        images.append((file.getvalue(), number % 4))
    return write_shards(tmp_path_factory.mktemp("photos") / "val", images)


def logits(index: Index, out: int, autocast: Any, inner: Any = nullcontext) -> np.ndarray:
    """What an engine that computes under `autocast`, in the model under `inner`, scores."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())
    body.append(nn.LazyLinear(4))

    class Model(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert images.dtype == torch.float32
            with inner():
                result: torch.Tensor = body(images)
            return result

    model = Model()
    with torch.no_grad():
        body(torch.zeros(1, 3, out, out))
    found = evaluator(out, autocast).logits(model, index)
    assert found is not None
    return found


def evaluator(out: int, autocast: Any, batch: int = 1) -> Evaluator:
    recipe = load_recipe("digits", [f"data.image_size={out}", "data.channels=3",
                                    "augment.mean=[0.5,0.5,0.5]", "augment.std=[0.2,0.2,0.2]",
                                    "data.workers=0", f"evaluate.batch={batch}"])  # fmt: skip
    augmenter = Augmenter(
        Augment(), image_size=out, crop_fraction=0.875, classes=4, seed=0, device=CPU
    )
    engine: Any = SimpleNamespace(
        rank=0, world=1, device=CPU, autocast=autocast, gather_rows=lambda rows, _: [rows.numpy()]
    )
    return Evaluator(engine, augmenter, recipe)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out", [29, 56])
def test_logits_are_those_of_float32_crops(
    photos: Index, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, out: int
) -> None:
    """With the way of a device, at every size; evaluate.batch 1, so each has its own canvas."""
    monkeypatch.setattr(pipeline, "nearly_whole", lambda boxes: np.zeros(len(boxes), bool))

    def reduced() -> torch.autocast:
        return torch.autocast("cpu", dtype)

    expected = logits(photos, out, nullcontext, reduced)
    found = logits(photos, out, reduced)
    assert found.shape == (SIZES, 4)
    assert np.abs(found - expected).max() < 1e-3
    assert np.abs(found).max() > 0.1


def test_several_sets_of_weights_give_what_each_gives_alone(photos: Index) -> None:
    """Also where the model writes into its input, and under the caller's own autocast."""

    class Model(nn.Sequential):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = super().forward(images.mul_(0.5))
            return result

    torch.manual_seed(0)
    models = [
        Model(nn.Conv2d(3, 4, 5, stride=4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(196, 4))
        for _ in range(3)
    ]
    for number, model in enumerate(models):
        nn.init.constant_(model[1].running_mean, number)
    weights = [{n: t.clone() for n, t in model.state_dict().items()} for model in models]
    for outer in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with outer:
            tool = evaluator(29, nullcontext, batch=16)
            alone = [tool.logits(model, photos) for model in models]
            passes = tool.batches(models[0], photos, weights)
            together = np.concatenate([found for _, found in passes], axis=1)
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one, other)
        assert not np.array_equal(together[0], together[2])
        models[0].load_state_dict(weights[0])


def test_batches_shrink_where_classes_are_many(
    photos: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 images of 100,000 classes are 100 MB of logits of each member."""
    assert evaluate.fitting_batch(256, 1000, CPU) == 256
    assert evaluate.fitting_batch(256, 50_000, CPU) == 64
    assert evaluate.fitting_batch(256, 10**9, CPU) == 32
    assert evaluate.fitting_batch(48, 10**9, CPU) == 48  # whose parts would be others
    assert evaluate.fitting_batch(256, 10**9, torch.device("cuda")) == 256
    models = [nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)) for _ in range(2)]
    weights = [{n: t.clone() for n, t in model.state_dict().items()} for model in models]
    sizes, found = [], []
    for most in (2**22, 1):
        monkeypatch.setattr(evaluate, "_LOGITS", most)
        batches = list(evaluator(16, nullcontext, batch=64).batches(models[0], photos, weights))
        sizes.append([logits.shape for _, logits in batches])
        found.append(np.concatenate([logits for _, logits in batches], axis=1))
    assert sizes == [[(2, 40, 4)], [(2, 32, 4), (2, 8, 4)]]
    # Crops are cut from the canvas of a batch.
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-4)


def test_few_images_are_decoded_for_the_first_evaluation_alone(
    photos: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each split, whose parts have its hash; and where the model writes into its input."""

    class Model(nn.Flatten):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images.mul_(0.5))[:, :4]

    def counted(*args: Any, **options: Any) -> Any:
        decoded.append(args[0])
        return eval_batches(*args, **options)

    decoded = list[Index]()
    monkeypatch.setattr(evaluate, "eval_batches", counted)
    tool, part = evaluator(29, nullcontext, batch=16), draw_samples(photos, 17, 1)
    whole, some = tool.logits(Model(), photos), tool.logits(Model(), part)
    for _ in range(2):
        np.testing.assert_array_equal(tool.logits(Model(), photos), whole)
        np.testing.assert_array_equal(tool.logits(Model(), part), some)
    assert len(decoded) == 2
    assert decoded[0] is photos
    assert decoded[1] is part
