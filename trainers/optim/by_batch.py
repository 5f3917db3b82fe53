"""What an optimizer's betas and weight decay do where the batch changes: functions of the batch."""

import torch
from torch import Tensor

from bigbatch.configs.batch import Changing


def set_by_batch(
    optimizer: torch.optim.Optimizer, rules: int | Changing, batch: int, before: int
) -> None:
    """Set what holds in a step of `batch` samples, k times the first batch, after one of `before`.

    `betas: power` makes beta^k of each, the decay of k steps of the first batch, which is
    1 - k (1 - beta) to first order in it (Malladi et al. 2022, arXiv:2205.10287). Bias correction
    is 1 - the product of the betas so far. Optimizers take it for 1 - beta^t after t updates: so t
    is divided by the change of k, and the product stays what it was, for both betas.

    `weight_decay: timescale` multiplies decays by k, and divides them by what the rate is
    multiplied by: n samples take the same part of a weight away in steps of any batch (Wang and
    Aitchison 2024, arXiv:2405.13698; Bergsma et al. 2025, arXiv:2505.13738).

    To be called once in each step, before its update and also where it makes none. Optimizer state
    holds t, as the step before has left it.
    """
    if isinstance(rules, int):
        return
    if rules.weight_decay != "none":
        for group in optimizer.param_groups:
            group["weight_decay"] = group["base_weight_decay"] * rules.decay_factor(batch)
    if rules.betas == "none":
        return
    power = rules.betas_power(batch)
    for group in optimizer.param_groups:
        if "base_betas" in group:
            group["betas"] = tuple(beta**power for beta in group["base_betas"])
    if (ratio := power / rules.betas_power(before)) != 1.0:
        for state in optimizer.state.values():
            if isinstance(count := state.get("step"), Tensor):
                count.div_(ratio)
