"""One rank of a run: parse, build, run, close.

    python -m bigbatch.trainers.worker RUN_DIR [--stop-at STEPS]

Started once per rank, with torchrun's environment variables where there are several.
"""

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import recipe_hash
from bigbatch.configs.rundir import RunDir, read_jsonl, write_atomically
from bigbatch.configs.schema import Recipe
from bigbatch.data.augment import Augmenter, contact_sheet
from bigbatch.data.index import Index, open_index
from bigbatch.data.loader import MicroBatch, train_batches
from bigbatch.data.order import Order, build_order
from bigbatch.trainers import ensemble
from bigbatch.trainers.checkpoint import TrainState, load_checkpoint, newest_valid
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.evaluate import Evaluator
from bigbatch.trainers.log import Log, open_log
from bigbatch.trainers.loop import train
from bigbatch.trainers.losses import build_loss
from bigbatch.trainers.metrics import score, softmax
from bigbatch.trainers.models import build_model
from bigbatch.trainers.optim import build_optimizer
from bigbatch.trainers.plan import Plan, check_world, make_plan
from bigbatch.trainers.schedules import build_schedule
from bigbatch.trainers.signals import SAVED, StopFlag, die_with_agent

# Enough images to settle the BatchNorm statistics of a soup.
_RECOMPUTE_IMAGES = 16_384


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bigbatch.trainers.worker")
    parser.add_argument("run", type=Path)
    parser.add_argument("--stop-at", type=int, help="end after this many steps, unfinished")
    options = parser.parse_args(arguments)
    engine: Engine | None = None
    die_with_agent()
    try:
        stop = StopFlag()
        run = RunDir(options.run)
        recipe = run.recipe()
        engine = Engine(recipe.precision, recipe.reduction)
        return work(run, recipe, engine, stop, options.stop_at)
    except UserError as error:
        # Every rank meets the same error, or learns of it; one of them says it.
        if engine is None or engine.rank == 0:
            print(f"bigbatch: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        if engine is not None:
            engine.close()


def work(run: RunDir, recipe: Recipe, engine: Engine, stop: StopFlag, stop_at: int | None) -> int:
    """Build everything, train, combine the snapshots, report."""
    check_world(recipe, engine.world)
    splits = open_splits(recipe)
    index = splits["train"]
    order = build_order(recipe.data.sampling, index, recipe.seed)
    plan = make_plan(recipe, order.epoch_samples, stop_at)
    classes = len(index.classes)
    model = build_model(
        recipe.model, classes=classes, channels=recipe.data.channels, seed=recipe.seed
    )
    engine.prepare(model, build_optimizer(model, recipe.optimizer), plan.micro_batches)
    augmenter = Augmenter(
        recipe.augment,
        image_size=recipe.data.image_size,
        crop_fraction=recipe.evaluate.crop_fraction,
        classes=classes,
        seed=recipe.seed,
        device=engine.device,
    )
    evaluator = Evaluator(engine, augmenter, recipe)
    fingerprint = {"recipe_hash": recipe_hash(recipe), "order_hash": order.hash}
    state = TrainState(0, model, engine.optimizer, engine.scaler, fingerprint)
    problems = resume(run, engine, state)

    with open_log(
        run,
        recipe,
        rank=engine.rank,
        total_steps=plan.total,
        start_step=state.step,
        epoch_samples=order.epoch_samples,
    ) as log:
        for problem in problems:
            log.event("damaged_checkpoint", problem=problem)
        log.event(
            "start",
            step=state.step,
            total_steps=plan.total,
            world_size=engine.world,
            device=str(engine.device),
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        batches = stream(run, recipe, engine, index, order, state.step, plan.stop)
        if engine.rank == 0 and not (run.path / "augmented.png").exists():
            save_contact_sheet(run.path / "augmented.png", recipe, index, order, augmenter)

        def evaluate() -> dict[str, float]:
            val = splits["val"]
            logits = evaluator.logits(model, val)
            found = None if logits is None else score(softmax(logits), val.label.astype("int64"))
            return engine.from_main(found)

        def snapshot(scores: dict[str, float]) -> None:
            number = sorted(plan.snapshots).index(state.step) + 1
            if engine.rank == 0:
                ensemble.save_snapshot(run.snapshots, number, state.step, model, scores)
            engine.barrier()

        finished = train(
            recipe,
            run,
            engine,
            state,
            log,
            plan=plan,
            schedule=build_schedule(
                recipe.schedule,
                total_steps=plan.total,
                global_batch=recipe.global_batch,
                epoch_samples=order.epoch_samples,
            ),
            loss_function=build_loss(recipe.loss),
            batches=batches,
            augmenter=augmenter,
            evaluate=evaluate,
            snapshot=snapshot,
            stop=stop,
        )
        if not finished:
            log.close("stopped")
            # Leave together: a launcher that sees one rank gone ends the others, and rank 0
            # may still be closing its log.
            engine.barrier()
            return SAVED
        if state.step < plan.total:
            log.close("stopped")
            return 0
        finish(run, recipe, engine, log, plan, splits, order, augmenter, evaluator)
    return 0


def open_splits(recipe: Recipe) -> dict[str, Index]:
    """The indexes by role (train, val, test), which must agree on the classes."""
    data = recipe.data
    names = {"train": data.train, "val": data.val, "test": data.test}
    splits = {role: open_index(Path(data.path) / name) for role, name in names.items() if name}
    classes = splits["train"].classes
    for role, index in splits.items():
        if index.classes != classes:
            raise UserError(
                f"split {names[role]} of {data.path} has classes {list(index.classes)[:8]}, split "
                f"{data.train} has {list(classes)[:8]}: write both with one `bigbatch shard`"
            )
    return splits


def resume(run: RunDir, engine: Engine, state: TrainState) -> list[str]:
    """Fill `state` from where the run can go on; the order is:

    1. the newest checkpoint in the run directory that verifies,
    2. with no checkpoint at all, step 0 with the model as built.

    Rank 0 chooses, so that all ranks load the same one. Returns what is damaged.
    """
    found: tuple[str | None, list[str], str | None] = (None, [], None)
    if engine.rank == 0:
        try:
            path, problems = newest_valid(run.checkpoints)
            found = (str(path) if path else None, problems, None)
        except UserError as error:
            found = (None, [], str(error))
    chosen, problems, failure = engine.from_main(found)
    if failure:
        raise UserError(failure)
    if engine.rank == 0:
        for problem in problems:
            print(f"bigbatch: {problem}; going on from an older one", file=sys.stderr)
    if chosen:
        load_checkpoint(Path(chosen), state)
    return problems


def stream(
    run: RunDir,
    recipe: Recipe,
    engine: Engine,
    index: Index,
    order: Order,
    start: int,
    stop: int,
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of steps start to stop, noted in trace/ where asked for."""
    data = recipe.data
    batches = train_batches(
        index,
        order,
        global_batch=recipe.global_batch,
        micro_batch=recipe.micro_batch,
        rank=engine.rank,
        world=engine.world,
        start_step=start,
        stop_step=stop,
        image_size=data.image_size,
        channels=data.channels,
        workers=data.workers,
        threads=data.threads,
        bad_samples=data.bad_samples,
        journal=run.path / f"bad-samples-{engine.rank:05d}.jsonl",
        pin_memory=engine.device.type == "cuda",
    )
    if not recipe.log.trace:
        yield from batches
        return
    run.trace.mkdir(exist_ok=True)
    with (run.trace / f"rank-{engine.rank:05d}.jsonl").open("a") as file:
        for batch in batches:
            record = {"step": batch.step, "micro": batch.index, "samples": batch.samples.tolist()}
            print(json.dumps(record), file=file, flush=True)
            yield batch


def save_contact_sheet(
    path: Path, recipe: Recipe, index: Index, order: Order, augmenter: Augmenter
) -> None:
    """A picture of step 0's first images as the model sees them, before mixup."""
    data = recipe.data
    count = min(recipe.micro_batch, 32)
    batches = train_batches(
        index,
        order,
        global_batch=recipe.global_batch,
        micro_batch=count,
        rank=0,
        world=1,
        start_step=0,
        stop_step=1,
        image_size=data.image_size,
        channels=data.channels,
        workers=0,
        threads=1,
        bad_samples=data.bad_samples,
        journal=None,
    )
    sheet = contact_sheet(augmenter.images(next(iter(batches))))
    picture = Image.fromarray(sheet[..., 0] if data.channels == 1 else sheet)
    zoom = max(1, 96 // data.image_size)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(
        path
    )


def finish(
    run: RunDir,
    recipe: Recipe,
    engine: Engine,
    log: Log,
    plan: Plan,
    splits: dict[str, Index],
    order: Order,
    augmenter: Augmenter,
    evaluator: Evaluator,
) -> None:
    """Combine the snapshots, and write the summary and the report."""
    log.phase("combining snapshots")
    steps = -(-min(_RECOMPUTE_IMAGES, order.epoch_samples) // recipe.global_batch)

    def recompute_images() -> Iterator[torch.Tensor]:
        silent = recipe.model_copy(update={"log": recipe.log.model_copy(update={"trace": False})})
        for batch in stream(run, silent, engine, splits["train"], order, 0, steps):
            yield augmenter.train(batch)[0]

    combined = ensemble.combine(
        run,
        recipe.ensemble,
        engine,
        evaluator,
        {role: index for role, index in splits.items() if role != "train"},
        recompute_images=recompute_images,
        recompute_batches=steps * plan.micro_batches,
    )
    if combined is not None:
        summary = summarise(run, recipe, engine.world, plan, combined.splits)
        write_atomically(run.summary, json.dumps(summary, indent=1) + "\n")
    log.close("finished")
    if combined is not None:
        say_results(run, summary, log)


def summarise(
    run: RunDir, recipe: Recipe, world: int, plan: Plan, splits: dict[str, Any]
) -> dict[str, Any]:
    """What a script wants to know of a finished run.

    `seconds` is the time in training steps, over all starts of the run; `images_per_s` is
    over the recorded steps.
    """
    steps = [r["step_s"] for r in read_jsonl(run.metrics) if r["kind"] == "train"]
    mean = sum(steps) / len(steps) if steps else None
    return {
        **splits,
        "steps": plan.total,
        "samples": plan.total * recipe.global_batch,
        "seconds": round(mean * plan.total, 3) if mean else None,
        "images_per_s": round(recipe.global_batch / mean, 1) if mean else None,
        "world_size": world,
        "recipe_hash": recipe_hash(recipe),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def say_results(run: RunDir, summary: dict[str, Any], log: Log) -> None:
    """The table and the paths that a user looks for when a run ends."""
    from rich.console import Console

    from bigbatch.trainers.report import final_table, write_report  # matplotlib: only here

    console = Console(soft_wrap=True)
    console.print(final_table(summary))
    console.print(f"summary  {run.summary}", highlight=False)
    console.print(f"report   {write_report(run)}", highlight=False)
    if log.wandb_path is not None:
        console.print(f"wandb    {log.wandb_path}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
