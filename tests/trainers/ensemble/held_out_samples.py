"""Members of known quality on samples with keys, for the tests of fits and selections."""

import numpy as np

from bigbatch.trainers.ensemble.held_out import FitData, ReportData


def samples(
    members=3, n=120, classes=4, seed=0, quality=(1.0, 2.0, 3.0), split="val", data=FitData
):
    """Logits: `quality` at the label, a noise that members share and one of their own."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(n) % classes)
    hits = np.eye(classes)[labels]
    shared = generator.normal(size=(n, classes))
    logits = [
        quality[m % len(quality)] * hits + shared + generator.normal(size=(n, classes))
        for m in range(members)
    ]
    keys = [f"{split}/{number:05d}" for number in range(n)]
    return data(np.array(logits, np.float32), labels, keys, split)


def reordered(data, order):
    """The same members in another order."""
    return FitData(data.logits[list(order)], data.labels, data.keys, data.split)


def to_report(**changes):
    return samples(split="test", data=ReportData, **changes)
