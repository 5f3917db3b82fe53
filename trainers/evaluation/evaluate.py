"""Exact distributed evaluation: every sample once, at any world size."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bigbatch.configs.schema import Recipe
from bigbatch.configs.size import height_width
from bigbatch.configs.targets import learns_numbers
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.batch import Decoding, MicroBatch
from bigbatch.data.index import Index
from bigbatch.data.kept import KeptBatches
from bigbatch.data.loader import eval_batches
from bigbatch.data.order import Positions
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.evaluation.metrics import Labels, Logits
from bigbatch.trainers.evaluation.outcomes import (
    Collected,
    Outcomes,
    from_rows,
    outcomes_of,
    to_rows,
)
from bigbatch.trainers.evaluation.statistics import Statistics
from bigbatch.trainers.evaluation.targets import (
    Distributions,
    Numbers,
    TargetOutcomes,
    distributions_of,
    log_softmax,
    mean_distributions_of,
    numbers_of,
)
from bigbatch.trainers.planning.targets import target_scaling

# Images that go through a network together on a CPU: the activations of more leave the caches,
# which takes up to twice as long (benchmarks/predict.py). Also in inference/forward.py, so that a
# member gives there what it gave in its run.
_PART = 32
# Below this many images a rank decodes them itself, faster than workers could start.
FEW_IMAGES = 2000
# Logits of a batch at most: 16 MB for each member.
_LOGITS = 2**22
# Logits that a rank keeps to go through them once more; more are computed again.
KEPT_BYTES = 2**28
Found = Outcomes | TargetOutcomes  # of labels, or of what stands in their place
_REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Evaluator:
    """Runs a model over whole splits. Batch b goes to rank b % world, whatever the world."""

    def __init__(self, engine: Engine, augmenter: Augmenter, recipe: Recipe) -> None:
        self.engine = engine
        self.augmenter = augmenter
        self.data = recipe.data
        self.batch = recipe.evaluate.batch
        self.scaling = target_scaling(recipe)  # None: labels are learned
        self._kind = kind_of(recipe)
        # By the id of an index, which therefore stands beside them.
        self._passes = dict[int, tuple[Index, KeptBatches]]()

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

    def outcomes(self, model: nn.Module, index: Index) -> Found | None:
        """What a model says of each sample, in index order, on rank 0; None on the other ranks.

        No rank holds more logits than those of a batch. Collective.
        """
        if self.scaling is None:
            found = Collected()
            for samples, logits in self.batches(model, index):
                found.add(outcomes_of(logits[0], labels_of(index, samples)))
            return gather_outcomes(self.engine, found.whole(), len(index), self.batch_of(index))
        parts = [
            self.judged(outputs[0], index, samples)
            for samples, outputs in self.batches(model, index)
        ]
        return self.gather(parts, index)

    def width(self, index: Index) -> int:
        """How many numbers a network gives for an image of `index`."""
        if self.scaling is None or index.target is None:
            return len(index.classes)
        return index.target.shape[1]

    def judged(self, outputs: npt.NDArray[np.floating], index: Index, samples: Positions) -> Found:
        """Outputs [n, C] of a network beside what is true of these samples of `index`."""
        if self.scaling is None:
            return outcomes_of(outputs, labels_of(index, samples))
        assert index.target is not None, "the start looks at the index"
        if self._kind is Numbers:
            return numbers_of(outputs, index.target[samples], self.scaling)
        return distributions_of(log_softmax(outputs), index.target[samples])

    def mean_judged(self, outputs: Logits, index: Index, samples: Positions) -> TargetOutcomes:
        """The same of the mean of several networks' numbers or shares, from [M, n, K]."""
        assert self.scaling is not None
        assert index.target is not None
        if self._kind is Numbers:
            mean = outputs.astype(np.float64).mean(0)
            return numbers_of(mean, index.target[samples], self.scaling)
        return mean_distributions_of(outputs, index.target[samples])

    def gather(self, parts: Sequence[Found], index: Index) -> TargetOutcomes | None:
        """What is said of targets, of all samples of a split in their order, on rank 0; `parts` are
        this rank's batches. Collective."""
        own = [part for part in parts if not isinstance(part, Outcomes)]
        return gather_targets(self.engine, self._kind, own, index, self.batch_of(index))

    def logits(self, model: nn.Module, index: Index) -> np.ndarray | None:
        """Logits [N, C] in index order, float32, on rank 0; None on the others. For few classes."""
        found = [torch.zeros(0, len(index.classes))]
        found += [torch.from_numpy(logits[0]) for _, logits in self.batches(model, index)]
        rows = torch.cat(found).to(self.engine.device)
        return gather_in_order(self.engine, rows, len(index), self.batch_of(index))

    def batch_of(self, index: Index) -> int:
        """How many images of a split make a batch of `batches`."""
        return fitting_batch(self.batch, self.width(index), self.engine.device)

    @torch.inference_mode()
    def batches(
        self, model: nn.Module, index: Index, weights: Sequence[Mapping[str, Tensor]] = ({},)
    ) -> Iterator[tuple[Positions, Logits]]:
        """This rank's batches: samples [n], and their logits [M, n, C] by each set of weights.

        Every image is decoded once, and few ones not again for the next call. Leaves the last set
        in `model`; none stands for the weights that it has. A set is copied into it anew for each
        batch: so the device holds one model, however many sets there are, which may lie on the host
        or in a file.
        """
        engine = self.engine
        share = -(-len(index) // engine.world)
        decoding = self.decoding(self.data.workers if share > FEW_IMAGES else 0)
        size = self.batch_of(index)
        own = len(range(engine.rank, -(-len(index) // size), engine.world))
        _, kept = self._passes.setdefault(id(index), (index, KeptBatches()))

        def decoded() -> Iterator[MicroBatch]:
            return eval_batches(index, decoding, batch=size, rank=engine.rank, world=engine.world)

        was_training = model.training
        model.eval()
        for batch in kept.through(decoded, own):
            images = self.augmenter.evaluate(batch)  # before autocast, which would shift the crops
            found = np.empty((len(weights), len(images), self.width(index)), np.float32)
            for logits, tensors in zip(found, weights, strict=True):
                if tensors:
                    model.load_state_dict(tensors)
                    torch.clear_autocast_cache()  # the caller's may hold the former weights
                # A model may write into what it is given, and the next one needs it.
                given = images.clone() if len(weights) > 1 else images
                with engine.autocast():
                    logits[...] = in_parts(model, given).float().cpu().numpy()
            yield batch.samples, found
        model.train(was_training)


class Again:
    """What an iterator gives, as often as it is gone through: kept if its numbers, of float32,
    take few bytes, else made anew."""

    def __init__(
        self, make: Callable[[], Iterator[tuple[Positions, Logits]]], numbers: int
    ) -> None:
        self._make = make
        self._few = 4 * numbers <= KEPT_BYTES
        self._kept: list[tuple[Positions, Logits]] | None = None

    def __iter__(self) -> Iterator[tuple[Positions, Logits]]:
        if self._kept is not None:
            yield from self._kept
            return
        if not self._few:
            yield from self._make()
            return
        kept = []
        for item in self._make():
            kept.append(item)
            yield item
        self._kept = kept


def labels_of(index: Index, samples: Positions) -> Labels:
    return index.label[samples].astype(np.int64)


def gather_outcomes(engine: Engine, own: Outcomes, count: int, batch: int) -> Outcomes | None:
    """Outcomes of all samples in their order on rank 0, of `gather_in_order`'s batches."""
    rows = torch.from_numpy(to_rows(own)).to(engine.device)
    ordered = gather_in_order(engine, rows, count, batch)
    return None if ordered is None else from_rows(ordered)


def kind_of(recipe: Recipe) -> type[TargetOutcomes]:
    """What is kept of a recipe that learns targets."""
    return Numbers if learns_numbers(recipe) else Distributions


def gather_targets(
    engine: Engine,
    kind: type[TargetOutcomes],
    own: Sequence[TargetOutcomes],
    index: Index,
    batch: int,
) -> TargetOutcomes | None:
    """Of all samples of a split in their order on rank 0, of `gather_in_order`'s batches."""
    assert index.target is not None, "the start looks at the index"
    nothing = np.zeros((0, 2 * index.target.shape[1] if kind is Numbers else 2))
    rows = torch.from_numpy(np.concatenate([nothing, *(part.rows() for part in own)]))
    ordered = gather_in_order(engine, rows.to(engine.device), len(index), batch)
    return None if ordered is None else kind.of_rows(ordered)


def gather_statistics(engine: Engine, own: Statistics, count: int, batch: int) -> Statistics | None:
    """Statistics of all samples on rank 0, where each rank has those of its batches. Collective."""
    if engine.world == 1:
        return own
    sums = own.sums()
    parts = {str(i): torch.from_numpy(each) for i, each in enumerate(sums)}
    for each, total in zip(sums, engine.sum_by_name(parts).values(), strict=True):
        each[...] = total.cpu().numpy()
    for sparse in own.sparse_sums():
        rows = torch.from_numpy(sparse.rows()).to(engine.device)
        gathered = engine.gather_rows(rows, max(engine.gather_values(len(rows))))
        if gathered is not None:
            sparse.put(gathered)
    found = [gather_outcomes(engine, each, count, batch) for each in own.outcomes()]
    if engine.rank != 0:
        return None
    own.put([each for each in found if each is not None])
    return own


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A recipe's precision, whatever the engine's is."""
    dtype = _REDUCED.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def in_parts(model: nn.Module, images: Tensor) -> Tensor:
    """Outputs [B, C] of a model in eval mode, on a CPU of a few images at a time."""
    if images.device.type != "cpu":
        outputs: Tensor = model(images)
        return outputs
    parts = images.split(_PART)
    return model(images) if len(parts) == 1 else torch.cat([model(part) for part in parts])


def fitting_batch(batch: int, classes: int, device: torch.device) -> int:
    """A batch; on a CPU a smaller one where its logits of so many classes would take over 16 MB.

    It goes by classes alone, and holds whole parts of those that go through a network together: so
    a member gives everywhere what it gave in its run.
    """
    if device.type != "cpu" or batch % _PART:
        return batch
    return min(batch, max(_PART, _LOGITS // classes // _PART * _PART))


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
