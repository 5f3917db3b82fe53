"""The study of `bigbatch tune`: an Optuna study in a JSON journal, and what fills it."""

import fcntl
import importlib.util
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from bigbatch.configs.errors import UserError
from bigbatch.configs.identity import differences, summary, tree_differences
from bigbatch.configs.load import parse_recipe
from bigbatch.configs.schema import Recipe
from bigbatch.configs.space import COMPARED, MAXIMISED, Choice, Float, Int, Space
from bigbatch.launcher.search.cma import ReplayedCMA

Sampler = Literal["grid", "random", "tpe", "gp", "cmaes", "nsga2"]
Pruner = Literal["none", "median", "halving", "hyperband"]
JOURNAL = "journal.jsonl"
_NAME = "tune"

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
warnings.filterwarnings("ignore", message="PedAnovaImportanceEvaluator")  # see importances


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Optuna's form of the space; a choice that is a part of a recipe stands as JSON text."""
    found: dict[str, BaseDistribution] = {}
    for key, p in space.parameters.items():
        match p:
            case Float():
                found[key] = FloatDistribution(p.low, p.high, log=p.log, step=p.step)
            case Int():
                found[key] = IntDistribution(p.low, p.high, log=p.log)
            case Choice():
                found[key] = CategoricalDistribution([_label(c) for c in p.choices])
    return found


def values(space: Space, params: dict[str, Any]) -> dict[str, Any]:
    """A trial's parameters as recipe values, in the order of the space file."""
    found = {}
    for key, p in space.parameters.items():
        value = params[key]
        if isinstance(p, Choice):
            value = next(c for c in p.choices if _label(c) == value)
        found[key] = value
    return found


def _label(choice: Any) -> Any:
    return json.dumps(choice) if isinstance(choice, list | dict) else choice


def check(space: Space, sampler: Sampler, pruner: Pruner) -> None:
    """Raise UserError for a sampler or pruner that cannot serve the space."""
    several = len(space.objectives) > 1
    if several and sampler in ("cmaes",):
        raise UserError(
            f"--sampler {sampler} works for one objective, not {', '.join(space.objectives)}; "
            "use nsga2, tpe, gp or random"
        )
    if pruner != "none" and (several or space.objectives[0] not in COMPARED):
        raise UserError(
            f"--pruner {pruner} compares validation results while trials run: it needs one "
            "objective, accuracy or nll or that of another loss, not "
            f"{', '.join(space.objectives)}; use --pruner none"
        )
    for key, p in space.parameters.items():
        if sampler == "cmaes" and isinstance(p, Choice):
            raise UserError(f"--sampler cmaes knows numbers alone, and {key} is a choice; use tpe")
        if sampler == "grid" and isinstance(p, Float) and p.step is None:
            raise UserError(
                f"--sampler grid: {key} is a range without steps; give it step, or write "
                "its values as {type: choice, choices: [...]}"
            )
    if sampler == "cmaes" and len(space.parameters) < 2:
        raise UserError("--sampler cmaes needs two parameters or more; use tpe")
    if sampler == "gp" and importlib.util.find_spec("torch") is None:
        raise UserError("--sampler gp computes with torch, which is not here; use tpe")


def grid(space: Space) -> dict[str, list[Any]]:
    """All values of each parameter."""
    found: dict[str, list[Any]] = {}
    for key, p in space.parameters.items():
        match p:
            case Choice():
                found[key] = [_label(c) for c in p.choices]
            case Int():
                found[key] = list(range(p.low, p.high + 1))
            case Float():
                assert p.step is not None
                count = math.floor((p.high - p.low) / p.step + 1e-9) + 1
                found[key] = [p.low + i * p.step for i in range(count)]
    return found


def grid_size(space: Space) -> int:
    return math.prod(len(v) for v in grid(space).values())


class _Grid(optuna.samplers.GridSampler):
    def after_trial(self, *arguments: Any) -> None:
        """Optuna's would call study.stop() at the last point, which fails outside optimize()."""


