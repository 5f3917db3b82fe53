"""Twins of a run: what a change of its recipe would have done from a step on. Free of torch.

All twins begin at one state and see the same samples, views and masks, which are keyed by step and
place: common random numbers. So they differ by the change alone, and are compared image by image.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from bigbatch.configs.batch import ByNoise
from bigbatch.configs.errors import UserError
from bigbatch.configs.json_text import parse_json
from bigbatch.configs.load import change_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.configs.schema import Recipe
from bigbatch.configs.targets import learns_targets
from bigbatch.configs.words import plural
from bigbatch.launcher.child import Children, RunFailed, events, steps_done, tail
from bigbatch.launcher.fork import make_branches, plan_branch
from bigbatch.trainers.evaluation.outcomes import Outcomes, outcomes
from bigbatch.trainers.evaluation.paired import bootstrap, mcnemar
from bigbatch.trainers.planning.inputs import open_inputs
from bigbatch.trainers.recovery.signals import SAVED
from bigbatch.trainers.recovery.stored import (
    CorruptCheckpoint,
    checkpoint_path,
    list_checkpoints,
    step_of,
    verify,
)

UNCHANGED = "unchanged"
LEVEL = 0.95  # at which all pairs together are told apart
_TIMES = re.compile(r"([0-9.]+(?:[eE][-+]?[0-9]+)?)x")
# A twin says nothing of itself, and stops where it is told to.
_QUIET = (
    *(f"log.{key}=false" for key in ("tensorboard", "diagnosis", "trace", "samples")),
    *("log.wandb=off", "log.prometheus=null", "log.ledger_every=null"),
    *("checkpoint.keep_every=null", "phases=null"),
)
_PREDICT = "bigbatch.trainers.inference"


@dataclass(frozen=True)
class Twin:
    """A change, by the words that ask for it, and the run that makes it."""

    name: str
    run: RunDir
    stop: int  # finished steps, of its own batch


@dataclass(frozen=True)
class Start:
    """Where twins begin: after so many finished steps of the run."""

    step: int
    checkpoint: Path | None  # None: the model as it was built


def changes(recipe: Recipe, sets: Iterable[str]) -> list[str]:
    """Each value of each `KEY=VALUE,VALUE`, as an override; `0.5x` is that times the recipe's own.

    Raises UserError for a multiple of what is no number, and for what changes nothing.
    """
    found: list[str] = []
    for text in sets:
        key, equals, values = (part.strip() for part in text.partition("="))
        if not equals or not key or not values:
            raise UserError(f"--set {text!a}: write KEY=VALUE,VALUE, such as optimizer.lr=0.5x,2x")
        parts = [values] if set(values) & set("[{") else values.split(",")
        for value in map(str.strip, parts):
            override = f"{key}={_value(recipe, key, value)}"
            if change_recipe(recipe, [override], say=None) == recipe:
                raise UserError(f"--set {key}={value} changes nothing: the recipe says so already")
            if override not in found:
                found.append(override)
    if not found:
        raise UserError("--set says what twins differ by, such as --set optimizer.lr=0.5x,2x")
    return found


def _value(recipe: Recipe, key: str, value: str) -> str:
    times = _TIMES.fullmatch(value)
    if times is None:
        return value
    own: Any = recipe.model_dump(mode="json")
    for part in key.split("."):
        own = own.get(part) if isinstance(own, dict) else None
    if type(own) not in (int, float):
        raise UserError(
            f"--set {key}={value}: a multiple is of a number, and {key} is {own!a}; write a value"
        )
    product = float(f"{float(times[1]) * own:.12g}")  # 0.30000000000000004 is nobody's rate
    return f"{product:g}" if float(f"{product:g}") == product else repr(product)


def find_start(run: RunDir, step: int) -> Start:
    """The newest checkpoint up to `step` that verifies, or else the model as it was built."""
    there = list_checkpoints(run.checkpoints)
    problems = []
    for path in there:
        if step_of(path) > step:
            continue
        try:
            verify(path)
        except CorruptCheckpoint as error:
            problems.append(str(error))
            continue
        return Start(step_of(path), path)
    if run.forked_from is not None:
        kept = ", ".join(str(step_of(path)) for path in reversed(there)) or "none"
        raise UserError(
            f"{run.path} branched off another run, and has no checkpoint at or before step {step} "
            f"(there are those after steps {kept}{'; ' if problems else ''}{'; '.join(problems)}); "
            "ask for a later step"
        )
    return Start(0, None)


def make_twins(
    parent: RunDir, start: Start, overrides: Sequence[str], steps: int, folder: Path
) -> list[Twin]:
    """Runs that begin at `start`, the unchanged one first, with `steps` steps of the run to go.

    Where global_batch changes, as many images. Raises UserError where the recipe ends before.
    """
    recipe = parent.recipe()
    _check(recipe, parent.name)
    line = open_inputs(recipe).plan
    if start.step + steps > line.total:
        raise UserError(
            f"--steps {steps}: after step {start.step} the recipe of {parent.name} has "
            f"{line.total - start.step} left, of {line.total}; ask for fewer, or an earlier --step"
        )
    samples = line.timeline.first(start.step + steps)
    quiet = [*_QUIET]
    if recipe.regularise.early_stop is not None:
        quiet.append("regularise.early_stop=null")
    twins = []
    for number, override in enumerate((None, *overrides)):
        changed = change_recipe(recipe, [*quiet, *([] if override is None else [override])], None)
        _check(changed, override or parent.name)
        plan = open_inputs(changed).plan
        stop = plan.timeline.reaching(samples)
        if stop > plan.total:
            raise UserError(
                f"{override}: its run would end before {samples:,} images; ask for fewer --steps"
            )
        if changed.schedule.name != "plateau" and changed.loss.name != "confusion_cost":
            # Once, where it is compared: so that BatchNorm's statistics are those of an evaluation.
            changed = change_recipe(changed, [f"evaluate.every={stop} steps"], None)
        path = folder / f"twin-{number}"
        if start.checkpoint is None:
            run = create_run(path, changed)
        else:
            branch = plan_branch(parent, start.checkpoint, path, changed)
            (run,) = make_branches(parent, start.checkpoint, [branch])
        twins.append(Twin(override or UNCHANGED, run, stop))
    return twins


def _check(recipe: Recipe, name: str) -> None:
    """Raise UserError where twins of such a recipe cannot be compared image by image."""
    if learns_targets(recipe):
        raise UserError(
            f"{name}: loss {recipe.loss.name} learns targets, and whatif compares a classifier's "
            "answers; branch off runs with `bigbatch fork` and compare their scores"
        )
    if isinstance(recipe.global_batch, ByNoise):
        raise UserError(
            f"{name}: global_batch noise_scale is decided on by each twin, and so they would not "
            "see as many images; ask with a batch that is known ahead: `bigbatch fork` with "
            "global_batch set, and whatif of that run"
        )


def train_twins(
    twins: Sequence[Twin], children: Children, progress: Callable[[Twin, int], None]
) -> dict[str, str]:
    """Train each to its stop; of those whose step went wrong, what was said of it by name.

    Raises RunFailed where one fails otherwise, or a signal stops it.
    """
    wrong = {}
    for twin in twins:

        def watch(twin: Twin = twin) -> None:
            progress(twin, steps_done(twin.run))

        status = children.start(twin.run, twin.stop).wait(watch)
        if status == SAVED:
            raise RunFailed(f"{twin.name} was stopped by a signal")
        if status != 0:
            spoilt = events(twin.run, "non_finite") or events(twin.run, "spike")
            if status != 2 or not spoilt:
                raise RunFailed(f"{twin.name} ended with status {status}:\n{tail(twin.run)}")
            wrong[twin.name] = tail(twin.run, 1).removeprefix("bigbatch: ")
    return wrong


def evaluated(twin: Twin, children: Children) -> tuple[list[str], Outcomes]:
    """Keys and outcomes of the validation split, by the weights at the twin's stop."""
    data = twin.run.recipe().data
    out = twin.run.path / "val.parquet"
    words = ["predict", str(twin.run.path), "--source", f"{data.path.rstrip('/')}/{data.val}"]
    words += ["--members", checkpoint_path(Path(), twin.stop).name, "--out", str(out), "--json"]
    if (status := children.run(_PREDICT, words, twin.run)) != 0:
        raise RunFailed(f"evaluating {twin.name} ended with status {status}:\n{tail(twin.run)}")
    table = pq.read_table(out, columns=["key", "target", "probabilities"])
    classes = parse_json(table.schema.metadata[b"bigbatch"])["classes"]
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[name] for name in table["target"].to_pylist()], np.int64)
    flat = table["probabilities"].combine_chunks().flatten().to_numpy()
    return table["key"].to_pylist(), outcomes(flat.reshape(len(labels), -1), labels)


