"""Training a compressed network further, as its recipe trains, in one process."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bigbatch.configs.batch import PostLocal
from bigbatch.configs.durations import Length
from bigbatch.configs.errors import UserError
from bigbatch.configs.schema import Recipe
from bigbatch.data.batch import BatchPlan
from bigbatch.data.rng import key64
from bigbatch.trainers.compress.pruning import apply_masks
from bigbatch.trainers.engine import open_engine
from bigbatch.trainers.job import class_counts, training_batches
from bigbatch.trainers.losses.build import build_objective
from bigbatch.trainers.models.batch_stats import StepStatistics
from bigbatch.trainers.models.build import build_augmenter, choose_memory_format
from bigbatch.trainers.optim import build_optimizer, set_lr
from bigbatch.trainers.planning.inputs import Inputs


def check_finetuning(recipe: Recipe) -> None:
    """Raise UserError where a recipe's training cannot be gone on with here."""
    if recipe.data.stream is not None:
        raise UserError(
            "--finetune needs a training split with an index, and data.stream has none; leave "
            "--finetune out"
        )
    if recipe.loss.name == "center":
        raise UserError("--finetune has no centres, which loss center learns; leave --finetune out")
    if isinstance(recipe.global_batch, PostLocal):
        raise UserError(
            "--finetune takes steps of one model, and those of global_batch post_local are rounds "
            "of several workers; leave --finetune out"
        )
    if recipe.optimizer.name == "lbfgs":
        raise UserError("--finetune goes step by step, and lbfgs does not; leave --finetune out")


def finetune(
    network: nn.Module,
    recipe: Recipe,
    inputs: Inputs,
    length: Length,
    lr_factor: float,
    masks: Mapping[str, Tensor] | None = None,
) -> None:
    """Train `network` in place for `length`; weights under a False of `masks` stay 0.

    The steps follow the recipe's last one: the order of samples, augmentation and dropout go
    on from there, with its loss, optimizer, clipping and precision. The rate starts at
    `lr_factor` of the recipe's and falls to 0 as half a cosine; Han et al. 2015
    (arXiv:1506.02626, section 3.4) advise a tenth. Raises UserError where it diverges.
    """
    engine = open_engine("ddp", recipe.precision, recipe.reduction, determinism=recipe.determinism)
    network.to(memory_format=choose_memory_format(recipe.model, engine.device)).train()
    start = inputs.plan.total
    line = inputs.plan.timeline.upto(start)  # on from there with the batch that the run ended on
    size = line.batch(start)
    micro_batches = size // recipe.micro_batch
    engine.prepare(network, build_optimizer(network, recipe.optimizer), micro_batches)
    augmenter = build_augmenter(recipe, len(inputs.classes), engine.device, inputs)
    objective = build_objective(recipe.loss, network, class_counts(inputs))
    statistics = StepStatistics(network)
    steps = length.steps(size, inputs.epoch_samples)
    plan = BatchPlan(line, recipe.micro_batch, 0, 1, start, start + steps)
    batches = training_batches(recipe, inputs, plan, augmenter.view, engine.device)

    for step in range(start, start + steps):
        falling = (1 + math.cos(math.pi * (step - start) / steps)) / 2
        set_lr(engine.optimizer, recipe.lr_scale * lr_factor * falling)
        engine.zero_grad()
        statistics.begin()
        for number in range(micro_batches):
            batch = next(batches).to(engine.device)
            torch.manual_seed(key64(recipe.seed, step, batch.index, "model"))
            images, targets = augmenter.train(batch)
            with engine.micro_batch(last=number == micro_batches - 1):
                engine.backward(objective(engine.model, images, targets))
            statistics.add()
        engine.reduce()
        norm = engine.gradient_norm()
        if not math.isfinite(norm) and engine.scaler is not None:  # fp16 finds its loss scale
            statistics.discard()
            engine.skip()
            continue
        if not math.isfinite(norm):
            raise UserError(
                f"fine-tuning has no finite gradient in step {step - start} of {steps}; lower "
                f"--finetune-lr, which is {lr_factor:g}"
            )
        statistics.finish(statistics.local(), micro_batches)
        if recipe.clip is not None:
            engine.clip(recipe.clip, norm)
        engine.step()
        apply_masks(network, masks or {})
    for layer, momentum in zip(statistics.layers, statistics.momentum, strict=True):
        layer.momentum = momentum
    network.cpu().to(memory_format=torch.contiguous_format).eval()
