"""`bigbatch ensemble --soup`: the barriers between members, and one model of averaged weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bigbatch.configs.errors import UserError
from bigbatch.data.index import Index, draw_samples
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.ensemble.combine import Seen, look
from bigbatch.trainers.ensemble.folder import Ensemble
from bigbatch.trainers.ensemble.members import Member
from bigbatch.trainers.ensemble.selection import within_margin
from bigbatch.trainers.ensemble.soup import SOUP, Scores, greedy_soup, loss_barrier, uniform_soup
from bigbatch.trainers.evaluation.evaluate import Evaluator, autocast
from bigbatch.trainers.evaluation.precise_bn import PreciseBatchNorm
from bigbatch.trainers.job import precise_statistics
from bigbatch.trainers.models.batch_stats import averaged_layers
from bigbatch.trainers.models.build import build_augmenter
from bigbatch.trainers.optim.stages import keep_statistics
from bigbatch.trainers.planning.inputs import open_inputs
from bigbatch.trainers.recovery.tensor_files import load_weights, save_weights

SOUPS = ("greedy", "uniform")
_POINTS = 5  # of the line between two members, ends included
_IMAGES = 1000  # that decide on a barrier, and as many that settle running statistics for it
_HIGH = 0.25  # of ln(classes), the loss of guessing: members that share a trunk stay below


def make_soup(
    engine: Engine,
    members: Sequence[Member],
    kind: str,
    fit_on: Index,
    folder: Path,
    *,
    name: str = SOUP,
    margin: float = 1.0,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Member, dict[str, Any]]:
    """The soup of members, kept as `name` in `folder`, and why it is as it is. Collective.

    Ingredients are the members whose accuracy on `fit_on` is within `margin` of the best one's.
    First the loss barrier from the best to each of them is measured, on images of `fit_on` that
    are drawn by key, and said; then a greedy soup takes what lowers no accuracy on `fit_on`, a
    uniform one takes all, added up in the order of `members`. The soup has the first member's
    recipe, and running statistics anew from the images that it trains on. UserError, which names
    the member, where weights cannot be averaged.
    """
    check_alike(members)
    kitchen = _Kitchen(engine, members[0])
    model = kitchen.model
    alone = [kitchen.scores_of(member, fit_on) for member in members]
    kept = within_margin([scores["accuracy"] for scores in alone], margin)
    order = sorted(kept, key=lambda i: (-alone[i]["accuracy"], i))
    ingredients = {members[i].name: members[i].weights for i in order}
    losses = [alone[i]["nll"] for i in order]
    record: dict[str, Any] = {
        "kind": kind,
        "members": [
            {"name": member.name, **scores, "within_margin": i in kept}
            for i, (member, scores) in enumerate(zip(members, alone, strict=True))
        ],
        "barriers": _barriers(kitchen, ingredients, fit_on, say),
    }
    if kind == "greedy":
        steps = greedy_soup(
            ingredients,
            losses,
            model,
            engine,
            lambda: kitchen.scores(fit_on),
            kitchen.settle,
        )
        record["steps"] = [asdict(step) for step in steps]
        for step in steps:
            taken = "takes" if step.kept else "refuses"
            say(f"soup {taken} {step.name}: accuracy {step.before:.2%} -> {step.after:.2%}")
    else:
        uniform_soup([members[i].weights for i in sorted(kept)], model, kitchen.settle)
    file = folder / name
    engine.on_main(lambda: save_weights(model, file, members[0].info))
    return replace(members[0], name="soup", weights=file), record


def look_alone(
    engine: Engine, member: Member, splits: Mapping[str, Index]
) -> dict[str, Seen | None]:
    """What was seen of each split by one member, on rank 0. Collective."""
    kitchen = _Kitchen(engine, member)
    load_weights(kitchen.model, member.weights)
    return {role: kitchen.look(member, index) for role, index in splits.items()}


def check_alike(members: Sequence[Member]) -> None:
    """Raise UserError, which names the member, where weights of members have no average."""
    first = members[0]
    if len(members) < 2:
        raise UserError(f"a soup of {first.name} alone; give --members all, or several runs")
    for member in members[1:]:
        ours, theirs = (_form(m) for m in (member, first))
        if odd := [key for key in theirs | ours if ours.get(key) != theirs.get(key)]:
            raise UserError(
                f"member {member.name} has another {' and '.join(odd)} than {first.name}: their "
                "weights have no average; leave it out, or combine predictions, without --soup"
            )


def _form(member: Member) -> dict[str, Any]:
    """What weights must have in common to be averaged."""
    form = member.recipe.model.form()
    del form["name"]  # the info's model
    recipe = member.recipe
    seen: dict[str, Any] = {"crop": recipe.evaluate.crop_fraction}
    seen |= {"evaluate.image_size": recipe.eval_size, "crop_mode": recipe.evaluate.crop_mode}
    return vars(member.info) | form | seen


def _barriers(
    kitchen: "_Kitchen", ingredients: dict[str, Path], split: Index, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Losses on the line from the first ingredient, the best, to each other one."""
    (best, path), *others = ingredients.items()
    few, model = draw_samples(split, _IMAGES, "barrier", split.hash), kitchen.model

    def loss(weights: dict[str, Tensor]) -> float:
        model.load_state_dict(weights)
        kitchen.settle(_IMAGES)
        scores = kitchen.engine.from_main(kitchen.scores(few))
        return float(scores["nll"])

    if not others:
        return []
    say(
        f"loss barriers to {best}, the best here: {_POINTS} points of the line, {len(few):,} "
        "images of the split, running statistics made anew at each"
    )
    found = []
    start = load_weights(model, path)
    for name, other in others:
        line = loss_barrier(start, load_weights(model, other), loss, _POINTS)
        say(f"  {name}: {line.height:.4f} nats")
        found.append(
            {"from": best, "to": name, "height": line.height, "losses": line.losses,
             "images": len(few)}
        )  # fmt: skip
    if any(row["height"] > _HIGH * np.log(len(split.classes)) for row in found):
        say("  barriers this high are those of members that do not share a trunk: their average is")
        say("  a worse model than each of them; combine their predictions instead, without --soup")
    return found