def compare(
    found: dict[str, tuple[list[str], Outcomes]], wrong: dict[str, str], seed: int = 0
) -> dict[str, Any]:
    """Figures of each twin, and of each pair what they differ by, key by key.

    Intervals are of a paired bootstrap over images, at a level at which all pairs together hold
    with 95 % (Bonferroni). `best` has the lowest mean loss; `beaten` are those from which its
    interval tells it apart, and those whose step went wrong.
    """
    names = list(found)
    keys = found[names[0]][0] if names else []
    for name in names[1:]:
        if found[name][0] != keys:
            raise RunFailed(f"{name} was evaluated on other images than {names[0]}")
    of = {name: each for name, (_, each) in found.items()}
    twins: list[dict[str, Any]] = [
        {"name": n, "loss": float(e.losses.mean()), "accuracy": float(e.correct.mean())}
        for n, e in of.items()
    ]
    pairs = []
    count = len(names) * (len(names) - 1) // 2
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            a, b = of[first], of[second]
            columns = [b.losses - a.losses, b.correct.astype(np.float64) - a.correct]
            level = 1 - (1 - LEVEL) / count
            loss, accuracy = bootstrap(np.stack(columns, 1), seed, draws=4000, level=level).tolist()
            pairs.append(
                {
                    "first": first,
                    "second": second,
                    "loss": {"difference": float(columns[0].mean()), "interval": loss},
                    "accuracy": {"difference": float(columns[1].mean()), "interval": accuracy},
                    "mcnemar_p": mcnemar(a.correct, b.correct).p_value,
                }
            )
    best = min(twins, key=lambda row: row["loss"])["name"] if twins else None
    return {
        "samples": len(keys),
        "twins": twins,
        "wrong": wrong,
        "pairs": pairs,
        "best": best,
        "beaten": [*(n for n in names if _is_beaten(n, best, pairs)), *wrong],
    }


