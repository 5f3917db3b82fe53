"""What the rules of a diagnosis look at, computed once from a run's history. Free of torch."""

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bigbatch.trainers.monitoring.history import History, Record, smooth

POOR = 0.5  # of the loss of who knows the classes' shares alone: above it, little was learned
SIGMAS = 3.0  # standard errors by which two accuracies differ for sure


class Facts:
    """Curves, the last probe, and what follows from them."""

    def __init__(self, history: History) -> None:
        self.history, self.recipe, self.events = history, history.recipe, history.events
        self.probes, self.gradients = history.probes, history.gradients
        self.step = history.train.get("step", np.zeros(0))
        self.loss = history.train.get("loss", np.full(len(self.step), np.nan))
        self.path = smooth(self.loss)
        self.val = history.evals.get("val", {})
        self.probe: Record = history.probes[-1] if history.probes else {}

    @property
    def over(self) -> bool:
        """Whether the run has come to its end: before it the fit is not to be judged."""
        total = self.history.total_steps
        return not total or self.history.last_step >= total or self.history.state == "finished"

    @cached_property
    def start(self) -> float:
        """The loss of the first five records; that of one is noise.

        Where it has doubled by then, that of the first: a rate can be so high that two steps do it.
        """
        if not np.isfinite(self.loss[:5]).any():
            return np.nan
        usual, first = float(np.nanmedian(self.loss[:5])), float(self.loss[0])
        return first if usual > 2 * first else usual

    @cached_property
    def end(self) -> float:
        """The smoothed loss at the last record."""
        return float(self.path[-1])

    @cached_property
    def left(self) -> float | None:
        """The last probe's loss on training images, over that of who knows the classes' shares."""
        return self._left("train")

    @cached_property
    def val_left(self) -> float | None:
        """The same of validation images."""
        return self._left("val")

    def _left(self, split: str) -> float | None:
        found, prior = self.probe.get(split), self.probe.get("prior_nll")
        return found["nll"] / prior if found and prior and found["nll"] is not None else None

    @property
    def poor(self) -> bool:
        """Whether little was learned: without a probe, by the training loss, whatever it holds."""
        return self.end > 0.6 * self.start if self.left is None else self.left > POOR

    def noise(self, accuracy: float) -> float:
        """What a validation accuracy is uncertain by (`SIGMAS`); 0 where no probe counted images.

        Two of one network on the same images differ by chance by less.
        """
        samples = (self.probe.get("val") or {}).get("samples")
        return SIGMAS * float(np.sqrt(_variance(accuracy, samples))) if samples else 0.0

    def at(self, step: float) -> float:
        """The smoothed training loss at the recorded step nearest below `step`."""
        return float(self.path[max(0, int(np.searchsorted(self.step, step, side="right")) - 1)])

    def quarter(self, number: int) -> NDArray[np.float64]:
        """The finite losses of a quarter of the records, from 0."""
        parts = np.array_split(self.loss, 4)[number]
        return parts[np.isfinite(parts)]

    def time(self) -> NDArray[np.float64]:
        """The learning-rate time of each record: the sum of rates up to it, over that of all.

        It tells a run that has settled from one whose rate has come down: a loss that falls
        linearly in it would have fallen on.
        """
        rate = np.nan_to_num(self.history.train.get("lr", np.ones(len(self.step))))
        passed = np.cumsum(rate * np.diff(self.step, prepend=0))
        whole: NDArray[np.float64] = passed / passed[-1] if passed[-1] else np.zeros(len(passed))
        return whole


def gap(probe: Record) -> tuple[float, float]:
    """Accuracy on training less that on validation images, and its standard error.

    With none of a few samples wrong the error is not 0: one more of each outcome is added to it
    (Agresti and Caffo 2000, for the difference of two shares).
    """
    train, val = probe["train"], probe["val"]
    variance = sum(_variance(found["accuracy"], found["samples"]) for found in (train, val))
    return train["accuracy"] - val["accuracy"], float(np.sqrt(variance))


def _variance(accuracy: float, samples: int) -> float:
    n = samples + 2
    p = (accuracy * samples + 1) / n
    return p * (1 - p) / n


def compared(probe: Record) -> bool:
    """Whether a probe holds both splits."""
    return bool(probe.get("train") and probe.get("val"))