def make_sampler(
    space: Space, sampler: Sampler, seed: int, startup: int, trials: int
) -> optuna.samplers.BaseSampler:
    match sampler:
        case "grid":
            return _Grid(grid(space), seed=seed)
        case "random":
            return optuna.samplers.RandomSampler(seed=seed)
        case "tpe":
            # Running trials count as bad ones, so that parallel trials do not repeat each other.
            return optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=startup, constant_liar=True
            )
        case "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
        case "cmaes":
            return ReplayedCMA(distributions(space), seed)
        case "nsga2":
            population = min(50, max(4, trials // 5))
            return optuna.samplers.NSGAIISampler(population_size=population, seed=seed)


def make_pruner(pruner: Pruner, startup: int, evaluations: int) -> optuna.pruners.BasePruner:
    """`evaluations`: how many a whole trial makes; they are what pruners count."""
    match pruner:
        case "none":
            return optuna.pruners.NopPruner()
        case "median":
            return optuna.pruners.MedianPruner(n_startup_trials=startup)
        case "halving":
            return optuna.pruners.SuccessiveHalvingPruner(min_resource=1)
        case "hyperband":
            return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=evaluations)


@contextmanager
def acquire_study_lock(folder: Path) -> Iterator[None]:
    """Keep the study to this process, until it ends. Raises UserError where another one has it."""
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another search is at work on {folder}; wait for it, stop it, or name a new "
                "folder with --study"
            ) from None
        yield


def open_study(
    folder: Path,
    space: Space,
    recipe: Recipe,
    *,
    sampler: Sampler,
    pruner: Pruner,
    seed: int,
    startup: int,
    trials: int,
    evaluations: int,
) -> optuna.Study:
    """Create the study in `folder`, or go on with the one that is there.

    Raises UserError where that one searches another space or recipe.
    """
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    up, down = optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE
    directions = [up if o in MAXIMISED else down for o in space.objectives]
    pruning = make_pruner(pruner, startup, evaluations)
    try:
        study = optuna.load_study(storage=storage, study_name=_NAME, pruner=pruning)
    except KeyError:
        study = optuna.create_study(
            storage=storage, study_name=_NAME, directions=directions, pruner=pruning
        )
    for what, settings in (("recipe", recipe), ("space", space)):
        stored = study.user_attrs.get(what)
        if stored is None:
            study.set_user_attr(what, settings.model_dump(mode="json"))
        elif found := _changed(stored, settings, folder):
            raise UserError(
                f"{folder} holds a study of another {what}: {summary(found)}; go on with the "
                "same files and changes, or name a new folder with --study"
            )
    # A sampler starts anew with each process: with the same seed it would repeat itself.
    shift = 0 if sampler in ("grid", "cmaes") else len(study.trials)
    study.sampler = make_sampler(space, sampler, seed + shift, startup, trials)
    return study


def _changed(stored: dict[str, Any], settings: Recipe | Space, folder: Path) -> list[str]:
    """What differs between the settings that a study was started with, and those given now.

    Both are read by the same schema, so a key that this version added is no difference.
    """
    if isinstance(settings, Recipe):
        return differences(parse_recipe(stored, f"of the study in {folder}"), settings)
    then = Space.model_validate(stored)
    return tree_differences(then.model_dump(mode="json"), settings.model_dump(mode="json"))


def ask(study: optuna.Study, space: Space) -> Trial:
    return study.ask(distributions(space))


def again(study: optuna.Study, space: Space, frozen: FrozenTrial) -> Trial:
    """A trial that was running when the search was killed, with what it still lacks."""
    trial = Trial(study, frozen._trial_id)
    for key, distribution in distributions(space).items():
        trial._suggest(key, distribution)
    return trial


def importances(study: optuna.Study) -> dict[str, dict[str, float]]:
    """By objective's number: each parameter's share of what explains it (PED-ANOVA).

    {} where there are too few trials, or all have the same value.
    """
    found: dict[str, dict[str, float]] = {}
    complete = study.get_trials(states=[TrialState.COMPLETE])
    for i, direction in enumerate(study.directions):
        # PED-ANOVA asks what makes a value low, so what is maximised is turned round.
        sign = -1.0 if direction == optuna.study.StudyDirection.MAXIMIZE else 1.0

        def outcome(trial: FrozenTrial, i: int = i, sign: float = sign) -> float:
            return sign * float(trial.values[i])

        if len({outcome(t) for t in complete}) > 1:
            shares = optuna.importance.get_param_importances(study, target=outcome)
            found[str(i)] = {name: float(share) for name, share in shares.items()}
    return found
