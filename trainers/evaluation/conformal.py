"""Sets of classes that hold the true one with a wanted probability. NumPy only.

Split conformal prediction: a threshold is fitted on held-out samples. If those and a new one
are exchangeable, the new one's set holds its label with probability `level` or more, whatever
the model (Vovk et al. 2005), on average over samples; not for each class or each image.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bigbatch.trainers.evaluation.metrics import Labels, Probabilities
from bigbatch.trainers.evaluation.outcomes import Array, row_chunks

Method = Literal["lac", "aps"]


@dataclass(frozen=True)
class ConformalSets:
    """A fitted rule from probabilities to sets.

    "lac": the classes with 1 - p <= threshold: the smallest sets on average, empty ones among
    them (Sadinle, Lei and Wasserman 2019).

    "aps": larger where the model doubts. A class's score is what the more probable ones sum to,
    and (1 - u) of its own probability (Romano, Sesia and Candes 2020). Randomised, u is uniform
    in [0, 1): the coverage is `level` as nearly as N allows, and sets may be empty. Else u is 1,
    so that the most probable class has score 0 and no set is empty. (u = 0, with the class that
    crosses the threshold, as in Angelopoulos and Bates 2021, section 2.1, pays for that with
    sets that hold the label far more often than was asked for.)
    """

    method: Method
    level: float  # wanted coverage
    threshold: float  # infinite, so that sets hold all classes, where samples are too few
    samples: int  # it was fitted on
    randomised: bool = False

    def sets(
        self, probabilities: Probabilities, uniforms: Array | None = None
    ) -> NDArray[np.bool_]:
        """Which classes are in the set of each sample [N, C].

        `uniforms` [N] in [0, 1), one for each sample by its key, where it is randomised.
        """
        if self.randomised != (uniforms is not None):
            raise ValueError("give uniforms where the sets are randomised, and only there")
        if self.method == "lac":
            return 1 - probabilities <= self.threshold
        return _masses(probabilities, uniforms) <= self.threshold


def fit_sets(
    held_out: Probabilities,
    labels: Labels,
    level: float,
    method: Method = "lac",
    uniforms: Array | None = None,
) -> ConformalSets:
    """Fit on held-out probabilities [N, C], which nothing else was fitted on, and labels [N].

    A temperature fitted on the same samples, say, breaks the exchangeability that the guarantee
    rests on. The threshold is the ceil((N + 1) level)-th smallest score of the labels, infinite
    where N is below that. Raises ValueError for a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level {level} must be inside (0, 1)")
    scores = [
        _scores(held_out[r], labels[r], method, None if uniforms is None else uniforms[r])
        for r in row_chunks(*held_out.shape)
    ]
    n = len(labels)
    # Without the margin 100 * 0.07 would be the 8th.
    rank = math.ceil((n + 1) * level - 1e-9)
    ordered = np.sort(np.concatenate(scores)) if scores else np.empty(0)
    threshold = float(ordered[rank - 1]) if rank <= n else math.inf
    return ConformalSets(method, level, threshold, n, uniforms is not None)


def _scores(
    probabilities: Probabilities, labels: Labels, method: Method, uniforms: Array | None
) -> Array:
    """How strange each sample's label is [N]."""
    rows = np.arange(len(labels))
    if method == "aps":
        return _masses(probabilities, uniforms)[rows, labels]
    if uniforms is not None:
        raise ValueError("sets by lac are not randomised")
    return 1 - probabilities[rows, labels]


def _masses(probabilities: Probabilities, uniforms: Array | None) -> Array:
    """Summed probability down to each class, by falling probability, less u times its own [N, C].

    Of equally probable classes the one with the smaller number comes first.
    """
    order = np.argsort(-probabilities, axis=1, kind="stable")
    sums = np.cumsum(np.take_along_axis(probabilities, order, axis=1), axis=1)
    reached = np.empty_like(sums)
    np.put_along_axis(reached, order, sums, axis=1)
    own = probabilities if uniforms is None else uniforms[:, None] * probabilities
    return reached - own
