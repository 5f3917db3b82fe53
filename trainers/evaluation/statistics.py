"""Everything that is said of an evaluated split, as one dictionary for JSON. NumPy only."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigbatch.configs.files import finite
from bigbatch.trainers.evaluation.accuracy import (
    balanced_accuracy,
    confusion_pairs,
    recalls,
    wilson,
)
from bigbatch.trainers.evaluation.calibration import ClasswiseError, reliability, tempered
from bigbatch.trainers.evaluation.conformal import ConformalSets
from bigbatch.trainers.evaluation.diversity import (
    ByNumber,
    calibrated_nll,
    deep_ensemble_equivalent,
    disagreement,
    double_fault,
    q_statistic,
)
from bigbatch.trainers.evaluation.metrics import Labels, Probabilities
from bigbatch.trainers.evaluation.outcomes import Collected, Outcomes, outcomes, row_chunks
from bigbatch.trainers.evaluation.paired import bootstrap, mcnemar
from bigbatch.trainers.evaluation.selective import risk_coverage
from bigbatch.trainers.evaluation.sums import SparseSum

_COVERAGES = (0.5, 0.8, 0.9, 0.95)
_MISTAKES = 20
Scores = dict[str, Any]


class Statistics:
    """The statistics of a split, whose probabilities may come in pieces; keeps none of them.

    `classes` is their number, `members` the members' names. `temperature` was fitted on other
    samples; so were, at that temperature, `sets` and `reject_below`, the confidence under which
    there is no answer. `seed` keys the random subsets and the bootstrap.
    """

    def __init__(
        self,
        classes: int,
        *,
        members: Sequence[str] = (),
        temperature: float = 1.0,
        sets: Sequence[ConformalSets] = (),
        reject_below: float | None = None,
        seed: int = 0,
    ) -> None:
        self._classes, self._names, self._temperature = classes, list(members), temperature
        self._reject_below, self._seed = reject_below, seed
        self._combined = _Scored(classes)  # as combined
        self._served = _Scored(classes) if temperature != 1 else self._combined
        self._members = [_Scored(classes) for _ in self._names]
        self._by_number = ByNumber(len(self._names), seed)
        self._sets = [(rule, _SetSizes(classes)) for rule in sets]

    def add(
        self,
        labels: Labels,
        ensemble: Probabilities,
        members: NDArray[np.floating] | None = None,
    ) -> None:
        """Labels [n], combined probabilities [n, C] before the temperature, members' [M, n, C].

        Raises ValueError where they are no probabilities of as many classes and members.
        """
        count = 0 if members is None else len(members)
        if ensemble.shape[1] != self._classes or count != len(self._names):
            raise ValueError(
                f"{ensemble.shape[1]} classes and {count} members; there are {self._classes} "
                f"classes and {len(self._names)} members"
            )
        for rows in row_chunks(len(labels), self._classes * (1 + count)):
            label, served = labels[rows], ensemble[rows].astype(np.float64, copy=False)
            self._combined.add(served, label)
            if self._served is not self._combined:
                served = tempered(served, self._temperature)
                self._served.add(served, label)
            for rule, sizes in self._sets:
                sizes.add(rule.sets(served), label)
            if members is not None:
                pieces = members[:, rows].astype(np.float64)
                for scored, piece in zip(self._members, pieces, strict=True):
                    scored.add(piece, label)
                self._by_number.add(pieces, label)

    def sums(self) -> list[NDArray[Any]]:
        """What ranks add up in place, where each was given other samples."""
        found = [each for scored in self._models() for each in scored.sums()]
        found += self._by_number.sums()
        return found + [each for _, sizes in self._sets for each in sizes.sums()]

    def sparse_sums(self) -> list[SparseSum]:
        """The same of places of which each rank has others."""
        return [scored.above for scored in self._models()]

    def outcomes(self) -> list[Outcomes]:
        """Of each model, in the order in which samples were added; the first are as served."""
        return [scored.outcomes() for scored in self._models()]

    def put(self, outcomes: Sequence[Outcomes]) -> None:
        """Take these, of all samples, in place of those of `outcomes`."""
        for scored, own in zip(self._models(), outcomes, strict=True):
            scored.put(own)

    def _models(self) -> list["_Scored"]:
        plain = [self._combined] if self._served is not self._combined else []
        return [self._served, *plain, *self._members]

    def confusion(self) -> NDArray[np.int64]:
        """(true class, predicted class, count) [K, 3] of what occurs."""
        served = self._served.outcomes()
        return confusion_pairs(served.label, served.predicted, self._classes)

    def summary(self, best: str | None = None) -> dict[str, Any]:
        """The dictionary that docs/statistics.md describes; None stands for what is undefined.

        `best` names the member that did best on other samples. Without it the best on these
        stands for it, which favours the member. Raises ValueError where there are no samples.
        """
        served, classes = self._served.outcomes(), self._classes
        n = len(served)
        if not n:
            raise ValueError("statistics need samples")
        recall = recalls(served.label, served.predicted, classes)
        result: dict[str, Any] = {
            "samples": n,
            "classes": classes,
            **self._served.scores(),
            **_shares("accuracy", served.correct),
            **_shares("top5", served.top(5) if classes > 5 else None),
            "temperature": self._temperature if self._temperature != 1 else None,
            "before_temperature": None,
            "balanced_accuracy": balanced_accuracy(served.label, served.predicted, classes),
            "recall": recall.tolist(),
            "class_samples": np.bincount(served.label, minlength=classes).tolist(),
            "mistakes": self._mistakes(),
            "reliability": _reliability(served),
            "risk_coverage": _risk_coverage(served),
            "rejection": _rejection(served, self._reject_below),
            "conformal": [_conformal(rule, sizes) for rule, sizes in self._sets] or None,
            "members": self._members_summary(best) if self._names else None,
        }
        if self._served is not self._combined:
            before = self._combined.scores()
            del before["accuracy"]  # which no temperature changes
            table = _reliability(self._combined.outcomes())
            result["before_temperature"] = {**before, "reliability": table}
        plain: dict[str, Any] = finite(result)
        return plain

    def _mistakes(self) -> list[list[int]]:
        """The most frequent wrong pairs (true, predicted, count), most frequent first."""
        pairs = self.confusion()
        wrong = pairs[pairs[:, 0] != pairs[:, 1]]
        most: list[list[int]] = wrong[np.argsort(-wrong[:, 2], kind="stable")[:_MISTAKES]].tolist()
        return most

    def _members_summary(self, best: str | None) -> dict[str, Any]:
        parts = [scored.outcomes() for scored in self._members]
        rows = [
            {"name": name, **scored.scores(), **_shares("accuracy", part.correct)}
            for name, scored, part in zip(self._names, self._members, parts, strict=True)
        ]
        correct = np.stack([part.correct for part in parts])
        by_number = zip(self._by_number.accuracies(), self._by_number.losses(), strict=True)
        if best is None:
            chosen = min(range(len(rows)), key=lambda i: (-rows[i]["accuracy"], rows[i]["nll"]))
        else:
            chosen = self._names.index(best)
        return {
            "each": rows,
            "disagreement": disagreement(np.stack([part.predicted for part in parts])).tolist(),
            "q_statistic": q_statistic(correct).tolist(),
            "double_fault": double_fault(correct).tolist(),
            "by_number": [
                {
                    "members": k,
                    "subsets": len(accuracies),
                    "accuracy": float(accuracies.mean()),
                    "accuracy_range": [float(accuracies.min()), float(accuracies.max())],
                    "nll": float(losses.mean()),
                    "nll_range": [float(losses.min()), float(losses.max())],
                }
                for k, (accuracies, losses) in enumerate(by_number, 1)
            ],
            "against_best": {
                "best": self._names[chosen],
                "chosen_on": "these samples" if best is None else "other samples",
                **_comparison(self._combined.outcomes(), parts[chosen], self._seed),
            },
        }


def summarise(
    labels: Labels,
    ensemble: Probabilities,
    members: NDArray[np.floating] | None = None,
    *,
    names: Sequence[str] = (),
    temperature: float = 1.0,
    sets: Sequence[ConformalSets] = (),
    reject_below: float | None = None,
    best: str | None = None,
    independent_nll: Sequence[float] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """`Statistics` of whole arrays: labels [N], combined probabilities [N, C], members' [M, N, C].

    `independent_nll` is a curve for `deep_ensemble_equivalent`, of the same samples.
    """
    statistics = Statistics(
        ensemble.shape[1],
        members=names,
        temperature=temperature,
        sets=sets,
        reject_below=reject_below,
        seed=seed,
    )
    statistics.add(labels, ensemble, members)
    result = statistics.summary(best)
    result["deep_ensemble_equivalent"] = None
    if independent_nll is not None:
        result["deep_ensemble_equivalent"] = _equivalent(labels, ensemble, independent_nll, seed)
    return result


class _Scored:
    """One model's outcomes, and its class-wise calibration, which needs all probabilities."""

    def __init__(self, classes: int) -> None:
        self._found = Collected()
        self._classwise = ClasswiseError(classes)

    def add(self, probabilities: Probabilities, labels: Labels) -> None:
        self._found.add(outcomes(probabilities, labels))
        self._classwise.add(probabilities, labels)

    def outcomes(self) -> Outcomes:
        return self._found.whole()

    def put(self, outcomes: Outcomes) -> None:
        self._found.put(outcomes)

    def sums(self) -> list[NDArray[Any]]:
        return self._classwise.sums()

    @property
    def above(self) -> SparseSum:
        return self._classwise.above

    def scores(self) -> Scores:
        whole = self.outcomes()
        equal_mass = reliability(whole.confidence, whole.correct, equal_mass=True)
        return {
            **whole.scores(),
            "ece_adaptive": equal_mass.error,
            "ece_classwise": self._classwise.error,
        }


