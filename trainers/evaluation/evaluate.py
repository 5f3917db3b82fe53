"""Exact distributed evaluation: every sample once, at any world size."""

import numpy as np
import torch
from torch import Tensor, nn

from bigbatch.configs.schema import Recipe
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.batch import Decoding, MicroBatch
from bigbatch.data.index import Index
from bigbatch.data.loader import eval_batches
from bigbatch.trainers.engine import Engine

# Images that go through a network together on a CPU: the activations of more leave the caches,
# which takes up to twice as long (benchmarks/predict.py). Also in inference/forward.py, so that a
# member gives there what it gave in its run.
_PART = 32
# Below this many images a rank decodes them itself, faster than workers could start.
_FEW_IMAGES = 2000


class Evaluator:
    """Runs a model over whole splits. Batch b goes to rank b % world, whatever the world."""

    def __init__(self, engine: Engine, augmenter: Augmenter, recipe: Recipe) -> None:
        self.engine = engine
        self.augmenter = augmenter
        self.data = recipe.data
        self.batch = recipe.evaluate.batch

    @torch.inference_mode()
    def logits(self, model: nn.Module, index: Index) -> np.ndarray | None:
        """Logits [N, C] in index order, float32, on rank 0; None on the other ranks."""
        engine, data = self.engine, self.data
        share = -(-len(index) // engine.world)
        decoding = Decoding(
            image_size=data.image_size,
            channels=data.channels,
            workers=data.workers if share > _FEW_IMAGES else 0,
            threads=data.threads,
            pin_memory=engine.device.type == "cuda",
            view=self.augmenter.eval_view,
        )
        batches = eval_batches(
            index, decoding, batch=self.batch, rank=engine.rank, world=engine.world
        )
        was_training = model.training
        model.eval()
        outputs = [self._outputs(model, batch) for batch in batches]
        model.train(was_training)

        classes = len(index.classes)
        rows = torch.cat(outputs) if outputs else torch.zeros(0, classes, device=engine.device)
        batch_count = -(-len(index) // self.batch)
        capacity = -(-batch_count // engine.world) * self.batch
        parts = engine.gather_rows(rows, capacity)
        if parts is None:
            return None
        # Rank r holds batches r, r + world, ...: their samples, in that order.
        starts = range(0, len(index), self.batch)
        samples = [np.arange(s, min(s + self.batch, len(index))) for s in starts]
        logits = np.empty((len(index), classes), np.float32)
        for rank, part in enumerate(parts):
            mine = samples[rank :: engine.world]
            if mine:
                logits[np.concatenate(mine)] = part
        return logits

    def _outputs(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Logits [B, C] of a batch, float32, on the device."""
        images = self.augmenter.evaluate(batch)  # before autocast, which would shift the crops
        with self.engine.autocast():
            outputs = in_parts(model, images)
        return outputs.float()


def in_parts(model: nn.Module, images: Tensor) -> Tensor:
    """Outputs [B, C] of a model in eval mode, on a CPU of a few images at a time."""
    if images.device.type != "cpu":
        outputs: Tensor = model(images)
        return outputs
    return torch.cat([model(part) for part in images.split(_PART)])
