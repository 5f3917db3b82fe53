"""Advice on batch size, learning rate and number of GPUs, from what was measured.

`advise_run` reads a run directory: the recorded gradient norms give the critical batch size
by phase, the recorded step time and a stated model of the all-reduce give the time of other
batch sizes on other numbers of GPUs. Free of torch.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bigbatch.configs.errors import UserError
from bigbatch.configs.rundir import RunDir
from bigbatch.configs.schema import Recipe
from bigbatch.trainers.advice.critical_batch import (
    CostCurve,
    Phase,
    curve_of_phases,
    measure_phase,
    noise_and_signal,
)
from bigbatch.trainers.monitoring.history import History, read_history

Rule = Literal["linear", "sqrt"]

# The backward pass, twice as much work as the forward pass, hides an overlapped all-reduce.
_HIDING = 2 / 3
_MIN_STEPS = 10  # records in a phase, below which its blocks say nothing
BATCHES_TRIED = (1, 2, 4, 8, 16)  # micro-batches of each GPU in a step


@dataclass(frozen=True)
class Cluster:
    """The network between GPUs, for the ring all-reduce."""

    bandwidth: float  # bytes/s of the slowest link of the ring
    latency: float  # seconds of one of its 2 (ranks - 1) hops

    def all_reduce_s(self, size: float, ranks: int) -> float:
        """Seconds to sum `size` bytes over ranks (Patarasuk and Yuan 2009)."""
        hops = 2 * (ranks - 1)
        return hops / ranks * size / self.bandwidth + hops * self.latency


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step at any batch size and number of ranks.

    Each rank computes its micro-batches one after the other; then comes what the last
    backward pass does not hide of the all-reduce.
    """

    micro_batch: int
    micro_s: float  # seconds of one micro-batch, with its share of all else in a step
    gradient_bytes: float
    hiding: float  # part of a micro-batch's time that hides the all-reduce
    cluster: Cluster

    def seconds(self, batch: int, ranks: int) -> float:
        turns = math.ceil(batch / self.micro_batch / ranks)
        exchange = self.cluster.all_reduce_s(self.gradient_bytes, ranks)
        return turns * self.micro_s + max(0.0, exchange - self.hiding * self.micro_s)


@dataclass(frozen=True)
class Choice:
    """The batch size that is fastest on a number of GPUs, and what it comes to."""

    gpus: int
    batch: int
    lr: float
    steps: int
    step_s: float
    seconds: float
    seconds_interval: tuple[float, float]  # from that of the critical batch alone
    extra_samples: float  # samples beyond the least possible, relative to it


@dataclass(frozen=True)
class RunAdvice:
    name: str
    batch: int
    lr: float
    rule: Rule
    scaled: bool  # the recipe itself scales its rate with the batch (optimizer.scale)
    phases: list[Phase]
    curve: CostCurve  # samples
    step_time: StepTime
    measured_step_s: float
    measured_ranks: int
    parameters: int
    choices: list[Choice]
    samples: int  # that the whole run was set to take
    epoch_samples: int


