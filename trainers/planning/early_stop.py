"""Early stopping, as pure functions of the evaluations so far. Free of torch."""

import math

from bigbatch.configs.regularise import EarlyStop
from bigbatch.trainers.planning.plateau import Evaluation, Evaluations


def stops(config: EarlyStop | None, evaluations: Evaluations) -> bool:
    """Whether training ends after the last of `evaluations`.

    No state is kept, so a run that was killed stops where it would have stopped.
    """
    if config is None:
        return False
    best, without = -math.inf, 0
    for evaluation in evaluations:
        if _accuracy(evaluation) > best + config.threshold:
            best, without = _accuracy(evaluation), 0
        else:
            without += 1
        if without >= config.patience:
            return True
    return False


def best_evaluation(evaluations: Evaluations) -> Evaluation:
    """The one of the highest accuracy; of equal ones the first, as checkpoint.keep_best has it."""
    return max(evaluations, key=_accuracy)


def _accuracy(evaluation: Evaluation) -> float:
    found = evaluation.scores.get("accuracy")
    return -math.inf if found is None else found
