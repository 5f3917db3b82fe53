"""Exact distributed evaluation: every sample once, at any world size."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from bigbatch.configs.schema import Recipe
from bigbatch.configs.size import height_width
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.batch import Decoding
from bigbatch.data.index import Index
from bigbatch.data.loader import eval_batches
from bigbatch.trainers.engine import Engine

# Images that go through a network together on a CPU: the activations of more leave the caches,
# which takes up to twice as long (benchmarks/predict.py). Also in inference/forward.py, so that a
# member gives there what it gave in its run.
_PART = 32
# Below this many images a rank decodes them itself, faster than workers could start.
FEW_IMAGES = 2000
_REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Evaluator:
    """Runs a model over whole splits. Batch b goes to rank b % world, whatever the world."""

    def __init__(self, engine: Engine, augmenter: Augmenter, recipe: Recipe) -> None:
        self.engine = engine
        self.augmenter = augmenter
        self.data = recipe.data
        self.batch = recipe.evaluate.batch

    def decoding(self, workers: int) -> Decoding:
        """How images are decoded to be evaluated."""
        data = self.data
        return Decoding(
            image_size=max(height_width(self.augmenter.eval_view.out)),
            channels=data.channels,
            workers=workers,
            threads=data.threads,
            pin_memory=self.engine.device.type == "cuda",
            view=self.augmenter.eval_view,
        )

    def logits(self, model: nn.Module, index: Index) -> np.ndarray | None:
        """Logits [N, C] in index order, float32, on rank 0; None on the other ranks."""
        found = self._logits(model, index, [{}])
        return None if found is None else found[0]

    def logits_of(
        self, model: nn.Module, index: Index, weights: Sequence[Mapping[str, Tensor]]
    ) -> list[np.ndarray] | None:
        """The same for each set of weights, with every image decoded once.

        Leaves the last set in `model`. A set is copied into it anew for each batch: so the device
        holds one model, however many sets there are, which may lie on the host or in a file.
        """
        return self._logits(model, index, weights)

    @torch.inference_mode()
    def _logits(
        self, model: nn.Module, index: Index, weights: Sequence[Mapping[str, Tensor]]
    ) -> list[np.ndarray] | None:
        engine = self.engine
        share = -(-len(index) // engine.world)
        decoding = self.decoding(self.data.workers if share > FEW_IMAGES else 0)
        batches = eval_batches(
            index, decoding, batch=self.batch, rank=engine.rank, world=engine.world
        )
        was_training = model.training
        model.eval()
        outputs: list[list[Tensor]] = [[] for _ in weights]
        for batch in batches:
            images = self.augmenter.evaluate(batch)  # before autocast, which would shift the crops
            for tensors, found in zip(weights, outputs, strict=True):
                if tensors:
                    model.load_state_dict(tensors)
                    torch.clear_autocast_cache()  # the caller's may hold the former weights
                # A model may write into what it is given, and the next one needs it.
                own = images.clone() if len(weights) > 1 else images
                with engine.autocast():
                    found.append(in_parts(model, own).float())
        model.train(was_training)

        gathered = []
        for found in outputs:
            none = torch.zeros(0, len(index.classes), device=engine.device)
            rows = torch.cat(found) if found else none
            gathered.append(gather_in_order(engine, rows, len(index), self.batch))
        return [rows for rows in gathered if rows is not None] if engine.rank == 0 else None


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A recipe's precision, whatever the engine's is."""
    dtype = _REDUCED.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def in_parts(model: nn.Module, images: Tensor) -> Tensor:
    """Outputs [B, C] of a model in eval mode, on a CPU of a few images at a time."""
    if images.device.type != "cpu":
        outputs: Tensor = model(images)
        return outputs
    return torch.cat([model(part) for part in images.split(_PART)])


def gather_in_order(engine: Engine, rows: Tensor, count: int, batch: int) -> np.ndarray | None:
    """The rows [count, K] of all samples, in their order, on rank 0; None elsewhere. Collective.

    `rows` [n, K] are this rank's: of batches rank, rank + world, ... of `batch` samples each.
    """
    batches = -(-count // batch)
    capacity = min(count, -(-batches // engine.world) * batch)
    parts = engine.gather_rows(rows, capacity)
    if parts is None:
        return None
    together = np.concatenate(parts)
    numbers = [n for rank in range(engine.world) for n in range(rank, batches, engine.world)]
    samples = [np.arange(n * batch, min((n + 1) * batch, count)) for n in numbers]
    ordered = np.empty_like(together)
    ordered[np.concatenate([np.zeros(0, np.int64), *samples])] = together
    return ordered