def advise_run(
    run: RunDir,
    cluster: Cluster,
    *,
    rule: Rule | None = None,
    phases: int | None = None,
    parameters: int | None = None,
    max_gpus: int = 1024,
) -> RunAdvice:
    """Advice from a run, finished or not.

    `phases` counts equal parts of the run; None: its cycles, or thirds where it has none.
    `parameters` are those of the model; None: counted in its newest weights on disk. Raises
    UserError where the records do not suffice.
    """
    history = read_history(run)
    recipe, batch = history.recipe, history.recipe.global_batch
    if not isinstance(batch, int):
        raise UserError(
            f"run {run.name} changes its batch ({batch.name}), and advice is from steps that are "
            "all alike; train a short run with a number for global_batch"
        )
    found = measure_phases(history, phases)
    total = (history.total_steps or history.last_step) * batch
    lengths = [p.last_step - p.first_step + 1 for p in found]
    samples = [total * length / sum(lengths) for length in lengths]
    curve = curve_of_phases(found, samples, batch)
    parameters = parameters or count_parameters(run)
    step_time, step_s, ranks = measure_step(history, parameters, cluster)
    rule = rule or default_rule(recipe)
    epoch_samples = round(batch * history.train["step"][-1] / history.train["epoch"][-1])
    choices = choose(
        curve,
        step_time,
        batch,
        recipe.optimizer.lr * recipe.lr_scale,
        rule,
        max_gpus=max_gpus,
        max_batch=epoch_samples,
    )
    return RunAdvice(
        name=run.name,
        batch=batch,
        lr=recipe.optimizer.lr * recipe.lr_scale,
        rule=rule,
        scaled=recipe.optimizer.scale is not None,
        phases=found,
        curve=curve,
        step_time=step_time,
        measured_step_s=step_s,
        measured_ranks=ranks,
        parameters=parameters,
        choices=choices,
        samples=total,
        epoch_samples=epoch_samples,
    )


def measure_phases(history: History, count: int | None) -> list[Phase]:
    """The noise scale by phase: cycles, or `count` equal parts of the recorded steps."""
    train, recipe = history.train, history.recipe
    if "grad_sq_micro" not in train or recipe.micro_batches == 1:
        why = (
            "each of its steps is one micro-batch, with nothing to compare it to; train with "
            f"a micro_batch below the global_batch of {recipe.first_batch}"
            if recipe.micro_batches == 1
            else "train a few dozen steps with this version of bigbatch"
        )
        raise UserError(f"run {history.name} has no recorded gradient norms: {why}")
    micro, norm = train["grad_sq_micro"], train["grad_norm"]
    whole = np.isfinite(micro) & np.isfinite(norm)
    steps = train["step"][whole]
    noise, signal = noise_and_signal(
        micro[whole], norm[whole] ** 2, recipe.micro_batch, history.batches[whole]
    )
    cycles = count is None and len(history.snapshots) > 1
    if cycles:
        ends = np.array(history.snapshots, dtype=np.float64)
        parts = np.split(np.arange(len(steps)), np.searchsorted(steps, ends, side="right"))
        parts = [part for part in parts if len(part)]
    else:
        parts = np.array_split(np.arange(len(steps)), count or 3)
    shortest = min(map(len, parts))
    if shortest < _MIN_STEPS:
        raise UserError(
            f"run {history.name}: {shortest} usable records in one of {len(parts)} phases, at "
            f"least {_MIN_STEPS} are needed; train longer, lower log.every, or lower --phases"
        )
    for part in parts:
        if max(noise[part].mean(), signal[part].mean()) <= 0:
            raise UserError(
                f"run {history.name}: the gradients of steps {steps[part[0]]:.0f} to "
                f"{steps[part[-1]]:.0f} are 0, which tells nothing; train with another rate"
            )
    generator = np.random.default_rng(0)
    word = "cycle" if cycles else "part"
    return [
        measure_phase(f"{word} {i}", steps[part], noise[part], signal[part], generator)
        for i, part in enumerate(parts, start=1)
    ]


def measure_step(
    history: History, parameters: int, cluster: Cluster
) -> tuple[StepTime, float, int]:
    """The step time's model, the median step that it was taken from, and its ranks.

    From the newest start that recorded steps, since each start may have other ranks.
    """
    recipe = history.recipe
    seconds, ranks = _newest_steps(history)
    size = parameters * (8 if recipe.reduction == "exact" else 4)
    hiding = _HIDING if recipe.reduction == "overlapped" else 0.0
    exchange = cluster.all_reduce_s(size, ranks)
    turns = math.ceil(recipe.micro_batches / ranks)
    # Solve turns * m + max(0, exchange - hiding * m) = seconds for m.
    micro_s = min(seconds / turns, (seconds - exchange) / (turns - hiding))
    if micro_s <= 0:
        raise UserError(
            f"the all-reduce of {parameters:,} parameters over {ranks} ranks takes {exchange:.3g} "
            f"s at --bandwidth {cluster.bandwidth / 1e9:g}, a whole step of run {history.name} "
            f"only {seconds:.3g} s; give the true bandwidth, which must be higher"
        )
    return StepTime(recipe.micro_batch, micro_s, size, hiding, cluster), seconds, ranks