class _SetSizes:
    """How many sets have which size [C + 1], and how many hold their label."""

    def __init__(self, classes: int) -> None:
        self.sizes = np.zeros(classes + 1, np.int64)
        self.held = np.zeros((), np.int64)

    def sums(self) -> list[NDArray[Any]]:
        return [self.sizes, self.held]

    def add(self, sets: NDArray[np.bool_], labels: Labels) -> None:
        self.sizes += np.bincount(np.count_nonzero(sets, axis=1), minlength=len(self.sizes))
        self.held += sets[np.arange(len(labels)), labels].sum()


def _shares(name: str, hits: NDArray[np.bool_] | None) -> Scores:
    if hits is None:
        return {name: None, f"{name}_interval": None}
    right = int(hits.sum())
    return {name: right / len(hits), f"{name}_interval": list(wilson(right, len(hits)))}


def _reliability(of: Outcomes) -> dict[str, list[float]]:
    table = reliability(of.confidence, of.correct)
    return {
        "count": table.count.tolist(),
        "confidence": table.confidence.tolist(),
        "accuracy": table.accuracy.tolist(),
    }


def _risk_coverage(of: Outcomes) -> dict[str, Any]:
    curve = risk_coverage(of.confidence, of.correct)
    coverage, risk = curve.curve()
    return {
        "aurc": curve.aurc,
        "excess_aurc": curve.excess_aurc,
        "accuracy_at": [
            {"coverage": share, "accuracy": curve.accuracy_at(share)} for share in _COVERAGES
        ],
        "coverage": coverage.tolist(),
        "risk": risk.tolist(),
    }


