"""The gradient noise scale, measured while training (McCandlish et al. 2018, appendix A.1).

Two squared norms a step are all it takes: that of a micro-batch's gradient and that of the
global batch's. They differ by noise alone, and by a known share of it.
"""

import math

from bigbatch.trainers.advice.critical_batch import noise_and_signal

_MEMORY = 0.99  # weight of the past in the two averages: about a hundred steps


class NoiseScale:
    """The noise scale B_simple, in samples, from averages over about the last 100 steps.

    Noise and signal are averaged on their own, never their ratio, whose mean need not exist.
    The averages start anew when a run is resumed; the records that they are made of do not.
    """

    def __init__(self, micro_batch: int, global_batch: int) -> None:
        self._batches = micro_batch, global_batch
        self._noise = self._signal = 0.0

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
            self._noise = _MEMORY * self._noise + (1 - _MEMORY) * noise
            self._signal = _MEMORY * self._signal + (1 - _MEMORY) * signal
        resolved = self._signal > 0 and self._noise >= 0
        scale = self._noise / self._signal if resolved else math.nan
        return {"grad_sq_micro": grad_sq_micro, "noise_scale": scale}
