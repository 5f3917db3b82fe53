"""What a person should hear of while a run trains: spikes, low throughput, and bad events.

Alerts are events like others; `watch` and `status` show them, and wandb sends them on, by
mail or Slack, as its user has chosen. Free of torch.
"""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

# Events that are worth an alert, with its title. The other kinds are routine.
TITLES = {
    "spike": "Loss spike",
    "slow": "Low throughput",
    "non_finite": "Loss, gradient or running statistics are not finite",
    "rollback": "Rolled back",
    "corruption": "Silent data corruption",
    "stall": "A step hangs",
    "disk": "The disk takes no records",
    "save_failed": "A checkpoint could not be saved",
    "damaged_checkpoint": "A checkpoint is damaged",
    "error": "The run failed",
    "end": "The run ended",
}
_LOSSES = 100  # steps that a loss is held against
_SPIKE = 8.0  # times the usual distance from the median, ...
_SPIKE_SHARE = 0.2  # ... and at least this share of the median
_SPEEDS = 500
_RECENT = 20  # steps whose mean speed is held against the median of all
_SLOW, _RECOVERED = 0.7, 0.9  # of the median speed


def replay_command(run: str, event: Mapping[str, Any]) -> str | None:
    """The command that shows what the step was made of that an event of a run is about.

    Records and that command count finished steps; inside the loop the step that makes N of them
    has the number N - 1, by which some events name it.
    """
    match event:
        case {"kind": "spike", "step": int(step)}:
            return f"bigbatch replay {run} --step {step}"
        case {"kind": "non_finite", "step": int(step)}:
            return f"bigbatch replay {run} --step {step + 1}"
        case {"kind": "corruption", "found": "copies", "step": int(step)} if step:
            return f"bigbatch replay {run} --step {step}"
        case {"kind": "rollback", "last": int(last)}:
            return f"bigbatch replay {run} --step {last + 1} --before-rollback"
    return None


class Alerts:
    """Watches the figures of each step; says once what is wrong, until it is well again."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_LOSSES)
        self._seconds: deque[float] = deque(maxlen=_SPEEDS)  # of an image
        self._spiking = self._slow = False

    def update(self, loss: float, images_per_s: float) -> list[tuple[str, dict[str, Any]]]:
        """Events to record after a step: (kind, fields).

        spike: the loss lies above the median of the last 100 by 8 times their median
        absolute deviation and by 20 %. slow: the last 20 steps ran at less than 70 % of the
        median speed of the last 500. Medians, because what is looked for must not hide
        itself in the average.
        """
        return [*self._spike(loss), *self._speed(images_per_s)]

    def forget_speed(self) -> None:
        """Steps from here on take another time, as they should."""
        self._seconds.clear()
        self._slow = False

    def forget_losses(self) -> None:
        """Losses from here on are of fewer samples each, and so lie further apart."""
        self._losses.clear()
        self._spiking = False

    def _spike(self, loss: float) -> list[tuple[str, dict[str, Any]]]:
        if not math.isfinite(loss):
            return []  # an event of its own
        events = []
        if len(self._losses) == _LOSSES:
            usual = median(self._losses)
            distance = median(abs(x - usual) for x in self._losses)
            high = loss > usual + max(_SPIKE * distance, _SPIKE_SHARE * abs(usual))
            if high and not self._spiking:
                events.append(("spike", {"loss": loss, "median": usual}))
            self._spiking = high
        self._losses.append(loss)
        return events

    def _speed(self, images_per_s: float) -> list[tuple[str, dict[str, Any]]]:
        self._seconds.append(1 / images_per_s)
        if len(self._seconds) < 5 * _RECENT:
            return []
        recent = _RECENT / sum(list(self._seconds)[-_RECENT:])
        usual = 1 / median(self._seconds)
        if self._slow:
            self._slow = recent < _RECOVERED * usual
        elif recent < _SLOW * usual:
            self._slow = True
            return [("slow", {"images_per_s": round(recent, 1), "median": round(usual, 1)})]
        return []