class _Kitchen:
    """One model on this rank's device, whose weights come and go, and how good they are."""

    def __init__(self, engine: Engine, member: Member) -> None:
        self.engine, self._recipe = engine, member.recipe
        recipe = member.recipe
        self.model = member.build(engine.device)
        keep_statistics(self.model, recipe.transfer)
        augmenter = build_augmenter(recipe, len(member.classes), engine.device)
        self._evaluator = Evaluator(engine, augmenter, recipe)

    def scores(self, split: Index) -> Scores | None:
        """How good the model is on a split, on rank 0. Collective."""
        with autocast(self.engine.device, self._recipe.precision):
            found = self._evaluator.outcomes(self.model, split)
        return None if found is None else found.scores()

    def look(self, member: Member, split: Index) -> Seen | None:
        """What was seen of a split by the weights that the model has, on rank 0. Collective."""
        alone = Ensemble((member,), Combination())
        with autocast(self.engine.device, self._recipe.precision):
            batches = self._evaluator.batches(self.model, split)
            return look(self._evaluator, split, batches, 1, (0,), alone)

    def scores_of(self, member: Member, split: Index) -> Scores:
        """Of a member's weights, on every rank. Collective; UserError where they are no good."""
        try:
            load_weights(self.model, member.weights)
        except UserError as error:
            raise UserError(f"member {member.name}: {error}") from None
        scores: Scores = self.engine.from_main(self.scores(split))
        if not np.isfinite(scores["nll"]):
            raise UserError(
                f"member {member.name} gives logits that are not finite; its weights are no good: "
                "leave it out with --members"
            )
        return scores

    @cached_property
    def _precise_bn(self) -> PreciseBatchNorm:
        return precise_statistics(self._recipe, open_inputs(self._recipe), self.engine)

    def settle(self, images: int | None = None) -> None:
        """Make running statistics anew from about so many training images. Collective.

        None: from as many as the recipe says.
        """
        if averaged_layers(self.model):  # otherwise the training split need not be there
            self._precise_bn.recompute(self.model, images)