def _is_beaten(name: str, best: Any, pairs: Iterable[dict[str, Any]]) -> bool:
    for pair in pairs:
        low, high = pair["loss"]["interval"]
        if (pair["first"], pair["second"]) == (best, name):
            return bool(low > 0)
        if (pair["first"], pair["second"]) == (name, best):
            return bool(high < 0)
    return False


def in_words(result: dict[str, Any]) -> list[str]:
    """Which twin is better, and by how much."""
    lines = [
        f"{row['name']}: loss {row['loss']:.4f}, accuracy {row['accuracy']:.2%}"
        for row in result["twins"]
    ]
    lines += [f"{name}: went wrong: {why}" for name, why in result["wrong"].items()]
    for pair in result["pairs"]:
        parts = []
        for figure, form in (("loss", "+.4f"), ("accuracy", "+.2%")):
            low, high = pair[figure]["interval"]
            parts.append(
                f"{figure} {pair[figure]['difference']:{form}} ({low:{form}} to {high:{form}})"
            )
        lines.append(f"{pair['second']} against {pair['first']}: {', '.join(parts)}")
    best, others = result["best"], [r["name"] for r in result["twins"]]
    if best is None:
        return [*lines, "all went wrong: there is none to name"]
    open_ = [n for n in others if n != best and n not in result["beaten"]]
    if open_:
        unclear = ", ".join(open_)
        return [*lines, f"{best} has the lowest loss, but is not told apart from {unclear}"]
    told = [name for name in result["beaten"] if name not in result["wrong"]]
    if not told:
        return [*lines, f"{best} is better: all others went wrong"]
    return [
        *lines,
        f"{best} is better than {', '.join(told)}: the interval of the loss excludes zero",
    ]


def whatif(
    parent: RunDir,
    step: int,
    sets: Sequence[str],
    steps: int,
    folder: Path,
    *,
    nproc: int = 1,
    say: Callable[[str], None],
    progress: Callable[[Twin, int], None] = lambda twin, step: None,
) -> dict[str, Any]:
    """Make, train, evaluate and compare twins in `folder`. Raises UserError and RunFailed."""
    overrides = changes(parent.recipe(), sets)
    start = find_start(parent, step)
    twins = make_twins(parent, start, overrides, steps, folder)
    where = "the model as it was built" if start.checkpoint is None else start.checkpoint.name
    say(f"{len(twins)} twins from step {start.step} ({where}), {steps} steps each")
    with Children(nproc) as children:
        wrong = train_twins(twins, children, progress)
        found = {twin.name: evaluated(twin, children) for twin in twins if twin.name not in wrong}
    result = compare(found, wrong)
    for twin in twins:  # steps that it went back from, and left out of the rest
        if back := len(events(twin.run, "rollback")):
            say(f"{twin.name}: {plural(back, 'rollback')}, whose steps made no update")
    about = {"run": str(parent.path), "from": start.step, "steps": steps}
    return about | {"split": parent.recipe().data.val} | result
