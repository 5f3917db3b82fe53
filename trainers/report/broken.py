"""Rules for what breaks a run: docs/diagnosis.md has them in a table. Free of torch."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from bigbatch.configs.targets import learns_targets
from bigbatch.trainers.monitoring.alerts import replay_command
from bigbatch.trainers.report.facts import Facts
from bigbatch.trainers.report.findings import Finding, choose, times, what_if

_DEAD, _MEAN_DEAD = 0.9, 0.5  # of a layer's units, and of those of all layers on average
_VANISHED = 1e-4  # of the largest gradient norm of a layer; its square is check's 1e-8
_EXPLODED = 1e3  # norm of the first gradient; that of networks that start well is 0.1 to 30
_FEWEST = 20  # records of the loss by which a curve is judged


def broken(facts: Facts) -> list[Finding]:
    """What a run suffers from at any time, the cause first."""
    if not len(facts.step):
        return [*non_finite(facts)]  # of the very first step
    causes = [*exploding(facts)] or [*diverged(facts)] or [*dead(facts)] or [*vanishing(facts)]
    return [*causes, *non_finite(facts)]


def non_finite(facts: Facts) -> Iterator[Finding]:
    skipped = sum(e["kind"] == "non_finite" for e in facts.events)
    skipped = skipped or int(np.isnan(facts.loss).sum())
    steps = "1 step" if skipped == 1 else f"{skipped:,} steps"
    if skipped and facts.recipe.precision == "fp16" and facts.history.state != "failed":
        yield Finding(
            "note",
            "Loss scale too high at times",
            f"{steps} overflowed in fp16 and made no update, as they do until the loss scale fits.",
            "non_finite",
            {"steps": skipped},
        )
    elif skipped:
        events = (e for e in facts.events if e["kind"] == "non_finite")
        command = next(filter(None, (replay_command(facts.history.name, e) for e in events)), None)
        shows = "" if command is None else f" `{command}` shows where it began."
        turn = choose(facts.recipe, [_lower_rate(facts)])
        yield Finding(
            "problem",
            "Non-finite loss, gradient or statistics",
            f"{steps} had a loss, gradient or running statistics that were not finite; the updates "
            "were not applied. Lower optimizer.lr, lengthen the warmup or set clip."
            f"{shows}{what_if(facts.history, turn)}",
            "non_finite",
            {"steps": skipped, "replay": command},
            turn,
        )


def exploding(facts: Facts) -> Iterator[Finding]:
    norms = facts.history.train.get("grad_norm")
    spoilt = any(e["kind"] == "non_finite" for e in facts.events)
    if norms is None or not (spoilt or facts.poor) or not norms[0] >= _EXPLODED:
        return
    found = facts.gradients[0]["norms"] if facts.gradients else {}
    sizes = {name: norm for name, norm in found.items() if norm is not None}
    layer = max(sizes, key=lambda name: sizes[name]) if sizes else None
    first = int(facts.step[0])
    where = f", most of it at {layer} ({sizes[layer]:.3g})" if layer is not None else ""
    yield Finding(
        "problem",
        "Exploding gradients",
        f"The first gradient had a norm of {norms[0]:.3g}{where}, before any update: the signal "
        f"grows from layer to layer. `bigbatch check` shows by how much, {_replay(facts, first)} "
        "from which sample.",
        "exploding",
        {"step": int(facts.step[0]), "grad_norm": float(norms[0]), "layer": layer},
        choose(
            facts.recipe,
            [
                ("model.init.weights", {"name": "he"}),
                ("clip", {"name": "norm", "limit": 1.0}),
                _lower_rate(facts),
            ],
        ),
    )


def diverged(facts: Facts) -> Iterator[Finding]:
    if len(facts.step) < _FEWEST or not np.isfinite(facts.start):
        return
    if getattr(facts.recipe.loss, "scale", None) == "mad":  # in units of errors, which fall
        return
    path, start, end = facts.path, facts.start, facts.end
    lowest, highest = float(np.nanmin(path)), float(np.nanmax(path))
    came_back = lowest < 0.7 * start and end > 0.95 * start
    rose = highest > 2 * start and end > 0.6 * start
    if not (came_back or rose):
        return
    at = int(facts.step[int(np.nanargmax(path) if rose else np.nanargmin(path))])
    shows = f"; {_replay(facts, at)} shows what that step was made of" if rose else ""
    shows = "" if learns_targets(facts.recipe) else shows  # a replay is of a classifier
    turned = f"rose to {highest:.3f}" if rose else f"fell to {lowest:.3f}"
    turn = choose(facts.recipe, [_lower_rate(facts)])
    yield Finding(
        "problem",
        "Diverged",
        f"The training loss started at {start:.3f}, {turned} by step {at:,} and ended at "
        f"{end:.3f}. Lower optimizer.lr or lengthen the warmup{shows}."
        f"{what_if(facts.history, turn)}",
        "diverged",
        {"start": start, "lowest": lowest, "highest": highest, "step": at, "end": end},
        turn,
    )


def dead(facts: Facts) -> Iterator[Finding]:
    shares: dict[str, float] = facts.probe.get("dead") or {}
    if not shares:
        return
    layer, mean = max(shares, key=lambda name: shares[name]), float(np.mean([*shares.values()]))
    if shares[layer] < _DEAD and mean < _MEAN_DEAD:
        return
    first = facts.probes[0]
    early = (first.get("dead") or {}).get(layer, 0.0)
    born = early >= _DEAD and len(facts.probes) > 1
    before = f" ({early:.0%} at step {first['step']:,})" if len(facts.probes) > 1 else ""
    count = sum(share >= _DEAD for share in shares.values())
    yield Finding(
        "problem" if facts.poor else "note",
        "Dead activations",
        f"{shares[layer]:.0%} of the units of {layer} were 0 for each of {facts.probe['images']} "
        f"training images at step {facts.probe['step']:,}{before}; in {count} of {len(shares)} "
        f"layers {_DEAD:.0%} or more are. What feeds them gets no gradient any more.",
        "dead",
        {"layer": layer, "share": shares[layer], "first_share": early, "mean_share": mean},
        choose(
            facts.recipe,
            [*([] if born else [_lower_rate(facts)]), ("model.activation", "LeakyReLU")],
        ),
    )


def vanishing(facts: Facts) -> Iterator[Finding]:
    records = facts.gradients[1:]  # in the first step whole blocks may stand behind norms of 0
    if not records or not facts.poor:
        return
    # What waits for its turn under transfer has no norm until then; from then on it has.
    names = dict.fromkeys(name for r in records for name in r["norms"])
    norms = {name: _median(r["norms"].get(name) for r in records) for name in names}
    if not norms:
        return
    low = min(norms, key=lambda name: norms[name])
    high = max(norms, key=lambda name: norms[name])
    if norms[high] == 0 or norms[low] >= _VANISHED * norms[high]:
        return
    yield Finding(
        "problem",
        "Vanishing gradients",
        f"The gradient has a norm of {norms[low]:.3g} at {low} and of {norms[high]:.3g} at {high}, "
        f"in the median of {len(records)} steps: the former learns nothing.",
        "vanishing",
        {"layer": low, "norm": norms[low], "largest_layer": high, "largest": norms[high]},
        choose(
            facts.recipe,
            [
                ("model.activation", "ReLU"),
                ("model.init.weights", {"name": "he"}),
                ("optimizer", {"name": "lamb", "lr": 0.01}),
            ],
        ),
    )


def _median(values: Any) -> float:
    finite = [value for value in values if value is not None]
    return float(np.median(finite)) if finite else 0.0


def _replay(facts: Facts, step: int) -> str:
    return f"`bigbatch replay {facts.history.name} --step {step}`"


def _lower_rate(facts: Facts) -> tuple[str, float]:
    return "optimizer.lr", times(facts.recipe.optimizer.lr, 0.1)
