"""The training loop, in the order in which it happens."""

import math
import time

import torch

from bigbatch.configs.judged import judged_by
from bigbatch.data.rng import key64
from bigbatch.trainers.advice.noise_scale import NoiseScale
from bigbatch.trainers.attempt import Attempt, Ending
from bigbatch.trainers.engine import read_back
from bigbatch.trainers.engine.closure import Closure
from bigbatch.trainers.engine.sharpness import Sharpness
from bigbatch.trainers.optim import set_by_batch, set_lr, set_momentum
from bigbatch.trainers.planning.early_stop import stops
from bigbatch.trainers.recovery.rollback import check_step

# fp16 halves its loss scale at each overflow: 2^16 is through long before this many in a row.
_MAX_SKIPPED = 50


def train(attempt: Attempt) -> Ending:
    """Train from the state's step to the plan's stop, or an early one, or until the plan changes.

    Raises Rollback where steps went wrong that shall be stepped over.
    """
    job, log, monitor, statistics = attempt.job, attempt.log, attempt.monitor, attempt.statistics
    saver, watchdog = attempt.saver, attempt.watchdog
    ledger, samples, corruption = attempt.ledger, attempt.samples, attempt.corruption
    recipe, engine, state, plan = job.recipe, job.engine, job.state, job.inputs.plan
    optimizer, objective = engine.optimizer, job.objective
    noise = NoiseScale(recipe.micro_batch, recipe.first_batch, state.noise)
    clock = monitor.clock
    closure = None
    if recipe.optimizer.name == "lbfgs":
        closure = Closure(engine, statistics, objective, recipe.micro_batches)
    sharpness = None
    if recipe.regularise.sharpness is not None:
        sharpness = Sharpness(recipe.regularise.sharpness, engine.module)
    skipped = 0
    early_stop, judge = recipe.regularise.early_stop, judged_by(recipe)
    if stops(early_stop, state.evaluations, judge):  # it has come to its end before
        return Ending.DONE
    statistics.check()
    engine.model.train()

    for step in range(state.step, plan.stop):
        if plan.decides(step) and attempt.grows(step):
            ledger.complete()  # the next step, which would, is another attempt's
            return Ending.GROWN
        started = time.perf_counter()
        clock.begin_step()
        images_of_step, micro_batches = plan.timeline.batch(step), plan.micro_batches(step)
        lr_multiplier = job.inputs.schedule(step) * recipe.lr_gain(images_of_step, *state.noise)
        set_lr(optimizer, lr_multiplier)
        if job.inputs.momentum is not None:
            set_momentum(optimizer, job.inputs.momentum(step))
        if job.freezing is not None and (begun := job.freezing.begin(step)):
            log.event("unfreeze", step=step, stages=begun)

        job.course.step = step

        # 1. Gradients: this rank's micro-batches, each seeded by its own place in the run.
        loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
        engine.begin(micro_batches)
        statistics.begin()
        corruption.begin(step, micro_batches)
        mine = len(range(engine.rank, micro_batches, engine.world))  # maybe none
        for number in range(mine):
            watchdog.beat(step, "loading")
            with clock("data"):
                batch = next(attempt.batches)
            assert batch.step == step
            watchdog.beat(step, "computing")
            clock.micro_batch(batch.slow_read)
            ledger.see(batch)
            corruption.see(batch)
            with clock("copy"):
                batch = batch.to(engine.device)
            with clock("augment"):
                images, targets = job.views(batch)
            seed = key64(recipe.seed, step, batch.index, "model")
            torch.manual_seed(seed)  # after a teacher, whose members may be loaded only now
            if sharpness is not None:
                with clock("model"):
                    first_loss = objective(engine.module, images, targets)
                    samples.see(batch)  # at the run's own weights
                    sharpness.climb(first_loss)
                statistics.add()  # of the run's own weights, not of those that it climbed to
                torch.manual_seed(seed)
            with clock("model"), engine.micro_batch(last=number == mine - 1):
                loss = objective(engine.model, images, targets)
                if sharpness is None:
                    samples.see(batch)
                engine.backward(loss)
            if closure is not None:
                closure.keep(seed, images, targets)
            if sharpness is not None:
                sharpness.descend()
                loss = first_loss
            else:
                statistics.add()
            loss_sum += loss.detach()
            del images, targets  # of many classes 25 MB, which the next ones would come beside
        corruption.recompute()
        statistics.discard()  # until here the model's buffers were those of micro-batches

        # 2. What all ranks must agree on: the mean gradient, and the rest in one small
        #    all-reduce.
        watchdog.beat(step, "reducing")
        with clock("reduce"):
            engine.reduce()
            changed = engine.changed_parameters()
            copies = corruption.copies()
            totals = engine.sum_by_name(
                {
                    "loss": loss_sum,
                    "stops": loss_sum.new_full((), float(bool(attempt.stop))),
                    "micro_sq": engine.micro_batch_sq(),
                    "statistics": statistics.local(),
                    "timings": monitor.table(step + 1),
                    "changed": loss_sum.new_full((), float(bool(changed))),
                    "copies": corruption.share(copies),
                    "swapped": corruption.share_gradients(),
                    "ledger": ledger.share(step + 1, copies),
                    "samples": samples.share(step),
                }
            )
            on_device, of_samples = totals.pop("statistics"), totals.pop("samples")
            norm = engine.gradient_norm()
            agreed = read_back({**totals, "norm": norm, "buffers": on_device.sum()})
            if plan.probes.gradients(step + 1):
                monitor.gradients = engine.layer_gradient_norms()
        engine.refuse_changes(step, changed, agreed["changed"][0])
        mean_loss = agreed["loss"][0] / micro_batches
        micro_sq = agreed["micro_sq"][0] / engine.micro_batches_measured
        norm_value = agreed["norm"][0]
        corruption.agree(agreed["copies"], agreed["swapped"])
        ledger.agree(step + 1, agreed["ledger"], mean_loss)

        # 3. The update. Nothing non-finite ever reaches the weights, on any rank.
        spoilt = [] if math.isfinite(agreed["buffers"][0]) else statistics.non_finite(on_device)
        finite = math.isfinite(mean_loss) and math.isfinite(norm_value)
        skipped = 0 if finite else skipped + 1
        if not finite or spoilt:
            log.event(
                "non_finite", step=step, loss=mean_loss, grad_norm=norm_value, buffers=spoilt[:20]
            )
        if plan.timeline.shrinks(step):
            state.losses.clear()  # they are of more samples each, and so lie closer together
        updated = check_step(
            recipe.recovery,
            step,
            mean_loss,
            norm_value,
            not_finite=spoilt,
            earlier=state.losses,
            skipped_steps=state.skipped_steps,
            may_overflow=engine.scaler is not None and skipped <= _MAX_SKIPPED,
        )
        # Behind the digests: counts that it changes belong to the state after this step.
        batch_before = plan.timeline.batch(max(0, step - 1))
        set_by_batch(optimizer, recipe.global_batch, images_of_step, batch_before)
        if updated:
            statistics.finish(on_device, micro_batches, recipe.batch_norm_power(images_of_step))
            with clock("optimizer"):
                if recipe.clip is not None:
                    engine.clip(recipe.clip, norm)
                if closure is None:
                    engine.step()
                else:
                    engine.step(closure.of_step(mean_loss))
                if state.average is not None:
                    state.average.update(step + 1)
        else:
            engine.skip()
        if closure is not None:
            closure.forget()
        state.step = step + 1
        samples.write(of_samples, updated=updated)

        # 4. Say what happened.
        seconds = time.perf_counter() - started
        log.train(
            state.step,
            loss=mean_loss,
            lr=recipe.optimizer.lr * lr_multiplier,
            grad_norm=norm_value,
            images_per_s=images_of_step / seconds,
            data_s=clock.waited,
            step_s=seconds,
            **({} if engine.in_round else noise.update(micro_sq, norm_value, images_of_step)),
            **monitor.record(agreed["timings"], images_of_step / seconds),
        )
        monitor.details(state.step)

        # 5. Evaluate, keep a snapshot, save. The order matters: a checkpoint of a step
        #    means that all the rest of that step is on disk.
        cycle_end = state.step in plan.snapshots and early_stop is None
        score, done = None, False
        if plan.evaluates(state.step) or cycle_end:
            watchdog.beat(state.step, "evaluating")
            log.phase("evaluating")
            scores = attempt.evaluate(snapshot=cycle_end)
            log.evaluation(state.step, "val", **scores)
            score = scores[judge.key]
            done = stops(early_stop, state.evaluations, judge)
        if cycle_end:
            corruption.compare(state.step)  # a snapshot was kept; a resume makes it again
        leaving = agreed["stops"][0] > 0
        last = leaving or done or state.step == plan.stop
        if plan.saves(state.step) or last:
            watchdog.beat(state.step, "saving")
            log.phase("saving")

            def check(step: int = state.step) -> None:
                ledger.save(corruption.compare(step))

            saver.save(state, check=check, score=score, last=last)
        saver.report()
        if leaving:
            log.event("signal", step=state.step, signal=attempt.stop.signal)
            return Ending.LEFT
        if done:
            log.event("early_stop", step=state.step)
            break
    return Ending.DONE
