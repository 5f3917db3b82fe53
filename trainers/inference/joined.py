"""`bigbatch ensemble --combine features`: one linear head on the features of all members."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigbatch.configs.errors import UserError
from bigbatch.configs.model import Model
from bigbatch.trainers.ensemble.combination import Logits
from bigbatch.trainers.ensemble.fit import fit_joined
from bigbatch.trainers.ensemble.held_out import FitData, fold_of
from bigbatch.trainers.ensemble.members import Member
from bigbatch.trainers.inference.forward import Features
from bigbatch.trainers.models.joined import NAME, Joined, join
from bigbatch.trainers.recovery.tensor_files import save_weights

_FILE = "joined.safetensors"


def check_joinable(members: Sequence[Member]) -> None:
    """Raise UserError, which names the member, where members do not look at images alike."""
    first = members[0]
    if len(members) < 2:
        raise UserError(
            f"--combine features joins those of several members, and {first.name} is alone; give "
            "--members all, or several runs"
        )
    for member in members[1:]:
        ours, theirs = (_look(m) for m in (member, first))
        if odd := [key for key in theirs if ours[key] != theirs[key]]:
            raise UserError(
                f"member {member.name} has another {' and '.join(odd)} than {first.name}: one "
                "model looks at an image once; leave it out, or combine probabilities"
            )


def _look(member: Member) -> dict[str, Any]:
    recipe = member.recipe
    own: dict[str, Any] = {"crop": recipe.evaluate.crop_fraction, "precision": recipe.precision}
    own |= {"evaluate.image_size": recipe.eval_size, "crop_mode": recipe.evaluate.crop_mode}
    return {k: v for k, v in vars(member.info).items() if k != "model"} | own


def fit_head(
    features: Features, data: FitData, folds: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, Logits]:
    """The head's weight [C, D] and bias [C], and logits [1, N, C] of heads that were fitted
    without the sample's own fold: what the temperature, and every figure, may be made of."""
    fold = fold_of(data, folds, seed)
    own = np.empty((1, *data.logits.shape[1:]), np.float32)
    for number in range(folds):
        outside = fold == number
        weight, bias = fit_joined(features[~outside], data.rows(~outside), folds, seed)
        own[0, outside] = features[outside] @ weight.T + bias
    weight, bias = fit_joined(features, data, folds, seed)
    return torch.from_numpy(weight), torch.from_numpy(bias), own


def make_joined(
    members: Sequence[Member],
    features: Features,
    data: FitData,
    folder: Path,
    folds: int,
    seed: int,
) -> tuple[Member, Logits, dict[str, Any]]:
    """The members as one model, kept in `folder`; its logits out of fold, and a record of it."""
    first = members[0]
    networks = [member.build() for member in members]
    trees = [member.recipe.model.network() for member in members]
    size = first.recipe.data.image_size
    options: dict[str, Any] = {"members": trees, "image_size": size}
    recipe = first.recipe.model_copy(update={"model": Model(name=NAME, options=options)})
    joined = Joined(len(first.classes), first.recipe.data.channels, trees, size)
    weight, bias, own = fit_head(features, data, folds, seed)
    join(networks, joined, weight, bias)
    member = replace(first, name="joined", weights=folder / _FILE, recipe=recipe)
    save_weights(joined, member.weights, member.info)
    names = [{"name": m.name, "features": w} for m, w in zip(members, joined.widths, strict=True)]
    return member, own, {"members": names, "features": int(sum(joined.widths))}
