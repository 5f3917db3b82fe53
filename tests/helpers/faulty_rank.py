"""A worker of which one rank corrupts bits in one step: faulty_rank.py FAULT RANK STEP RUN_DIR.

STEP counts the steps before it. FAULT is a place and, after a dot, what happens there:

    weight, momentum            memory that stays: a bit flips before the step's first pass
    buffer                      likewise, running statistics, after the step's update
    gradient, activation        what that pass computes, once; with `.always` whatever this rank
                                computes from there on, another rank's micro-batch, too
    .two, .swap                 the same bit of two elements flips; two elements change places
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.trainers import job, worker

BIT = 20  # of a float32's mantissa of 23


@torch.no_grad()
def corrupt(tensor: Tensor, how: str = "") -> None:
    """Change bits of a float32 tensor in place."""
    words = tensor.view(torch.int32).view(-1)
    last = len(words) - 1
    if how == "swap":
        words[0], words[last] = words[last].clone(), words[0].clone()
        assert words[0] != words[last]
        return
    words[0] ^= 1 << BIT
    if how == "two":
        words[last] ^= 1 << BIT


def main() -> int:
    fault, rank, step, *rest = sys.argv[1:]
    if os.environ.get("RANK", "0") == rank:
        build = job.build_job

        def build_faulty(*arguments: Any) -> job.Job:
            built = build(*arguments)
            return replace(built, objective=faulty(built, fault, int(step)))

        job.build_job = build_faulty
    return worker.main(rest)


def faulty(built: job.Job, fault: str, at: int) -> Callable[..., Tensor]:
    objective, module = built.objective, built.engine.module
    place, _, how = fault.partition(".")
    layer: Any = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
    norm: Any = next(m for m in module.modules() if isinstance(m, nn.BatchNorm2d))
    calls = [0]

    def objective_with_fault(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        step = built.course.step
        calls[0] += step >= at
        once = calls[0] == 1 and step == at
        if once and place == "weight":
            corrupt(layer.weight, how)
        elif once and place == "momentum":
            corrupt(built.engine.optimizer.state[layer.weight]["momentum_buffer"], how)
        elif once and place == "buffer":
            built.engine.optimizer.register_step_post_hook(updated)
        elif (once or (how == "always" and step >= at)) and place == "gradient":
            return with_hook(layer.weight, objective(model, images, targets))
        elif (once or (how == "always" and step >= at)) and place == "activation":
            handle = layer.register_forward_hook(lambda *called: changed(called[-1]))
            loss = objective(model, images, targets)
            handle.remove()
            return loss
        return objective(model, images, targets)

    def updated(*step: Any) -> None:
        if built.course.step == at:
            corrupt(norm.running_mean, how)

    def with_hook(weight: Tensor, loss: Tensor) -> Tensor:
        handle: Any = None

        def hook(gradient: Tensor) -> Tensor:
            handle.remove()
            return changed(gradient)

        handle = weight.register_hook(hook)
        return loss

    def changed(tensor: Tensor) -> Tensor:
        other = tensor.clone()
        corrupt(other.detach(), how)
        return other

    return objective_with_fault


if __name__ == "__main__":
    os._exit(main())
