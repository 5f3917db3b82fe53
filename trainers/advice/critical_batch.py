"""The critical batch size: from gradient norms, or from measured training costs.

McCandlish et al. 2018, "An Empirical Model of Large-Batch Training". To reach a given
quality at batch size B takes floor * (1 + B / critical) samples: nearly as few as ever
below the critical batch, and nearly as few *steps* as ever above it. Free of torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Number = TypeVar("Number", float, Array)

LEVEL = 0.95  # of every interval
_DRAWS = 1000  # bootstrap replicas
_GRID = 2000  # critical batches that a fit tries, before it refines the best


def noise_and_signal(
    sq_small: Number, sq_large: Number, small: int, large: Number | int
) -> tuple[Number, Number]:
    """tr(Sigma), in units of one sample, and |G|^2 (McCandlish et al. 2018, A.1, unbiased).

    `sq_small` and `sq_large` are squared norms of gradients averaged over `small` and over
    `large` samples, whose expectation is |G|^2 + tr(Sigma) / samples. Either result may be
    negative, by chance; average each over many steps before taking their ratio. Of arrays,
    `large` may be one as well.
    """
    noise = (sq_small - sq_large) / (1 / small - 1 / large)
    signal = (large * sq_large - small * sq_small) / (large - small)
    return noise, signal


@dataclass(frozen=True)
class CostCurve:
    """What a quality costs at batch size B: floor + slope * B, = floor * (1 + B / critical).

    In samples, or in epochs. `draws` [R, 2] are replicas of (floor, slope), which carry the
    uncertainty of every figure that is derived from them.
    """

    floor: float
    slope: float
    draws: Array

    @property
    def critical(self) -> float:
        """The critical batch size, in samples; infinite where cost was not seen to rise."""
        return self.floor / self.slope if self.slope > 0 else float("inf")

    @property
    def critical_interval(self) -> tuple[float, float]:
        return interval(ratio(self.draws[:, 0], self.draws[:, 1]))

    @property
    def floor_interval(self) -> tuple[float, float]:
        return interval(self.draws[:, 0])

    def cost(self, batch: Number) -> Number:
        return self.floor + self.slope * batch

    def cost_interval(self, batch: float) -> tuple[float, float]:
        return interval(self.draws[:, 0] + self.draws[:, 1] * batch)


@dataclass(frozen=True)
class Phase:
    """Part of a run. `draws` [R, 2] are replicas of (noise, signal)."""

    name: str
    first_step: int
    last_step: int
    noise: float  # tr(Sigma), in units of one sample
    signal: float  # |G|^2
    draws: Array

    @property
    def critical(self) -> float:
        """The noise scale B_simple = tr(Sigma) / |G|^2, in samples."""
        return float(ratio(np.array([self.noise]), np.array([self.signal]))[0])

    @property
    def critical_interval(self) -> tuple[float, float]:
        return interval(ratio(self.draws[:, 0], self.draws[:, 1]))


def ratio(above: Array, below: Array) -> Array:
    """above / below, both taken as 0 where negative; infinite where `below` is 0."""
    result = np.full(len(above), np.inf)
    return np.divide(np.maximum(above, 0), below, out=result, where=below > 0)


def interval(draws: Array) -> tuple[float, float]:
    """The middle LEVEL of replicas, which may be infinite."""
    tail = (1 - LEVEL) / 2
    # No interpolation: it would turn infinities into NaN.
    low, high = np.quantile(draws, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)


def measure_phase(
    name: str, steps: Array, noise: Array, signal: Array, generator: np.random.Generator
) -> Phase:
    """Mean noise and signal over a phase's steps, with replicas by a block bootstrap.

    Neighbouring steps resemble each other, so runs of about sqrt(n) steps are drawn as one,
    the end of the phase being followed by its start (Politis and Romano 1992).
    """
    series = np.stack([noise, signal], axis=1)  # [n, 2]
    n = len(series)
    length = max(1, round(np.sqrt(n)))
    blocks = -(-n // length)
    sums = np.cumsum(np.concatenate([np.zeros((1, 2)), series, series[:length]]), axis=0)
    starts = generator.integers(0, n, size=(_DRAWS, blocks))
    draws = (sums[starts + length] - sums[starts]).sum(axis=1) / (blocks * length)
    mean_noise, mean_signal = series.mean(axis=0).tolist()
    return Phase(name, int(steps[0]), int(steps[-1]), mean_noise, mean_signal, draws)


def curve_of_phases(phases: Sequence[Phase], samples: Sequence[float], batch: int) -> CostCurve:
    """The cost of a whole run from its phases, in samples.

    `samples` is what each phase took at the run's batch size. Phase i would take
    samples_i * (1 + B / critical_i) / (1 + batch / critical_i); a sum of such lines is a
    line again, whose critical batch is a weighted harmonic mean of the phases'.
    """

    def line(noise: Array, signal: Array, taken: float) -> Array:
        noise, signal = np.maximum(noise, 0), np.maximum(signal, 0)
        return taken * np.stack([noise, signal], axis=-1) / (noise + batch * signal)[..., None]

    pairs = list(zip(phases, samples, strict=True))
    middle = sum(line(np.array(p.noise), np.array(p.signal), n) for p, n in pairs)
    draws = sum(line(p.draws[:, 0], p.draws[:, 1], n) for p, n in pairs)
    floor, slope = np.asarray(middle).tolist()
    return CostCurve(floor, slope, np.asarray(draws))


def fit_points(batch: Array, cost: Array) -> CostCurve:
    """Fit measured (batch, cost to a fixed quality) points, both [n].

    Least squares in log cost: relative errors count alike at every batch size. The
    replicas fit residuals drawn anew, widened by sqrt(n / (n - 2)) for the two parameters.
    """
    n = len(batch)
    assert len(set(batch.tolist())) >= 3, "two parameters and their intervals need three sizes"
    floor, slope = _fit(batch, np.log(cost)[None])[0].tolist()
    fitted = np.log(floor + slope * batch)
    residuals = (np.log(cost) - fitted) * np.sqrt(n / (n - 2))
    generator = np.random.default_rng(0)
    replicas = fitted + generator.choice(residuals - residuals.mean(), size=(_DRAWS, n))
    return CostCurve(floor, slope, _fit(batch, replicas))


def _fit(batch: Array, log_costs: Array) -> Array:
    """(floor, slope) [R, 2] for each row of `log_costs` [R, n].

    Given the critical batch, the best log floor is a mean, so the fit is a search along one
    line: a grid, then the vertex of the parabola through the best point and its neighbours.
    """
    grid = np.linspace(np.log(batch.min() / 1e3), np.log(batch.max() * 1e3), _GRID)
    shapes = np.log1p(batch / np.exp(grid)[:, None])  # [G, n]
    centred = shapes - shapes.mean(axis=1, keepdims=True)
    rows = log_costs - log_costs.mean(axis=1, keepdims=True)
    errors = (centred**2).sum(axis=1) - 2 * rows @ centred.T  # [R, G], up to a constant of R
    best = errors.argmin(axis=1)
    inner = best.clip(1, _GRID - 2)
    left, middle, right = (np.take_along_axis(errors, (inner + i)[:, None], 1) for i in (-1, 0, 1))
    bend = np.maximum(left - 2 * middle + right, 1e-300)
    shift = (0.5 * (left - right) / bend).clip(-1, 1)[:, 0]
    critical = np.exp(grid[inner] + shift * (grid[1] - grid[0]))
    critical[best == _GRID - 1] = np.inf  # the points do not rise
    floor = np.exp((log_costs - np.log1p(batch / critical[:, None])).mean(axis=1))
    return np.stack([floor, floor / critical], axis=1)


def held_out_errors(batch: Array, cost: Array) -> Array:
    """Relative error of the prediction of each point, from a fit of all the others."""
    others = [np.arange(len(batch)) != i for i in range(len(batch))]
    lines = [_fit(batch[o], np.log(cost[o])[None])[0] for o in others]
    return (
        np.array([line[0] + line[1] * b for line, b in zip(lines, batch, strict=True)]) / cost - 1.0
    )
