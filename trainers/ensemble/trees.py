"""Boosted regression trees as plain numbers: stored without pickle, computed by NumPy alone."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
_INTEGERS = ("features", "roots", "outputs", "feature", "left", "right")


@dataclass(frozen=True)
class Trees:
    """Trees whose leaves add up to scores [C] of features [D].

    Tree k starts at node ``roots[k]`` and adds the number of the leaf where it ends to the score
    ``outputs[k]``, which starts at ``baseline``. Node i asks whether feature ``feature[i]`` is
    at most ``number[i]``, and goes on to ``left[i]`` or else ``right[i]``; a leaf has feature -1.
    Children come after their node. Raises ValueError for what is no such trees.
    """

    features: int
    baseline: tuple[float, ...]  # [C]
    roots: tuple[int, ...]  # [K]
    outputs: tuple[int, ...]  # [K]
    feature: tuple[int, ...]  # [nodes]
    number: tuple[float, ...]  # [nodes]
    left: tuple[int, ...]  # [nodes]
    right: tuple[int, ...]  # [nodes]

    def __post_init__(self) -> None:
        nodes, classes = len(self.feature), len(self.baseline)
        if len(self.roots) != len(self.outputs) or {nodes} != {
            len(self.number),
            len(self.left),
            len(self.right),
        }:
            raise ValueError("trees: their columns have different lengths")
        if not (np.isfinite(self.number).all() and np.isfinite(self.baseline).all()):
            raise ValueError("trees: a number is not finite")
        numbers, feature = np.arange(nodes), np.array(self.feature, np.int64)
        inner = feature >= 0
        children = [np.array(side, np.int64)[inner] for side in (self.left, self.right)]
        ahead = all(((c > numbers[inner]) & (c < nodes)).all() for c in children)
        if not (
            ahead
            and _within(feature, -1, self.features)
            and _within(self.roots, 0, nodes)
            and _within(self.outputs, 0, classes)
        ):
            raise ValueError("trees: a node, a feature or a class is out of range")

    def scores(self, x: Array) -> Array:
        """Scores [N, C] of features [N, D]."""
        feature, left, right = (np.asarray(c) for c in (self.feature, self.left, self.right))
        number, rows = np.asarray(self.number), np.arange(len(x))
        result = np.tile(np.asarray(self.baseline), (len(x), 1))
        for root, output in zip(self.roots, self.outputs, strict=True):
            node = np.full(len(x), root)
            while (inner := feature[node] >= 0).any():
                below = x[rows, feature[node]] <= number[node]
                node = np.where(inner, np.where(below, left[node], right[node]), node)
            result[:, output] += number[node]
        return result

    @classmethod
    def from_json(cls, value: Any) -> "Trees":
        """What `dataclasses.asdict` gave. Raises ValueError that says what is wrong else."""
        names = [field.name for field in fields(cls)]
        if not isinstance(value, dict) or set(value) != set(names):
            raise ValueError(f"trees: must be a mapping with {', '.join(names)} alone")
        columns = {name: value[name] for name in names if name != "features"}
        if type(value["features"]) is not int:
            raise ValueError(f"trees: features = {value['features']!a:.80}; must be an integer")
        for name, column in columns.items():
            kinds = (int,) if name in _INTEGERS else (int, float)
            if not isinstance(column, list | tuple) or any(type(i) not in kinds for i in column):
                raise ValueError(f"trees: {name} must be a list of numbers")
            if any(not abs(i) < 1 << 62 for i in column):
                raise ValueError(f"trees: {name} has a number that is out of range")
        return cls(value["features"], **{name: tuple(c) for name, c in columns.items()})


def _within(values: Any, low: int, high: int) -> bool:
    array = np.asarray(values, np.int64)
    return bool(((array >= low) & (array < high)).all())