def _newest_steps(history: History) -> tuple[float, int]:
    """Median step time after the newest start with steps, its first one left out; ranks."""
    train = history.train
    starts = [e for e in history.events if e["kind"] == "start" and "step_s" in train]
    end = np.inf
    for start in reversed(starts):
        first = float(str(start.get("step", 0)))
        seconds = train["step_s"][(train["step"] > first) & (train["step"] <= end)][1:]
        if np.isfinite(seconds).any():
            return float(np.nanmedian(seconds)), int(str(start.get("world_size", 1)))
        end = first
    raise UserError(
        f"run {history.name} recorded no step time since its newest start; train a few dozen steps"
    )


def count_parameters(run: RunDir) -> int:
    """Trained parameters in the newest weights of a run, from the header of the file."""
    from safetensors import safe_open

    files = [*run.checkpoints.glob("*/model.safetensors"), *run.snapshots.glob("*/*.safetensors")]
    if not files:
        raise UserError(
            f"{run.path} holds no weights to count; give the model's size by --parameters"
        )
    newest = max(files, key=lambda f: f.stat().st_mtime)
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    with safe_open(newest, framework="numpy") as file:
        names = [name for name in file.keys() if not name.endswith(buffers)]  # noqa: SIM118
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def default_rule(recipe: Recipe) -> Rule:
    """linear for SGD (Goyal et al. 2017); sqrt for adaptive and layer-wise optimizers.

    You et al. 2020 scale LAMB so; the learning rates of MLPerf's LARS submissions rise more
    slowly still.
    """
    return "linear" if recipe.optimizer.name == "sgd" else "sqrt"


def scale_lr(lr: float, factor: float, rule: Rule) -> float:
    """The learning rate at `factor` times the batch size that `lr` was chosen for."""
    return lr * (factor if rule == "linear" else math.sqrt(factor))


def choose(
    curve: CostCurve,
    step_time: StepTime,
    batch: int,
    lr: float,
    rule: Rule,
    *,
    max_gpus: int,
    max_batch: int,
) -> list[Choice]:
    """For 1, 2, 4, ... GPUs the fastest batch size to the quality that the run was set to reach.

    `batch` and `lr` are the run's; `max_batch` is an epoch. On more GPUs than make the run
    faster there is no choice.
    """
    choices: list[Choice] = []
    gpus = 1
    while gpus <= max_gpus:
        best = fastest(curve, step_time, batch, lr, rule, gpus=gpus, max_batch=max_batch)
        if best is None or (choices and best.seconds >= choices[-1].seconds):
            break
        choices.append(best)
        gpus *= 2
    return choices


def fastest(
    curve: CostCurve,
    step_time: StepTime,
    batch: int,
    lr: float,
    rule: Rule,
    *,
    gpus: int,
    max_batch: int,
) -> Choice | None:
    """The same for this number of GPUs; None where the least step of them is over `max_batch`."""
    found = []
    for turns in BATCHES_TRIED:
        size = step_time.micro_batch * gpus * turns
        if size > max_batch:
            break
        step_s = step_time.seconds(size, gpus)
        low, high = curve.cost_interval(size)
        samples = curve.cost(size)
        found.append(
            Choice(
                gpus=gpus,
                batch=size,
                lr=scale_lr(lr, size / batch, rule),
                steps=math.ceil(samples / size),
                step_s=step_s,
                seconds=samples / size * step_s,
                seconds_interval=(low / size * step_s, high / size * step_s),
                extra_samples=samples / curve.floor - 1 if curve.floor > 0 else math.inf,
            )
        )
    return min(found, key=lambda c: c.seconds, default=None)
