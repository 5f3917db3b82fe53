"""The training loop, in the order in which it happens."""

import math
import time
from collections.abc import Callable, Iterator

import torch

from bigbatch.configs.schema import Recipe
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.batch import MicroBatch
from bigbatch.data.rng import key64
from bigbatch.trainers.advice.noise_scale import NoiseScale
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.engine.closure import Closure
from bigbatch.trainers.losses.build import LossFunction
from bigbatch.trainers.models.batch_stats import StepStatistics
from bigbatch.trainers.monitoring.log import Log
from bigbatch.trainers.monitoring.monitor import Monitor
from bigbatch.trainers.optim import set_lr
from bigbatch.trainers.planning.plan import Plan
from bigbatch.trainers.recovery.checkpoint import TrainState
from bigbatch.trainers.recovery.rollback import check_step
from bigbatch.trainers.recovery.saving import Saver
from bigbatch.trainers.recovery.signals import StopFlag
from bigbatch.trainers.recovery.watchdog import Watchdog

# fp16 halves its loss scale at each overflow: 2^16 is through long before this many in a row.
_MAX_SKIPPED = 50


def train(
    recipe: Recipe,
    engine: Engine,
    state: TrainState,
    log: Log,
    *,
    plan: Plan,
    statistics: StepStatistics,
    schedule: Callable[[int], float],
    loss_function: LossFunction,
    batches: Iterator[MicroBatch],
    augmenter: Augmenter,
    evaluate: Callable[[], dict[str, float]],
    snapshot: Callable[[dict[str, float]], None],
    saver: Saver,
    watchdog: Watchdog,
    stop: StopFlag,
    monitor: Monitor,
) -> bool:
    """Train from `state.step` to `plan.stop`. False where a signal cut it short.

    Raises Rollback where steps went wrong that shall be stepped over.

    `evaluate` scores the validation split and `snapshot` keeps the weights; both are
    collective: every rank calls them in the same step.
    """
    model, optimizer = engine.model, engine.optimizer
    noise = NoiseScale(recipe.micro_batch, recipe.global_batch)
    mine = len(range(engine.rank, plan.micro_batches, engine.world))
    clock = monitor.clock
    closure = None
    if recipe.optimizer.name == "lbfgs":
        closure = Closure(engine, statistics, loss_function, plan.micro_batches)
    skipped = 0
    model.train()

    for step in range(state.step, plan.stop):
        started = time.perf_counter()
        clock.begin_step()
        factor = schedule(step)
        set_lr(optimizer, factor)

        # 1. Gradients: this rank's micro-batches, each seeded by its own place in the run.
        loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
        engine.zero_grad()
        statistics.begin()
        for number in range(mine):
            watchdog.beat(step, "loading")
            with clock("data"):
                batch = next(batches)
            assert batch.step == step
            watchdog.beat(step, "computing")
            clock.micro_batch(batch.slow_read)
            with clock("copy"):
                batch = batch.to(engine.device)
            seed = key64(recipe.seed, step, batch.index, "model")
            torch.manual_seed(seed)
            with clock("augment"):
                images, targets = augmenter.train(batch)
            with clock("model"), engine.micro_batch(last=number == mine - 1):
                loss = loss_function(model(images), targets)
                engine.backward(loss)
            if closure is not None:
                closure.keep(seed, images, targets)
            statistics.add()
            loss_sum += loss.detach()

        # 2. What all ranks must agree on: the mean gradient, and the rest in one small
        #    all-reduce. Sums are float64, so that they do not depend on the world size.
        watchdog.beat(step, "reducing")
        with clock("reduce"):
            engine.reduce()
            stopping = loss_sum.new_full((), float(bool(stop)))
            agreed = torch.stack([loss_sum, stopping, engine.micro_batch_sq()])
            parts = [agreed, statistics.local().to(agreed), monitor.table(step + 1)]
            totals = engine.sum(torch.cat(parts)).split([len(part) for part in parts])
            norm = engine.gradient_norm()
            read_back = torch.cat([totals[0], norm.view(1), totals[2]]).tolist()
        loss_total, stops, micro_sq, norm_value, *timings = read_back
        mean_loss = loss_total / plan.micro_batches

        # 3. The update. Nothing non-finite ever reaches the weights, on any rank.
        finite = math.isfinite(mean_loss) and math.isfinite(norm_value)
        skipped = 0 if finite else skipped + 1
        if not finite:
            log.event("non_finite", step=step, loss=mean_loss, grad_norm=norm_value)
        if check_step(
            recipe.recovery,
            step,
            mean_loss,
            norm_value,
            earlier=state.losses,
            over=state.over,
            may_overflow=engine.scaler is not None and skipped <= _MAX_SKIPPED,
        ):
            statistics.finish(totals[1], plan.micro_batches)
            with clock("optimizer"):
                if recipe.clip is not None:
                    engine.clip(recipe.clip, norm)
                if closure is None:
                    engine.step()
                else:
                    engine.step(closure.of_step(mean_loss))
        else:
            statistics.discard()
            engine.skip()
        if closure is not None:
            closure.forget()
        state.step = step + 1

        # 4. Say what happened.
        seconds = time.perf_counter() - started
        log.train(
            state.step,
            loss=mean_loss,
            lr=recipe.optimizer.lr * factor,
            grad_norm=norm_value,
            images_per_s=recipe.global_batch / seconds,
            data_s=clock.waited,
            step_s=seconds,
            **noise.update(micro_sq, norm_value),
            **monitor.record(timings, recipe.global_batch / seconds),
        )
        monitor.details(state.step)

        # 5. Evaluate, keep a snapshot, save. The order matters: a checkpoint of a step
        #    means that all the rest of that step is on disk.
        cycle_end = state.step in plan.snapshots
        accuracy = None
        if plan.evaluates(state.step) or cycle_end:
            watchdog.beat(state.step, "evaluating")
            log.phase("evaluating")
            scores = evaluate()
            log.evaluation(state.step, "val", **scores)
            accuracy = scores["accuracy"]
            if cycle_end:
                snapshot(scores)
        leaving = stops > 0
        if plan.saves(state.step) or leaving:
            watchdog.beat(state.step, "saving")
            log.phase("saving")
            saver.save(state, accuracy=accuracy, last=leaving or state.step == plan.stop)
        saver.report()
        if leaving:
            log.event("signal", step=state.step, signal=stop.signal)
            return False
    return True
