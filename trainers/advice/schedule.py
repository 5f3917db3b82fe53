"""A batch schedule for a number of GPUs, and an optimizer, from what a run has measured.

Each phase of the run has its own noise scale, and so its own batch that is fastest
(McCandlish et al. 2018, arXiv:1812.06162, section 2.2: time and samples by phase). Free of torch.
"""

import math
from dataclasses import dataclass
from typing import Any

from bigbatch.configs.durations import Length, parse
from bigbatch.configs.errors import UserError
from bigbatch.configs.load import parse_recipe
from bigbatch.configs.schema import Recipe
from bigbatch.trainers.advice.advise import BATCHES_TRIED, Choice, RunAdvice, fastest, scale_lr
from bigbatch.trainers.advice.critical_batch import Phase
from bigbatch.trainers.planning.plan import check_world, make_plan

# Below so many steps running statistics have not forgotten their start (configs/evaluation.py), and
# optimizers made for many steps fall behind (docs/large-batch.md).
FEW_STEPS = 500
# To start from, on few steps: docs/large-batch.md, "What to try".
_MUON_LR, _MUON_MOST, _REST_LR = 0.1, 0.28, 0.03


@dataclass(frozen=True)
class Stage:
    """A part of the proposed run, with steps that are all alike."""

    phases: list[str]  # of the measured run, in whose place it is
    batch: int
    samples: int  # a multiple of `batch`
    step_s: float

    @property
    def steps(self) -> int:
        return self.samples // self.batch

    @property
    def seconds(self) -> float:
        return self.steps * self.step_s


@dataclass(frozen=True)
class ScheduleAdvice:
    gpus: int
    stages: list[Stage]
    constant: Choice  # the fastest batch that does not change, on as many GPUs
    optimizer: str
    reason: str  # why this optimizer
    lr: float  # at the first batch
    rule: str  # what the rate does where the batch changes
    recipe: Recipe

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def samples(self) -> int:
        return sum(stage.samples for stage in self.stages)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)


def advise_schedule(found: RunAdvice, recipe: Recipe, gpus: int) -> ScheduleAdvice:
    """Stages, optimizer and recipe for `gpus` GPUs, from the advice on a run of `recipe`.

    Each phase takes the batch with which its share of the run's quality is reached in the least
    time, at most an epoch. Raises UserError where a step of so many GPUs is larger, and where the
    recipe has what does not go with such steps.
    """
    lengths_of = [p.last_step - p.first_step + 1 for p in found.phases]
    stages: list[Stage] = []
    for phase, length in zip(found.phases, lengths_of, strict=True):
        taken = found.samples * length / sum(lengths_of)
        stage = _fastest(phase, taken, found, gpus)
        if stages and stages[-1].batch == stage.batch:
            last = stages.pop()
            stage = Stage(
                [*last.phases, *stage.phases],
                stage.batch,
                last.samples + stage.samples,
                stage.step_s,
            )
        stages.append(stage)
    constant = fastest(
        *(found.curve, found.step_time, found.batch, found.lr, found.rule),
        gpus=gpus,
        max_batch=found.epoch_samples,
    )
    assert constant is not None  # it has the same limit
    steps = sum(stage.steps for stage in stages)
    few = steps < FEW_STEPS and recipe.optimizer.name != "muon"
    if few:
        reason = f"{steps:,} steps are few: below {FEW_STEPS} it leads over the others so far"
        lr = min(_MUON_MOST, _MUON_LR * math.sqrt(stages[0].batch / 256))
        rule = "none"
        optimizer: dict[str, Any] = {
            "name": "muon",
            "lr": float(f"{lr:.3g}"),
            "momentum": 0.6,
            "rest": {"name": "lamb", "lr": _REST_LR, "betas": [0.8, 0.95]},
        }
    else:
        reason = "that of the run, its rate carried over"
        rule = found.rule
        lr = scale_lr(found.lr, stages[0].batch / found.batch, found.rule)
        optimizer = recipe.optimizer.model_dump(mode="json")
        if optimizer.get("rest"):  # the rule is for both
            rest = optimizer["rest"]["lr"] * lr / recipe.optimizer.lr
            optimizer["rest"] |= {"lr": float(f"{rest:.4g}")}
        optimizer |= {"lr": float(f"{lr:.4g}"), "scale": None}
    written = _recipe(recipe, found.batch, stages, optimizer, rule)
    check_world(written, gpus)
    make_plan(written, found.epoch_samples)
    return ScheduleAdvice(
        gpus, stages, constant, optimizer["name"], reason, optimizer["lr"], rule, written
    )


def _fastest(phase: Phase, taken: float, found: RunAdvice, gpus: int) -> Stage:
    """The stage in the place of a phase that took so many samples at the run's batch."""
    noise, signal, step_time = max(phase.noise, 0.0), max(phase.signal, 0.0), found.step_time
    stages = []
    for turns in BATCHES_TRIED:
        batch = step_time.micro_batch * gpus * turns
        if batch > found.epoch_samples:
            break
        samples = taken * (noise + batch * signal) / (noise + found.batch * signal)
        whole = batch * max(1, round(samples / batch))
        stage = Stage([phase.name], batch, whole, step_time.seconds(batch, gpus))
        stages.append((samples / batch * stage.step_s, stage))
    if not stages:
        raise UserError(
            f"--gpus {gpus}: one step of them is {step_time.micro_batch * gpus:,} samples, more "
            f"than an epoch of {found.epoch_samples:,}; ask for fewer"
        )
    return min(stages, key=lambda pair: pair[0])[1]


def _recipe(
    recipe: Recipe, batch: int, stages: list[Stage], optimizer: dict[str, Any], rule: str
) -> Recipe:
    """The run's recipe with these stages. Durations in steps become as many samples."""
    tree: dict[str, Any] = recipe.model_dump(mode="json")
    tree["optimizer"] = optimizer
    tree["duration"] = f"{sum(stage.samples for stage in stages)} samples"
    tree["global_batch"] = stages[0].batch
    if len(stages) > 1:
        ends = [0]
        for stage in stages:
            ends.append(ends[-1] + stage.samples)
        pieces: list[dict[str, Any]] = [{"batch": stage.batch} for stage in stages]
        for piece, end in zip(pieces[:-1], ends[1:-1], strict=True):
            piece["until"] = f"{end} samples"
        tree["global_batch"] = {"name": "stages", "pieces": pieces, "lr": rule}
        tree["schedule"] = _in_samples(tree["schedule"], batch)
        if tree["optimizer"].get("momentum_schedule"):
            tree["optimizer"] = _in_samples(tree["optimizer"], batch)
    return parse_recipe(tree, "proposed")


def _in_samples(node: Any, batch: int) -> Any:
    """A tree of plain values in which durations of steps are those of as many samples."""
    if isinstance(node, dict):
        return {key: _in_samples(value, batch) for key, value in node.items()}
    if isinstance(node, list):
        return [_in_samples(value, batch) for value in node]
    if isinstance(node, str) and node.endswith(" steps"):
        length = parse(node)
        return str(Length(length.value * batch, "samples")) if length.value else node
    return node
