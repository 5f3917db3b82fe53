"""Early stopping, as pure functions of the evaluations so far. Free of torch."""

import math

from bigbatch.configs.judged import Score
from bigbatch.configs.regularise import EarlyStop
from bigbatch.trainers.planning.plateau import Evaluation, Evaluations


def stops(config: EarlyStop | None, evaluations: Evaluations, judge: Score) -> bool:
    """Whether training ends after the last of `evaluations`, by the score `judge`.

    No state is kept, so a run that was killed stops where it would have stopped.
    """
    if config is None:
        return False
    best, without = -math.inf, 0
    for evaluation in evaluations:
        if judge.merit(evaluation.scores) > best + config.threshold:
            best, without = judge.merit(evaluation.scores), 0
        else:
            without += 1
        if without >= config.patience:
            return True
    return False


def best_evaluation(evaluations: Evaluations, judge: Score) -> Evaluation:
    """The one of the best score; of equal ones the first, as checkpoint.keep_best has it."""
    return max(evaluations, key=lambda evaluation: judge.merit(evaluation.scores))
