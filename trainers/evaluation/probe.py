"""A closer look at the network at a few evaluations, for the diagnosis of a run.

Some images of the training split go through it as validation images do: so that training and
validation are compared under the same conditions, which the training loss (augmented, mixed,
smoothed, with dropout) cannot give. Which units answered to none of them is seen on the way. All
of it follows from weights and recipe: it is the same at any world size.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bigbatch.data.index import Index, draw_samples
from bigbatch.data.loader import eval_batches
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.evaluation.evaluate import Evaluator, Found, in_parts
from bigbatch.trainers.evaluation.outcomes import Outcomes

_BATCH = 64  # images that one rank takes at a time
_WORST = 10  # classes that a record names
_ZEROING = (nn.ReLU, nn.ReLU6, nn.Threshold)  # below 0 their gradient is 0: units may die


class Probe:
    """Looks at `images` of the training split; without one (a stream), of the validation split."""

    def __init__(
        self, engine: Engine, evaluator: Evaluator, splits: dict[str, Index], images: int, seed: int
    ) -> None:
        self._engine, self._evaluator = engine, evaluator
        self._val, self._train = splits["val"], splits.get("train")
        self._seen = draw_samples(self._train or self._val, images, seed, "probe")

    def look(self, model: nn.Module, found: Found | None) -> dict[str, Any]:
        """What to record of `model`; `found` is what it says of the validation split, on rank 0.

        Collective; empty on the other ranks. `train` and `val` hold accuracy, nll and samples, the
        latter with each class weighed by its share of the training samples, so that a difference
        is none of shares. `dead` is the share of units, by layer, that were 0 for all images;
        where nothing before a layer learns in this step (transfer), nothing can have died. Of
        targets, `errors` holds the scores of both splits instead.
        """
        with dead_units(model, self._engine.frozen) as alive:
            own = self._pass(model)
        every = self._engine.gather_values((own, {k: v.tolist() for k, v in alive.items()}))
        if self._engine.rank != 0 or found is None:
            return {}
        record: dict[str, Any] = {"images": len(self._seen)}
        counts = None if self._train is None else self._train.class_counts.astype(np.float64)
        rows = sorted(row for part, _ in every for row in part)  # by place: any world's order
        if not isinstance(found, Outcomes):
            train = type(found).of_rows(np.array([row[1:] for row in rows])) if rows else found
            errors = {"train": train.scores(), "val": found.scores()}
            return record | {"dead": _shares([dead for _, dead in every]), "errors": errors}
        if counts is not None:
            shares = counts[counts > 0] / counts.sum()
            record |= {
                "prior_nll": float(-(shares * np.log(shares)).sum()),
                "trained_mean": float(counts.mean()),
                "train": {
                    "accuracy": sum(right for _, right, _ in rows) / max(1, len(rows)),
                    "nll": math.fsum(nll for _, _, nll in rows) / max(1, len(rows)),
                    "samples": len(rows),
                },
            }
        record["dead"] = _shares([dead for _, dead in every])
        return record | by_class(found, self._val, counts)

    def _pass(self, model: nn.Module) -> list[tuple[Any, ...]]:
        """(place, right, -log p) of each of this rank's images; of targets its row of outcomes."""
        engine, index = self._engine, self._seen
        outcomes: list[tuple[Any, ...]] = []
        was_training = model.training
        model.eval()
        batches = eval_batches(
            index,
            self._evaluator.decoding(0),
            batch=min(_BATCH, self._evaluator.batch),
            rank=engine.rank,
            world=engine.world,
            leave_out_bad=True,  # training goes on without them, and so does this
        )
        with torch.inference_mode(), engine.autocast():
            for batch in batches:
                if not len(batch.samples):
                    continue
                logits = in_parts(model, self._evaluator.augmenter.evaluate(batch)).float()
                seen = self._evaluator.judged(logits.cpu().numpy(), index, batch.samples)
                columns: list[list[Any]]
                if isinstance(seen, Outcomes):
                    columns = [seen.correct.tolist(), seen.losses.tolist()]
                else:
                    columns = seen.rows().T.tolist()
                outcomes += zip(batch.samples.tolist(), *columns, strict=True)
        model.train(was_training)
        return outcomes


def _shares(alive: Sequence[dict[str, list[bool]]]) -> dict[str, float]:
    """By layer, the share of units that were above 0 for no rank's images."""
    layers: dict[str, npt.NDArray[np.bool_]] = {}
    for units in alive:
        for name, values in units.items():
            row = np.array(values, dtype=bool)
            layers[name] = layers.get(name, np.zeros_like(row)) | row
    return {name: float(1 - row.mean()) for name, row in layers.items()}


def by_class(
    found: Outcomes, val: Index, trained: npt.NDArray[np.float64] | None
) -> dict[str, Any]:
    """Recalls of the validation split: `val`, their mean, and the `classes` that are worst off.

    `trained` are the training samples of each class [C], by which `val` weighs classes.
    """
    labels, count = found.label, len(val.classes)
    samples = np.bincount(labels, minlength=count)
    there = samples > 0
    hits = np.bincount(labels, found.correct, minlength=count)
    losses = np.bincount(labels, found.losses, minlength=count)
    recall, nll = hits[there] / samples[there], losses[there] / samples[there]
    weight = (samples if trained is None else trained)[there].astype(np.float64)
    weight /= max(1.0, float(weight.sum()))
    worst = np.flatnonzero(there)[np.argsort(recall, kind="stable")[:_WORST]]
    return {
        "val": {
            "accuracy": float(weight @ recall),
            "nll": float(weight @ nll),
            "samples": len(labels),
        },
        "balanced_accuracy": float(recall.mean()),
        "classes": [
            {
                "label": int(c),
                "name": val.classes[c],
                "recall": float(hits[c] / samples[c]),
                "samples": int(samples[c]),
                **({} if trained is None else {"trained": int(trained[c])}),
            }
            for c in worst
        ],
    }


@contextmanager
def dead_units(
    model: nn.Module, frozen: Collection[str] = frozenset()
) -> Iterator[dict[str, Tensor]]:
    """By layer, which units were above 0 for any image of the passes inside.

    A unit is a channel, over all places of its map, or the last dimension's. A ReLU that stands
    in several places counts as a layer for each, in the order of the pass: `act`, `act#2`. Layers
    that come before the first parameter which learns (none of `frozen`, nor one without a
    gradient) are left out; in a network where none does, all count.
    """
    alive: dict[str, Tensor] = {}
    calls: dict[str, int] = {}
    learners = {
        name.rpartition(".")[0]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in frozen
    }
    reached = not learners

    def begin(module: nn.Module, inputs: Any) -> None:
        nonlocal reached
        calls.clear()
        reached = not learners

    def reach(module: nn.Module, inputs: Any) -> None:
        nonlocal reached
        reached = True

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if not reached:
                return
            calls[name] = calls.get(name, 0) + 1
            layer = name if calls[name] == 1 else f"{name}#{calls[name]}"
            channel = 1 if output.ndim == 4 else output.ndim - 1
            units = (output > 0).transpose(0, channel).flatten(1).any(1)
            alive[layer] = units | alive[layer] if layer in alive else units

        return hook

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, _ZEROING)
    ]
    handles.append(model.register_forward_pre_hook(begin))
    handles += [
        module.register_forward_pre_hook(reach)
        for name, module in model.named_modules()
        if name in learners
    ]
    try:
        yield alive
    finally:
        for handle in handles:
            handle.remove()
