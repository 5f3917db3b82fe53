"""Which score models are compared by, in which direction, and how a score is written.

One place for all that chooses: the best checkpoint and evaluation, early stopping, members and
soup of a run, what a search looks for, what lists and pictures show first. Whatever has scores by
name knows by which it is judged, so that no run has to say it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """A score by its key in metrics.jsonl and summary.json; `title` is for tables."""

    key: str
    title: str
    more_is_better: bool = False
    share: bool = False  # from 0 to 1, written in per cent
    unit: bool = False  # of the targets' own unit, so that its size says nothing

    @property
    def sign(self) -> float:
        """What makes more of it better."""
        return 1.0 if self.more_is_better else -1.0

    @property
    def heading(self) -> str:
        return self.title[0].upper() + self.title[1:]

    def merit(self, scores: Mapping[str, float | None]) -> float:
        """More is better, whatever the score; -inf where it has no value, or is not there."""
        value = scores.get(self.key)
        return -math.inf if value is None or math.isnan(value) else self.sign * value

    def text(self, value: float) -> str:
        """The value alone: in per cent, or with four decimals; of a unit with four digits."""
        if self.share:
            return f"{value:.2%}"
        return f"{value:.4g}" if self.unit else f"{value:.4f}"

    def said(self, value: float) -> str:
        """The same where no title stands over it: of a share per cent say enough."""
        return self.text(value) if self.share else f"{self.title} {self.text(value)}"


ACCURACY = Score("accuracy", "accuracy", more_is_better=True, share=True)
NLL = Score("nll", "NLL")
ECE = Score("ece", "ECE")
# Of predicted numbers: the mean absolute error, the root of the mean squared one, and the share of
# the targets' variance that predictions explain; each the mean over targets.
MAE = Score("mae", "MAE", unit=True)
RMSE = Score("rmse", "RMSE", unit=True)
R2 = Score("r2", "R2", more_is_better=True)
# Of predicted distributions: their divergence from the true ones, and how often both have their
# largest share in the same class.
KL = Score("kl", "KL")
MODE = Score("mode", "mode right", more_is_better=True, share=True)
SCORES = {score.key: score for score in (ACCURACY, NLL, ECE, MAE, RMSE, R2, KL, MODE)}
# What tables show, by the score that models are judged by: a classifier's, of numbers, of
# distributions. Scores of each kind hold one of these keys and none of the others.
_SHOWN = {ACCURACY: (ACCURACY, NLL, ECE), MAE: (MAE, RMSE, R2), KL: (KL, MODE)}


def judged_by(recipe: Any) -> Score:
    """The score that decides between a recipe's models: a classifier's, or its loss's own."""
    judge: Score = getattr(recipe.loss, "judge", ACCURACY)
    return judge


def judged_in(scores: Mapping[str, Any]) -> Score | None:
    """The same by what there is: scores, or columns of them. None where nobody judges by them."""
    return next((score for score in _SHOWN if score.key in scores), None)


def shown(judge: Score) -> tuple[Score, ...]:
    """The scores of a table of models that are judged by `judge`, which comes first."""
    return _SHOWN[judge]
