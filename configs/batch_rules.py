"""What depends on the batch where that changes: rules, each `none` unless a recipe says otherwise.

Sources: Goyal et al. 2017 (arXiv:1706.02677), Malladi et al. 2022 (arXiv:2205.10287), Johnson et
al. 2020 (arXiv:2007.05105), Busbridge et al. 2023 (arXiv:2307.13813), Bergsma et al. 2025
(arXiv:2505.13738), Wang and Aitchison 2024 (arXiv:2405.13698).
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from bigbatch.configs.part import StrictModel


class Rules(StrictModel):
    """What a step of k times the first batch has: fields of every kind of change."""

    lr: Literal["none", "linear", "sqrt", "adascale"] = Field(
        "none",
        description="what the learning rate does where a batch is k times the first one: none: "
        "nothing, linear: times k (SGD; Goyal et al. 2017), sqrt: times the square root of k "
        "(Adam, LAMB; Malladi et al. 2022), adascale: times a gain between 1 and k, by the "
        "gradient noise that the steps before have measured (SGD; Johnson et al. 2020)",
    )

    batch_norm: Literal["none", "power"] = Field(
        "none",
        description="what the momentum m of BatchNorm's running statistics does there: none: "
        "nothing, power: 1 - (1 - m)^k, that of k steps (after Busbridge et al. 2023)",
    )

    betas: Literal["none", "power"] = Field(
        "none",
        description="what the betas of Adam, AdamW and LAMB do there: none: nothing, power: "
        "beta^k, so that moments forget by samples; close to 1 - k (1 - beta) (Malladi et al. "
        "2022)",
    )

    weight_decay: Literal["none", "timescale"] = Field(
        "none",
        description="what a weight decay apart from the gradient does there: none: nothing, "
        "timescale: rate times decay go with the batch, so that weights forget by samples (Wang "
        "and Aitchison 2024; Bergsma et al. 2025)",
    )

    def betas_power(self, batch: int) -> float:
        """Which power of its betas an optimizer has at `batch` samples a step."""
        return batch / self.first if self.betas == "power" else 1.0

    def decay_factor(self, batch: int) -> float:
        """The weight decay at `batch` samples a step, relative to that of the first step."""
        if self.weight_decay == "none":
            return 1.0
        return batch / self.first / self.lr_factor(batch)

    def batch_norm_power(self, batch: int) -> float:
        """For how many steps of the first batch one of `batch` samples moves running statistics."""
        return batch / self.first if self.batch_norm == "power" else 1.0

    def lr_factor(self, batch: int) -> float:
        """The learning rate at `batch` samples a step, relative to that of the first step.

        As far as that is known ahead: `gain` comes on top of it.
        """
        ratio = batch / self.first
        return {"linear": ratio, "sqrt": math.sqrt(ratio)}.get(self.lr, 1.0)

    def gain(self, batch: int, noise: float, signal: float) -> float:
        """What averages of noise and signal multiply the learning rate by at `batch` samples.

        AdaScale's gain (Johnson et al. 2020, arXiv:2007.05105, equation 3), of a scale of k = batch
        / first: (s + m) / (s / k + m), where s is the variance of the first batch's gradient and m
        the squared norm of its mean. 1 while nothing has been measured.
        """
        if self.lr != "adascale":
            return 1.0
        variance, mean = max(noise, 0.0) / self.first, max(signal, 0.0)
        below = variance * self.first / batch + mean
        return (variance + mean) / below if below > 0 else 1.0

    @property
    def first(self) -> int:
        """The samples of the run's first step."""
        return self.sizes[0]

    @property
    def sizes(self) -> list[int]:
        """The samples of a step, as they follow each other."""
        raise NotImplementedError

    def changes(self, epoch_samples: int) -> Iterator[tuple[float, int]]:
        """(samples, batch): from how many on a step takes how many."""
        raise NotImplementedError


def without_base(batch: Rules, optimizer: Any) -> Iterator[str]:
    """Rules that have nothing in the optimizer to hold for."""
    rest = getattr(optimizer, "rest", None)
    names = optimizer.name if rest is None else f"{optimizer.name} with rest {rest.name}"
    second = optimizer if rest is None else rest
    if batch.betas != "none" and second.name not in ("adam", "adamw", "lamb"):
        yield (
            f"global_batch.betas: {batch.betas} is for the moments of adam, adamw and lamb (also "
            f"as muon's rest), and the optimizer is {names}; set it to none"
        )
    if batch.lr == "adascale" and optimizer.name != "sgd":
        yield (
            f"global_batch.lr: adascale is a rule for sgd, and the optimizer is {names}; set it to "
            "sqrt, linear or none"
        )
    if batch.weight_decay == "none":
        return
    decaying = [part for part in (optimizer, rest) if part is not None and _decays(part)]
    if not decaying:
        yield (
            f"global_batch.weight_decay: {batch.weight_decay} has no optimizer.weight_decay to "
            "start from; set one, or set it to none"
        )
    if odd := [part.name for part in decaying if part.name not in ("adamw", "lion", "muon")]:
        yield (
            f"global_batch.weight_decay: {batch.weight_decay} is for a decay apart from the "
            f"gradient, of adamw, lion and muon; {odd[0]} decays in another way, so set it to none"
        )


def _decays(optimizer: Any) -> bool:
    """Whether any weight decays."""
    of_layers = getattr(optimizer, "weight_decay_of", {}).values()
    return any([getattr(optimizer, "weight_decay", 0.0), *of_layers])
