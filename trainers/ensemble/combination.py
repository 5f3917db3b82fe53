"""How several members' logits become one prediction. NumPy only."""

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from bigbatch.trainers.ensemble.trees import Trees
from bigbatch.trainers.evaluation.calibration import tempered
from bigbatch.trainers.evaluation.metrics import Labels, Probabilities, softmax
from bigbatch.trainers.evaluation.metrics import Logits as Logits
from bigbatch.trainers.evaluation.outcomes import row_chunks

Method = Literal["mean", "logits", "weights", "vote", "stack", "boost"]
METHODS: tuple[str, ...] = get_args(Method)
# What the mean probability counts beside a vote: it decides ties, and nothing else.
TIE = 2.0**-10


@dataclass(frozen=True)
class Combination:
    """From the logits of M members, float32 [M, N, C], to probabilities, float64 [N, C].

    - `mean`: the mean of the members' probabilities (the deep ensemble's mixture,
      Lakshminarayanan et al. 2017, section 2.4).
    - `logits`: the softmax of the mean logits, a normalised geometric mean of probabilities.
    - `weights`: the mean with `weights`, one a member, non-negative and of sum 1.
    - `vote`: the share of members whose best class it is. The mean probability is one voter more
      who has `TIE` of a vote, so that ties go to the class that members think likelier.
    - `stack`: multinomial logistic regression on all members' log-probabilities (Wolpert 1992):
      softmax of ``coefficients [C, M * C] @ log p [M * C] + intercepts [C]``, members outermost.
    - `boost`: gradient boosting on the same log-probabilities: softmax of the scores of `trees`.

    `temperature` comes after combining (Rahaman and Thiery 2021): p^(1 / T), normalised. A
    prediction whose largest probability is below `reject_below` is rejected.

    The order of members, with what belongs to each, changes no bit. Under `mean`, `logits` and a
    weight of 1, a member alone gives its own softmax, bit for bit. No probability is above 1; rows
    sum to 1 within rounding. Raises ValueError for values that cannot be.
    """

    method: Method = "mean"
    weights: tuple[float, ...] | None = None
    coefficients: tuple[tuple[float, ...], ...] | None = None
    intercepts: tuple[float, ...] | None = None
    temperature: float = 1.0
    reject_below: float | None = None
    trees: Trees | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise _wrong("method", self.method, f"one of {', '.join(METHODS)}")
        for name, owner in (
            ("weights", "weights"),
            ("coefficients", "stack"),
            ("intercepts", "stack"),
            ("trees", "boost"),
        ):
            if (getattr(self, name) is None) is (self.method == owner):
                rule = f"given for method {owner!r}, and only for it"
                raise _wrong(name, getattr(self, name), rule)
        if self.weights is not None:
            total = math.fsum(self.weights) if _finite(self.weights) else math.nan
            if not (abs(total - 1) <= 1e-9 and min(self.weights) >= 0):
                raise _wrong("weights", self.weights, "finite, none below 0, of sum 1")
        if self.coefficients is not None and self.intercepts is not None:
            classes, widths = len(self.intercepts), {len(row) for row in self.coefficients}
            if not (
                classes == len(self.coefficients)
                and len(widths) == 1
                and min(widths) > 0
                and min(widths) % classes == 0
            ):
                shape = f"{len(self.coefficients)} rows of {sorted(widths)} numbers"
                raise _wrong("coefficients", shape, f"{classes} (as intercepts) of M * {classes}")
            if not all(map(_finite, (*self.coefficients, self.intercepts))):
                raise ValueError("combination: coefficients and intercepts must be finite")
        if self.trees is not None and not (
            len(self.trees.baseline) and self.trees.features % len(self.trees.baseline) == 0
        ):
            raise ValueError("combination: its trees are not of all classes of each member")
        if not (0 < self.temperature < math.inf and 1 / self.temperature < math.inf):
            raise _wrong("temperature", self.temperature, "finite and above 0, as 1 / T must be")
        if self.reject_below is not None and not 0 <= self.reject_below <= 1:
            raise _wrong("reject_below", self.reject_below, "in [0, 1], or null")

    @classmethod
    def majority(cls, members: int) -> "Combination":
        """Vote, where more than half of the members must agree: else rejected."""
        return cls("vote", reject_below=(members // 2 + 1) / (members + TIE))

    @property
    def members(self) -> int | None:
        """How many members it is for; None: any number."""
        if self.coefficients is not None:
            return len(self.coefficients[0]) // len(self.coefficients)
        if self.trees is not None:
            return self.trees.features // len(self.trees.baseline)
        return None if self.weights is None else len(self.weights)

    @property
    def classes(self) -> int | None:
        """How many classes it is for; None: any number."""
        scores = self.intercepts if self.trees is None else self.trees.baseline
        return None if scores is None else len(scores)

    def apply(self, logits: Logits) -> Probabilities:
        """Probabilities [N, C] from logits [M, N, C], which may be a memory map.

        Beside the result, a few MiB are held, whatever N is. Raises ValueError where the shape
        is not what this combination is for, or a logit is not finite.
        """
        self._check(logits)
        members, samples, classes = logits.shape
        combine = self._rule(classes)
        result = np.empty((samples, classes))
        for rows in row_chunks(samples, members * classes):
            chunk = logits[:, rows]
            if not np.isfinite(chunk).all():
                member, row, _ = np.argwhere(~np.isfinite(chunk))[0].tolist()
                raise ValueError(f"member {member} has a logit that is not finite, of sample "
                                 f"{rows.start + row}")  # fmt: skip
            p = np.minimum(combine(chunk), 1.0)
            result[rows] = tempered(p, self.temperature)
        return result

    def accepted(self, probabilities: Probabilities) -> npt.NDArray[np.bool_]:
        """Which predictions [N] are not rejected; their share is the coverage."""
        return probabilities.max(axis=1) >= (self.reject_below or 0.0)

    def to_json(self) -> dict[str, Any]:
        """Plain values, which `json` writes and reads without loss."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> "Combination":
        """What `to_json` gave. Raises ValueError that says what is wrong of anything else."""
        names = [field.name for field in fields(cls)]
        if not isinstance(value, dict) or sorted(map(str, value)) != sorted(names):
            found = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise _wrong("its content", found, f"a mapping with {', '.join(names)} alone")
        if not isinstance(value["method"], str):
            raise _wrong("method", value["method"], f"one of {', '.join(METHODS)}")
        rows, reject = value["coefficients"], value["reject_below"]
        if not (rows is None or (isinstance(rows, list | tuple) and rows)):
            raise _wrong("coefficients", rows, "null, or a list of lists of numbers")
        return cls(
            value["method"],  # type: ignore[arg-type]  # looked at when it is made
            weights=_numbers("weights", value["weights"]),
            coefficients=rows and tuple(_numbers("coefficients", row) or () for row in rows),
            intercepts=_numbers("intercepts", value["intercepts"]),
            temperature=_number("temperature", value["temperature"]),
            reject_below=None if reject is None else _number("reject_below", reject),
            trees=None if value["trees"] is None else Trees.from_json(value["trees"]),
        )

    def _check(self, logits: Logits) -> None:
        if logits.ndim != 3 or logits.shape[0] < 1 or logits.shape[2] < 1:
            raise ValueError(f"logits of shape {logits.shape}; [members, samples, classes] wanted")
        if not np.issubdtype(logits.dtype, np.floating):
            raise ValueError(f"logits of {logits.dtype}; floating-point numbers wanted")
        members, _, classes = logits.shape
        if self.members not in (None, members):
            raise ValueError(f"logits of {members} members; combined are {self.members}")
        if self.classes not in (None, classes):
            raise ValueError(f"logits of {classes} classes; combined are {self.classes}")

    def _rule(self, classes: int) -> Callable[[Logits], Probabilities]:
        """The function from logits [M, n, C] to probabilities [n, C], before the temperature."""
        match self.method:
            case "mean":
                return mean_probability
            case "logits":
                return lambda x: softmax(ordered_sum(x.astype(np.float64)) / len(x))
            case "weights":
                assert self.weights is not None
                weights, total = self.weights, math.fsum(self.weights)
                return lambda x: ordered_sum(
                    np.stack([w * softmax(m) for w, m in zip(weights, x, strict=True)])
                ) / total  # fmt: skip
            case "vote":
                return _votes
            case "stack":
                # [M, C_in, C_out]: what each member adds to the logits.
                matrix = np.asarray(self.coefficients).reshape(classes, -1, classes)
                parts, intercepts = matrix.transpose(1, 2, 0), np.asarray(self.intercepts)
                return lambda x: softmax(
                    ordered_sum(
                        np.stack([log_softmax(m) @ p for m, p in zip(x, parts, strict=True)])
                    )
                    + intercepts
                )
            case "boost":
                assert self.trees is not None
                trees = self.trees
                return lambda x: softmax(trees.scores(joined_log_probabilities(x)))


def ordered_sum(terms: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sum over the first axis, smallest term first, so that their order changes no bit.

    `terms` is sorted in place.
    """
    if len(terms) > 2:  # of two, either order gives the same
        terms.sort(axis=0)
    return terms.sum(axis=0)


def mean_probability(logits: Logits) -> Probabilities:
    """The mean of softmax over members; [M, n, C] to [n, C]."""
    return ordered_sum(np.stack([softmax(member) for member in logits])) / len(logits)


def log_softmax(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Row-wise log of softmax in float64, finite for finite logits; [N, C]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def joined_log_probabilities(logits: Logits) -> npt.NDArray[np.float64]:
    """All members' log-probabilities side by side; [M, N, C] to [N, M * C]."""
    return np.concatenate([log_softmax(member) for member in logits], axis=1)


def selective_score(
    probabilities: Probabilities, labels: Labels, accepted: npt.NDArray[np.bool_]
) -> dict[str, float | None]:
    """The share that is accepted, and the accuracy among those; None where there are none."""
    right = (probabilities.argmax(axis=1) == labels)[accepted]
    return {
        "coverage": float(accepted.mean()),
        "accuracy": float(right.mean()) if len(right) else None,
    }


def _votes(logits: Logits) -> Probabilities:
    members, rows, classes = logits.shape
    chosen = logits.argmax(axis=2) + classes * np.arange(rows)
    counts = np.bincount(chosen.ravel(), minlength=rows * classes).reshape(rows, classes)
    return (counts + TIE * mean_probability(logits)) / (members + TIE)


def _finite(values: tuple[float, ...]) -> bool:
    return len(values) > 0 and all(map(math.isfinite, values))


def _wrong(name: str, value: Any, rule: str) -> ValueError:
    return ValueError(f"combination: {name} = {value!a:.120}; must be {rule}")


def _numbers(name: str, value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise _wrong(name, value, "null, or a list of numbers")
    return tuple(_number(name, item) for item in value)


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise _wrong(name, value, "a finite number")
    return float(value)
