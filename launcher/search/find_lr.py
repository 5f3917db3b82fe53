"""`bigbatch find-lr`: a sweep of the learning rate, as a real run of a few steps.

The sweep is the recipe itself under another schedule, a constant one behind an exponential
warmup, so it goes through the same launcher, engine and order of samples as training does.
"""

import math
from collections.abc import Callable
from pathlib import Path

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import parse_recipe
from bigbatch.configs.rundir import create_run
from bigbatch.configs.schema import Recipe
from bigbatch.launcher.child import Children, RunFailed, bare_recipe, events, losses, tail
from bigbatch.trainers.advice.lr_range import RangeTest, analyse, divergence
from bigbatch.trainers.recovery.signals import SAVED


def sweep_recipe(recipe: Recipe, low: float, high: float, steps: int) -> Recipe:
    """The recipe with its rate rising from `low` to `high` by equal factors in `steps` steps."""
    if not (0 < low < high < math.inf and low / high > 0):
        raise UserError(
            f"--from {low:g} must be above 0 and below --to {high:g}, and their ratio a number"
        )
    if steps < 20:
        raise UserError(f"--steps {steps}: a sweep needs at least 20 steps to show a curve")
    tree = bare_recipe(recipe, steps)
    optimizer = tree["optimizer"]
    if "rest" in optimizer:  # Muon's second rate keeps its ratio to the first
        optimizer["rest"]["lr"] *= high / optimizer["lr"]
    optimizer["lr"] = high
    tree["schedule"] = {
        "name": "constant",
        "warmup": f"{steps - 1} steps",
        "warmup_start": low / high,
        "warmup_shape": "exponential",
    }
    return parse_recipe(tree, "of the sweep")


def find_lr(
    recipe: Recipe,
    folder: Path,
    *,
    low: float,
    high: float,
    steps: int,
    nproc: int,
    progress: Callable[[int], None] = lambda step: None,
) -> RangeTest:
    """Sweep the rate in `folder`, stopping at divergence; rates are values of optimizer.lr.

    Raises RunFailed where the run fails for another reason than a loss that diverged.
    """
    run = create_run(folder / "sweep", sweep_recipe(recipe, low, high, steps))
    stopping = False

    def watch() -> None:
        nonlocal stopping
        found = losses(run)[1]
        progress(len(found))
        if not stopping and divergence(found) is not None:
            stopping = True
            child.stop()

    with Children(nproc) as children:
        child = children.start(run, steps)
        status = child.wait(watch)
    rates, found = losses(run)
    exploded = bool(events(run, "non_finite"))
    if status == SAVED and not stopping:
        raise RunFailed(f"the sweep was stopped by a signal after {len(found)} steps")
    if status not in (0, SAVED) and not exploded:
        raise RunFailed(f"the sweep ended with status {status}:\n{tail(run)}")
    if exploded:
        rates, found = [*rates, high], [*found, float("nan")]  # that step has no record
    progress(steps)
    # Records hold the rate after the batch rule; a recipe writes the one before it.
    return analyse([rate / recipe.lr_scale for rate in rates], found)


def overrides(recipe: Recipe, lr: float) -> list[str]:
    """The changes to the recipe that set its rate to `lr`."""
    changes = [f"optimizer.lr={lr:.3g}"]
    if recipe.optimizer.name == "muon":
        changes.append(
            f"optimizer.rest.lr={recipe.optimizer.rest.lr * lr / recipe.optimizer.lr:.3g}"
        )
    return changes
