"""CMA-ES for Optuna whose state is the study itself, replayed.

Optuna's own keeps a pickled optimizer in the study file, which a reader would have to
unpickle. Here each suggestion is a pure function of the finished trials and the seed.
"""

import math
from typing import Any

import numpy as np
import optuna
from cmaes import CMA
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

Space = dict[str, BaseDistribution]


class ReplayedCMA(optuna.samplers.BaseSampler):
    """Hansen and Ostermeier 2001, through cmaes, in the unit cube of all parameters.

    Finished trials, by number, make generations of the population's size. A pruned trial
    counts with its last value, a failed one as the worst of its generation.
    """

    def __init__(self, space: Space, seed: int) -> None:
        self._space = space
        self._seed = seed

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Space:
        return self._space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: Space
    ) -> dict[str, Any]:
        size = len(self._space)
        bounds = np.tile([0.0, 1.0], (size, 1))
        cma = CMA(mean=np.full(size, 0.5), sigma=1 / 6, bounds=bounds, seed=self._seed)
        sign = -1.0 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1.0
        finished = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
        finished = [t for t in finished if self._space.keys() <= t.params.keys()]
        for start in range(0, len(finished) - cma.population_size + 1, cma.population_size):
            generation = finished[start : start + cma.population_size]
            values = [sign * _value(t) for t in generation]
            known = [v for v in values if math.isfinite(v)]
            if not known:
                continue
            told = [v if math.isfinite(v) else max(known) for v in values]
            cma.tell([(self._point(t), v) for t, v in zip(generation, told, strict=True)])
        cma.reseed_rng(self._seed + 1 + trial.number)
        point = cma.ask()
        return {
            name: from_unit(float(u), self._space[name])
            for name, u in zip(sorted(self._space), point, strict=True)
        }

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        raise AssertionError(f"{param_name} is not in the space that this sampler was made for")

    def _point(self, trial: FrozenTrial) -> np.ndarray:
        names = sorted(self._space)
        return np.array([to_unit(trial.params[n], self._space[n]) for n in names])


def _value(trial: FrozenTrial) -> float:
    """The objective of a finished trial; infinity where it has none."""
    if trial.state == TrialState.COMPLETE and trial.value is not None:
        return trial.value
    last = trial.last_step
    return math.inf if last is None else trial.intermediate_values[last]


def to_unit(value: float, distribution: BaseDistribution) -> float:
    """A parameter's place in [0, 1]; whole numbers stand in the middle of equal parts."""
    low, high = _ends(distribution)
    value = math.log(value) if _log(distribution) else value
    return (value - low) / (high - low)


def from_unit(u: float, distribution: BaseDistribution) -> float | int:
    """The parameter at a place in [0, 1]."""
    low, high = _ends(distribution)
    value = low + u * (high - low)
    value = math.exp(value) if _log(distribution) else value
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if isinstance(distribution, IntDistribution):
        return min(max(round(value), distribution.low), distribution.high)
    if distribution.step is not None:
        value = distribution.low + distribution.step * round(
            (value - distribution.low) / distribution.step
        )
    return min(max(value, distribution.low), distribution.high)


def _log(distribution: BaseDistribution) -> bool:
    return bool(getattr(distribution, "log", False))


def _ends(distribution: BaseDistribution) -> tuple[float, float]:
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high = float(distribution.low), float(distribution.high)
    if isinstance(distribution, IntDistribution):
        low, high = low - 0.5, high + 0.5
    return (math.log(low), math.log(high)) if _log(distribution) else (low, high)
