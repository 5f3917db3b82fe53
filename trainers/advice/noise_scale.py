"""The gradient noise scale, measured while training (McCandlish et al. 2018, appendix A.1).

Two squared norms a step are all it takes: that of a micro-batch's gradient and that of the
global batch's. They differ by noise alone, and by a known share of it.
"""

import math

from bigbatch.trainers.advice.critical_batch import noise_and_signal

_MEMORY = 0.99  # weight of the past in the two averages: about a hundred steps


class NoiseScale:
    """The noise scale B_simple, in samples, from averages over about the last 100 steps.

    Noise and signal are averaged on their own, never their ratio, whose mean need not exist. Each
    step's are unbiased at any batch, so that an average goes on where the batch changes; it
    forgets by steps, which is how the weights move that it is of.
    """

    def __init__(
        self, micro_batch: int, global_batch: int, averages: list[float] | None = None
    ) -> None:
        """`averages`, of noise and signal, are gone on from and kept up to date in place."""
        self._batches = micro_batch, global_batch
        self.averages = [0.0, 0.0] if averages is None else averages

    def update(
        self, grad_sq_micro: float, grad_norm: float, global_batch: int | None = None
    ) -> dict[str, float]:
        """The values to record of a step: grad_sq_micro and noise_scale.

        `grad_sq_micro` is the mean squared norm of micro-batch gradients, `grad_norm` the
        norm of the global batch's; both without loss scale and before clipping. A step
        whose gradient is not finite is recorded and not averaged. noise_scale is NaN where
        no signal stands out of the noise. Nothing is recorded of steps of one micro-batch.
        `global_batch` is this step's, where it is another one: noise and signal are estimates of
        the same, whatever the batch.
        """
        small, large = self._batches
        large = large if global_batch is None else global_batch
        if small == large:
            return {}
        if math.isfinite(grad_sq_micro) and math.isfinite(grad_norm):
            noise, signal = noise_and_signal(grad_sq_micro, grad_norm**2, small, large)
            # Without correction for the start, which both share and the ratio cancels.
            for i, value in enumerate((noise, signal)):
                self.averages[i] = _MEMORY * self.averages[i] + (1 - _MEMORY) * value
        return {"grad_sq_micro": grad_sq_micro, "noise_scale": noise_scale(*self.averages)}


def noise_scale(noise: float, signal: float) -> float:
    """B_simple in samples; NaN where no signal stands out of the noise, as before step 1."""
    return noise / signal if signal > 0 and noise >= 0 else math.nan


def asks_for(batch: int, target: float, noise: float, signal: float) -> bool:
    """Whether `target` times the noise scale reaches `batch`.

    Where there is noise and no signal stands out of it, the noise scale is beyond what can be
    measured, as it is in `advise`: any batch is asked for. Before the first step none is.
    """
    return noise > 0 and target * noise >= batch * max(signal, 0.0)
