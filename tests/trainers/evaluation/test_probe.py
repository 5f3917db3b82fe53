"""Closer looks at a network: what they record, and that ranks and batches do not matter."""

from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbatch.configs.augment import Augment
from bigbatch.configs.load import load_recipe
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.index import Index
from bigbatch.trainers.evaluation.evaluate import Evaluator
from bigbatch.trainers.evaluation.outcomes import outcomes_of
from bigbatch.trainers.evaluation.probe import Probe, by_class, dead_units
from tests.helpers.micro_batches import damage, pictures, write_shards

CPU = torch.device("cpu")
CLASSES = 3


@pytest.fixture
def split(tmp_path: Any) -> Index:
    return write_shards(tmp_path / "train", pictures())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 6, 5, 4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
    return body.append(nn.Linear(6 * 25, CLASSES)).train()


def look(
    model: nn.Module, split: Index, *, world: int = 1, batch: int = 64, images: int = 64
) -> dict[str, Any]:
    """What rank 0 of `world` records; each rank makes its pass, then rank 0 has all of them."""
    changes = ["data.image_size=24", "data.channels=3", "data.workers=0", f"evaluate.batch={batch}"]
    changes += ["augment.mean=[0.5,0.5,0.5]", "augment.std=[0.2,0.2,0.2]", "augment.jitter=null"]
    recipe = load_recipe("digits", changes, say=None)
    augmenter = Augmenter(
        Augment(), image_size=24, crop_fraction=1.0, classes=CLASSES, seed=0, device=CPU
    )
    logits = np.zeros((len(split), CLASSES), np.float32)
    record: dict[str, Any] = {}
    said: list[Any] = []
    for rank in reversed(range(world)):

        def gather(value: Any) -> list[Any]:
            said.append(value)
            return said

        engine: Any = SimpleNamespace(
            rank=rank,
            world=world,
            device=CPU,
            autocast=nullcontext,
            gather_values=gather,
            frozen=frozenset(),
        )
        splits = {"train": split, "val": split}
        probe = Probe(engine, Evaluator(engine, augmenter, recipe), splits, images, 1)
        record = probe.look(model, outcomes_of(logits, split.label.astype(np.int64)))
        assert bool(record) == (rank == 0)
    return record


def test_training_images_are_seen_as_validation_images_are(split: Index) -> None:
    model = network()
    record = look(model, split)
    assert model.training
    assert record["images"] == len(split) == 41
    assert record["train"]["samples"] == 41
    prior = np.array([9, 20, 12]) / 41
    assert record["prior_nll"] == pytest.approx(-(prior * np.log(prior)).sum())
    assert record["trained_mean"] == pytest.approx(41 / 3)
    assert look(model, split) == record  # no dropout, nor anything else by chance
    loss = record["train"]["nll"]
    with torch.no_grad():
        model[-1].bias += torch.tensor([0.0, 30.0, 0.0])  # type: ignore[operator]
    assert look(model, split)["train"]["accuracy"] == 20 / 41
    assert look(model, split)["train"]["nll"] > loss


@pytest.mark.parametrize(("world", "batch"), [(2, 8), (3, 5), (7, 8)])
def test_ranks_do_not_matter(split: Index, world: int, batch: int) -> None:
    """Also where some have no batch."""
    alone = look(network(), split, batch=batch, images=30)
    assert alone["images"] == 30
    assert look(network(), split, world=world, batch=batch, images=30) == alone


def test_what_cannot_be_read_is_left_out(split: Index) -> None:
    damage(split, [3, 17])
    assert look(network(), split)["train"]["samples"] == 39


def test_dead_units_by_layer_and_call() -> None:
    """One ReLU in two places; unit 1 is below 0 for all images, unit 2 for all but one."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.act(x)[..., 0, 0] - 2)  # type: ignore[no-any-return]

    x = torch.ones(5, 4, 2, 2)
    x[:, 1] = -1
    x[:, 2] = -1
    x[3, 2, 1, 1] = 4
    model = Twice()
    with dead_units(model) as alive:
        model(x[:3])
        model(x[3:])
    assert alive["act"].tolist() == [True, False, True, True]
    assert alive["act#2"].tolist() == [False] * 4
    assert set(alive) == {"act", "act#2"}
    with dead_units(model) as later:
        pass
    model(x)
    assert later == {}  # no hook is left


def test_where_nothing_learns_nothing_died() -> None:
    """Transfer: of what waits, by its gradient or by name, units are as they came."""
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))

    def layers(frozen: Sequence[str] = ()) -> set[str]:
        with dead_units(model, frozen) as alive:
            model(torch.ones(4, 3))
            model(torch.ones(2, 3))  # each pass begins anew
        return set(alive)

    assert layers() == {"1", "3"}
    assert layers(["0.weight", "0.bias"]) == {"3"}
    assert layers(["0.weight"]) == {"1", "3"}  # its bias learns
    model[0].requires_grad_(False)
    assert layers() == {"3"}
    assert layers(["2.weight", "2.bias"]) == set()


def test_classes_weigh_as_in_training() -> None:
    """A validation split that is even, of a training split that is not."""
    labels = np.array([0, 0, 1, 1, 2, 2])
    logits = np.log(np.array([[8, 1, 1], [8, 1, 1], [8, 1, 1], [1, 8, 1], [1, 1, 8], [8, 1, 1]]))
    val: Any = SimpleNamespace(label=labels, classes=("a", "b", "c", "none"))
    seen = outcomes_of(logits, labels)
    record = by_class(seen, val, np.array([80.0, 15.0, 5.0, 0.0]))
    recall = np.array([1, 0.5, 0.5])
    assert record["val"]["accuracy"] == pytest.approx([0.8, 0.15, 0.05] @ recall)
    nll = F.cross_entropy(torch.tensor(logits), torch.tensor(labels), reduction="none")
    by_label = nll.view(3, 2).mean(1).numpy()
    assert record["val"]["nll"] == pytest.approx([0.8, 0.15, 0.05] @ by_label)
    assert record["balanced_accuracy"] == pytest.approx(2 / 3)
    rows: Sequence[dict[str, Any]] = record["classes"]
    assert [(r["label"], r["recall"], r["trained"]) for r in rows] == [
        (1, 0.5, 15), (2, 0.5, 5), (0, 1.0, 80),
    ]  # fmt: skip
    assert "trained" not in by_class(seen, val, None)["classes"][0]