def _rejection(of: Outcomes, below: float | None) -> dict[str, Any] | None:
    """What is left where answers of less confidence are not given."""
    if below is None:
        return None
    given = of.correct[of.confidence >= below]
    shares = _shares("accuracy", given if len(given) else None)
    return {"below": below, "coverage": len(given) / len(of), **shares}


def _conformal(rule: ConformalSets, found: _SetSizes) -> dict[str, Any]:
    n, held = int(found.sizes.sum()), int(found.held)
    return {
        "method": rule.method,
        "level": rule.level,
        "threshold": rule.threshold,
        "fitted_on": rule.samples,
        "coverage": held / n,
        "coverage_interval": list(wilson(held, n)),
        "mean_size": float(found.sizes @ np.arange(len(found.sizes)) / n),
        "empty": float(found.sizes[0] / n),
        "single": float(found.sizes[1] / n),
        "largest": int(np.flatnonzero(found.sizes)[-1]),
    }


def _comparison(ensemble: Outcomes, member: Outcomes, seed: int) -> dict[str, Any]:
    """Ensemble minus member, both without temperature; a positive accuracy speaks for the first."""
    accuracy = ensemble.correct.astype(np.float64) - member.correct
    losses = ensemble.losses - member.losses
    intervals = bootstrap(np.stack([accuracy, losses], axis=1), seed)
    counts = mcnemar(ensemble.correct, member.correct)
    return {
        "accuracy": {"difference": float(accuracy.mean()), "interval": intervals[0].tolist()},
        "nll": {"difference": float(losses.mean()), "interval": intervals[1].tolist()},
        "mcnemar": {
            "only_ensemble": counts.only_first,
            "only_member": counts.only_second,
            "odds": counts.odds,
            "p_value": counts.p_value,
        },
    }


def _equivalent(
    labels: Labels, ensemble: Probabilities, independent: Sequence[float], seed: int
) -> dict[str, Any]:
    loss = calibrated_nll(ensemble, labels, seed)
    try:
        found = deep_ensemble_equivalent(loss, independent)
    except ValueError as error:
        return {"calibrated_nll": loss, "members": None, "reason": str(error)}
    return {"calibrated_nll": loss, "members": found.members, "relation": found.relation}
